"""compressed-tensors: floats and integers of 8 bits, and of fewer in bytes or words."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_lens.errors import UnsupportedModelError
from moe_lens.model.loading.checkpoint import OpenFiles, StoredTensor
from moe_lens.model.loading.formats import arithmetic
from moe_lens.model.loading.formats.packed_tensor import (
    FP8,
    Found,
    PackedTensor,
    Parts,
    Tensors,
    beside,
    lacks,
    made_of,
)

_ROLES = {
    "weight": ".weight",
    "packed": ".weight_packed",
    "scale": ".weight_scale",
    "zero": ".weight_zero_point",
    "global": ".weight_global_scale",
    "shape": ".weight_shape",
    "order": ".weight_g_idx",
}

_BY_ACTIVATIONS = ("group", "dynamic", True)
"""Words of `actorder` for columns whose groups are told one by one."""


def compressed(tensors: Tensors, said: Mapping[str, Any]) -> Found:
    """FP8 or int8 with scales (of MXFP8, powers of two); integers of few bits in words; NVFP4 and MXFP4 in bytes."""
    groups = list((said.get("config_groups") or {}).values())
    if said.get("transform_config"):
        raise UnsupportedModelError("the checkpoint is packed by compressed-tensors after its matrices were rotated")
    sparse = (said.get("sparsity_config") or {}).get("format", "dense")
    formats = {str(said.get("format")), *(str(group.get("format")) for group in groups), str(sparse)}
    if unread := sorted(name for name in formats if re.search("marlin|sparse", name)):
        raise UnsupportedModelError(
            f"the checkpoint is packed by compressed-tensors in the format {unread[0]}, which is not read here"
        )
    for stored_name, stored in tensors.items():
        module, _, ending = stored_name.rpartition(".")
        if ending not in ("weight", "weight_packed") or (ending == "weight" and stored.dtype not in (*FP8, "I8")):
            continue
        parts = beside(tensors, module, _ROLES)
        if "scale" not in parts:
            raise lacks(stored, "weight_scale")
        how = _scheme(module, groups)
        yield _one(f"{module}.weight", stored, parts, how)


def _scheme(module: str, groups: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """How a module's weights were packed: by the group that names it, has a pattern for it, or names its class."""
    targets = [(target, group) for group in groups for target in group.get("targets") or ()]
    for target, group in sorted(targets, key=lambda each: each[0].startswith("re:")):
        if target.startswith("re:") and re.match(target[3:], module) or target in (module, module.split(".")[-1]):
            return group.get("weights") or {}
    named = [group for group in groups if any(target == "Linear" for target in group.get("targets") or ())]
    chosen = named or (groups if len(groups) == 1 else [])
    if not chosen:
        raise UnsupportedModelError(f"config.json does not say how compressed-tensors packed {module}")
    return chosen[0].get("weights") or {}


def _one(name: str, stored: StoredTensor, parts: dict[str, StoredTensor], how: Mapping[str, Any]) -> PackedTensor:
    bits, group = int(how.get("num_bits") or 8), how.get("group_size") or 0
    needed = {"zero": how.get("symmetric") is False, "order": how.get("actorder") in _BY_ACTIVATIONS}
    for role, wanted in needed.items():
        if wanted and role not in parts:
            raise lacks(stored, _ROLES[role].removeprefix("."))
    if "packed" not in parts:
        *_, columns = stored.shape
        block = how.get("block_structure") if how.get("strategy") == "block" else None
        width = group if group > 0 else columns
        of = (int(block[0]), int(block[1])) if block else (1, width)
        in_bytes = "scale" if stored.dtype in FP8 else ""
        return made_of(name, parts, stored.shape, partial(_with_zero, of), in_bytes=in_bytes)
    parts.pop("weight", None)
    if stored.dtype == "U8":
        rows, columns = stored.shape[0], 2 * stored.shape[1]
        width, in_bytes = (16, "") if "global" in parts else (32, "scale")
        return made_of(name, parts, (rows, columns), partial(_float4, width), in_bytes=in_bytes)
    if stored.dtype != "I32" or 32 % bits or "shape" not in parts:
        raise UnsupportedModelError(f"{stored.file}: {name} is packed in {bits} bits as {stored.dtype}: not read here")
    said = parts.pop("shape")
    rows, columns = (int(length) for length in said.read(OpenFiles()))
    return made_of(name, parts, (rows, columns), partial(_words, bits, (rows, columns), group), (said,))


def _with_zero(block: tuple[int, int], parts: Parts) -> Tensor:
    zero = parts["zero"].float() if "zero" in parts else None
    return _less_zeros(parts["weight"].float(), zero, arithmetic.scales(parts["scale"]), block, parts.get("order"))


def _float4(width: int, parts: Parts) -> Tensor:
    """NVFP4, whose scales are FP8 and are divided by one more; MXFP4, whose scales are powers of two."""
    fine = parts["scale"]
    scale = fine.float() / parts["global"].float() if "global" in parts else arithmetic.exponents(fine)
    return arithmetic.scaled(arithmetic.e2m1(parts["packed"]), scale, (1, width))


def _words(bits: int, shape: tuple[int, int], group: int, parts: Parts) -> Tensor:
    """Signed integers, stored shifted to be positive; rows of words of 32 bits."""
    rows, columns = shape
    half, scale = 2 ** (bits - 1), parts["scale"].float()
    numbers = arithmetic.bit_stream(parts["packed"], bits, columns).float() - half
    block = (1, group if group > 0 else columns)
    zero = None
    if "zero" in parts:
        zero = (arithmetic.bit_stream(parts["zero"].mT, bits, rows).mT - half).float()
    return _less_zeros(numbers, zero, scale, block, parts.get("order"))


def _less_zeros(
    numbers: Tensor, zero: Tensor | None, scale: Tensor, block: tuple[int, int], order: Tensor | None
) -> Tensor:
    """(number − zero) × scale, each of a number's block, or of the group that `order` has for its column."""
    if order is not None and int(order.min()) >= 0:
        of = order.long()
        return (numbers if zero is None else numbers - zero[:, of]) * scale[:, of]
    if zero is not None:
        numbers = numbers - arithmetic.scaled(torch.ones_like(numbers), zero, block)
    return arithmetic.scaled(numbers, scale, block)
