"""A packed checkpoint as a view of plain numbers, by the format that its config names; or a refusal by name.

Nothing is read here but headers and, for a few formats, some bytes beside each matrix. Rules go by names, shapes and
dtypes of what is stored as well as by `quantization_config`, so that one serves several formats.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from moe_lens.errors import CheckpointError, UnsupportedModelError
from moe_lens.model.loading.checkpoint import Checkpoint, StoredTensor
from moe_lens.model.loading.formats.bitsandbytes import bitsandbytes
from moe_lens.model.loading.formats.compressed_tensors import compressed
from moe_lens.model.loading.formats.fp8_mxfp4 import fp8, modelopt, mxfp4
from moe_lens.model.loading.formats.gptq_awq import awq, gptq
from moe_lens.model.loading.formats.packed_tensor import FP8, Found, Tensors
from moe_lens.model.loading.formats.torchao import torchao


class Format(NamedTuple):
    """A way of storing matrices."""

    find: Callable[[Tensors, Mapping[str, Any]], Found]
    """The packed matrices of a checkpoint."""
    stored: str
    """What is read, in words."""


FORMATS = {
    "awq": Format(awq, "4 bits in the layout gemm; other layouts are refused"),
    "bitsandbytes": Format(bitsandbytes, "4 bits (nf4, fp4; scales packed or not) and 8 bits"),
    "compressed-tensors": Format(
        compressed,
        "float-, int-, naive-, mxfp8- and pack-quantized, nvfp4- and mxfp4-pack-quantized; marlin, sparse and "
        "rotated matrices are refused",
    ),
    "fbgemm_fp8": Format(fp8, "FP8 with a scale for each row; Llama 4's experts with one for each output"),
    "fp8": Format(
        fp8,
        "FP8 with a scale for each block (the last blocks may be smaller, as in DeepSeek-V3), for each row, or for the "
        "whole matrix; also with other matrices in 4 bits, in blocks of 32",
    ),
    "gptq": Format(gptq, "2, 3, 4 and 8 bits in words of 32, groups in any order, gptq and gptq_v2; marlin is refused"),
    "modelopt": Format(modelopt, "FP8 with one scale, MXFP8, NVFP4"),
    "modelopt_fp4": Format(modelopt, "NVFP4"),
    "mxfp4": Format(mxfp4, "experts in 4 bits in blocks of 32, as gpt-oss's"),
    "mxfp8": Format(fp8, "FP8 in blocks of 32 with powers of two as scales"),
    "torchao": Format(torchao, "safetensors of all its classes, by torchao itself, which has to be installed"),
}
"""By `quant_method`. A checkpoint of auto-round says which of them it is packed as."""
_BESIDE = re.compile(
    r".*[._]((input|output|activation)_(scale|scale_inv|zero_point|global_scale|g_idx)|[qkv]_(cache_)?(scale|zero_point))"
)
"""Of activations and of the key-value cache: they are no part of the weights, which compute in more bits here."""
UNREAD = {
    "aqlm": "codebooks that only its own library decodes",
    "bitnet": "ternary weights, which need 8-bit activations",
    "eetq": "a format that only its own library reads",
    "exl2": "a format that only its own library reads",
    "exl3": "a format that only its own library reads",
    "fouroversix": "a format that only its own library reads",
    "fp_quant": "matrices that were rotated before they were packed",
    "gemma": "a format that only its own library reads",
    "higgs": "matrices that were rotated before they were packed",
    "hqq": "a format that only its own library reads",
    "metal": "a format that only its own library reads",
    "quanto": "tensors that only its own library unpacks",
    "quark": "several layouts under one name",
    "sinq": "a format that only its own library reads",
    "spqr": "sparse outliers that only its own library adds",
    "vptq": "codebooks that only its own library decodes",
}
"""Formats that are not read, and what stands in the way."""


def packing_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a config.json says of how its checkpoint is packed; None if nothing."""
    for part in (config, config.get("text_config") or {}):
        for name in ("quantization_config", "compression_config"):
            if said := part.get(name):
                return said
    return None


def method_of(said: Mapping[str, Any]) -> str:
    """The name of a format."""
    if said.get("load_in_4bit") or said.get("load_in_8bit"):
        return "bitsandbytes"
    method = str(said.get("quant_method", ""))
    if method == "auto-round":
        return str(said.get("packing_format", "")).removeprefix("auto_round:auto_") or method
    return method


def unpacked(checkpoint: Checkpoint, said: Mapping[str, Any], to: torch.dtype) -> Checkpoint:
    """A view of a checkpoint in which every packed matrix is one of numbers, under the name that it has unpacked.

    Args:
        checkpoint: As it is stored.
        said: Its `quantization_config`.
        to: What matrices are unpacked to.

    Raises:
        UnsupportedModelError: a format that is not read; names it.
        CheckpointError: a packed tensor that lacks a part, or parts that do not fit.
    """
    format_ = FORMATS.get(method_of(said))
    if format_ is None:
        raise _unread(method_of(said))
    tensors, used = dict[str, StoredTensor](), set[int]()
    try:
        for packed in format_.find(checkpoint.tensors, said):
            used |= {id(part) for part in (*packed.parts.values(), *packed.said)}
            tensors[packed.name] = replace(packed, to=to)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        last = f", behind {next(reversed(tensors))}" if tensors else ""
        raise CheckpointError(
            f"{checkpoint.files[0].parent}: what is packed{last} is not as {method_of(said)} packs it: {error}"
        ) from error
    left = {name: stored for name, stored in checkpoint.tensors.items() if id(stored) not in used}
    plain = {name: stored for name, stored in left.items() if not _BESIDE.fullmatch(name)}
    for name, stored in plain.items():
        if stored.dtype in (*FP8, "I8", "U8", "I32", "F4") and re.search(r"weight|_proj|_blocks|_scales|qzeros", name):
            raise CheckpointError(
                f"{stored.file}: {name} is {stored.dtype}, and nothing beside it says how {method_of(said)} packed it"
            )
    return Checkpoint(checkpoint.files, {**plain, **tensors})


def _unread(method: str) -> UnsupportedModelError:
    why = UNREAD.get(method)
    return UnsupportedModelError(
        f"the checkpoint is packed by {method or 'a method that it does not name'}"
        + (f" ({why})" if why else "")
        + f", which is not read here. Read are {', '.join(sorted(FORMATS))}; or load the checkpoint it was made from"
    )
