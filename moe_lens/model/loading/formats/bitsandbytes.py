"""bitsandbytes as it is saved: 4 bits in blocks, 8 bits in rows."""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lens.errors import CheckpointError
from moe_lens.model.loading.checkpoint import OpenFiles, StoredTensor
from moe_lens.model.loading.formats import arithmetic
from moe_lens.model.loading.formats.packed_tensor import Found, Parts, Tensors, beside, lacks, made_of

_FOUR_BITS = {role: f".{role}" for role in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}


def bitsandbytes(tensors: Tensors, said: Mapping[str, Any]) -> Found:  # noqa: ARG001
    """4 bits: two numbers in a byte and a scale for each block; 8 bits: a scale for each row."""
    files = OpenFiles()
    for name, stored in tensors.items():
        rows = name.removesuffix("weight") + "SCB"
        states = [end for end in ("nf4", "fp4") if f"{name}.quant_state.bitsandbytes__{end}" in tensors]
        if states:
            state = tensors[f"{name}.quant_state.bitsandbytes__{states[0]}"]
            how = _json_of(state.file, state.read(files))
            packed = _Bytes(stored.file, stored.name, (stored.nbytes,), "U8")
            parts = {"weight": packed, **beside(tensors, name, _FOUR_BITS)}
            if absent := {"absmax", "quant_map"} - parts.keys():
                raise lacks(stored, " and ".join(sorted(absent)))
            in_bytes = "absmax" if "nested_absmax" in parts else ""
            yield made_of(name, parts, tuple(how["shape"]), partial(_four_bits, how), (state, stored), in_bytes)
        elif stored.dtype == "I8" and name.endswith("weight"):
            if rows not in tensors:
                raise lacks(stored, "SCB")
            layout = tensors.get(f"{name}_format")
            parts = {"weight": stored, "scale": tensors[rows], **({"format": layout} if layout else {})}
            yield made_of(name, parts, stored.shape, _int8_rows)


class _Bytes(StoredTensor):
    """The bytes of a tensor, stored as numbers of any kind (`bnb_4bit_quant_storage`)."""

    def read(self, files: OpenFiles) -> Tensor:
        """In a row."""
        return super().read(files).flatten().view(torch.uint8)


def _json_of(file: Path, stored: Tensor) -> dict[str, Any]:
    try:
        return json.loads(bytes(stored.tolist()))
    except ValueError as error:
        raise CheckpointError(f"{file} has a quant_state that is no JSON: {error}") from error


def _int8_rows(parts: Parts) -> Tensor:
    if "format" in parts and int(parts["format"]) != 0:
        raise ValueError("its rows are in an order of a GPU's own")
    return arithmetic.scaled(parts["weight"], parts["scale"].float() / 127, (1, parts["weight"].shape[1]))


def _four_bits(how: Mapping[str, Any], parts: Parts) -> Tensor:
    scale = parts["absmax"]
    if "nested_absmax" in parts:
        fine = arithmetic.table(scale, parts["nested_quant_map"])
        scale = _scaled(fine, parts["nested_absmax"], how["nested_blocksize"]) + how["nested_offset"]
    numbers = arithmetic.pairs(parts["weight"].reshape(1, -1), parts["quant_map"], low_first=False)[0]
    numbers = _scaled(numbers, scale, how["blocksize"])
    return numbers[: math.prod(how["shape"])].view(how["shape"])


def _scaled(numbers: Tensor, scale: Tensor, block: int) -> Tensor:
    """Numbers in a row, times the scale of their block."""
    return arithmetic.scaled(numbers[None], scale[None], (1, int(block)))[0]
