"""Floats of 8 and of 4 bits with scales: FP8, MXFP8 and MXFP4 as transformers has them, ModelOpt's FP8 and NVFP4."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_lens.model.loading.checkpoint import StoredTensor
from moe_lens.model.loading.formats import arithmetic
from moe_lens.model.loading.formats.packed_tensor import FP8, Found, Parts, Tensors, beside, lacks, made_of


def fp8(tensors: Tensors, said: Mapping[str, Any]) -> Found:
    """A scale for each block, of the size that the config says, for each row, or for all; DeepSeek-V4's 4 bits too.

    In fbgemm_fp8, experts (Llama 4's) are [expert, in, out], with a scale for each output.
    """
    block, turned = said.get("weight_block_size"), said.get("quant_method") == "fbgemm_fp8"
    for name, stored in tensors.items():
        endings = (f"{name}_scale_inv", f"{name}_scale", re.sub(r"weight$", "scale", name))
        scale = next((tensors[scale] for scale in endings if scale != name and scale in tensors), None)
        halves = stored.dtype in ("I8", "F4") and scale is not None
        if not (stored.dtype in FP8 or halves) or name.endswith("scale"):
            continue
        if scale is None:
            raise lacks(stored, "scale")
        *experts, rows, columns = stored.shape
        if halves:
            shape, size = (*experts, rows, 2 * columns), (1, 32)
        else:
            shape = stored.shape
            size = (rows, 1) if turned and experts else _block(scale, (rows, columns), block)
        unpack = partial(_floats, size, halves)
        yield made_of(name, {"weight": stored, "scale": scale}, shape, unpack, in_bytes="scale")


def _block(scale: StoredTensor, shape: tuple[int, int], block: Any) -> tuple[int, int]:
    """Rows and columns that share a scale: what the config says, or else a row, or everything; 32 share an exponent."""
    if block is not None:
        return int(block[0]), int(block[1])
    if scale.dtype in ("U8", "F8_E8M0") and scale.shape[-2:] == (shape[0], -(-shape[1] // 32)):
        return 1, 32
    by_row = scale.shape[-2:] == (shape[0], 1) or scale.shape[-1:] == (shape[0],)
    return (1, shape[1]) if by_row else shape


def _floats(block: tuple[int, int], halves: bool, parts: Parts) -> Tensor:
    scale, weight = arithmetic.scales(parts["scale"]), parts["weight"]
    numbers = arithmetic.e2m1(weight.view(torch.uint8)) if halves else weight
    return arithmetic.scaled(numbers, scale, block)


def modelopt(tensors: Tensors, said: Mapping[str, Any]) -> Found:
    """FP8 with a scale for all; NVFP4: two numbers in a byte, a scale in FP8 for 16, and one for all of those."""
    yield from fp8(tensors, said)
    roles = {"weight": ".weight", "scale": ".weight_scale", "second": ".weight_scale_2"}
    for name, stored in tensors.items():
        if stored.dtype != "U8" or not name.endswith(".weight"):
            continue
        parts = beside(tensors, name.removesuffix(".weight"), roles)
        if absent := roles.keys() - parts.keys():
            raise lacks(stored, " and ".join(roles[role] for role in sorted(absent)))
        *experts, rows, half = stored.shape
        yield made_of(name, parts, (*experts, rows, 2 * half), _nvfp4)


def _nvfp4(parts: Parts) -> Tensor:
    return arithmetic.scaled(
        arithmetic.e2m1(parts["weight"]), parts["scale"].float() * parts["second"].float(), (1, 16)
    )


def mxfp4(tensors: Tensors, said: Mapping[str, Any]) -> Found:  # noqa: ARG001
    """Blocks of 32 floats of 4 bits, as gpt-oss stores its experts: [expert, out, block, byte], read as [in, out]."""
    for stored_name, stored in tensors.items():
        name = stored_name.removesuffix("_blocks")
        if name == stored_name or stored.dtype != "U8":
            continue
        parts = beside(tensors, name, {"weight": "_blocks", "scale": "_scales"})
        if "scale" not in parts:
            raise lacks(stored, "_scales")
        experts, rows, blocks, half = stored.shape
        yield made_of(name, parts, (experts, blocks * half * 2, rows), _mxfp4, in_bytes="scale")


def _mxfp4(parts: Parts) -> Tensor:
    numbers = arithmetic.e2m1(parts["weight"].flatten(-2))
    return arithmetic.scaled(numbers, arithmetic.exponents(parts["scale"]), (1, 32)).mT
