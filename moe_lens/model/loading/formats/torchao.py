"""Tensors of torchao's classes, which safetensors hold as plain ones; the library itself makes numbers of them."""

import importlib
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moe_lens.errors import CheckpointError, InputError, UnsupportedModelError
from moe_lens.model.loading.checkpoint import FLOATS
from moe_lens.model.loading.formats.packed_tensor import Found, PackedTensor, Parts, Tensors, beside, lacks

_KINDS = FLOATS | {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def torchao(tensors: Tensors, said: Mapping[str, Any]) -> Found:  # noqa: ARG001  the files' own headers say more
    """What the headers of the files say is of one of torchao's classes."""
    _library()
    headers = dict[str, str]()
    for file in sorted({stored.file for stored in tensors.values()}):
        with safe_open(file, framework="pt") as opened:
            headers |= opened.metadata() or {}
    if "tensor_names" not in headers:
        raise UnsupportedModelError(
            "the checkpoint is packed by torchao, and the headers of its files do not say how: load it with the "
            "transformers that wrote it, and save it with one that is newer"
        )
    for name, text in headers.items():
        module, _, own = name.rpartition(".")
        kind = json.loads(text) if module else {}
        if kind.get("_type") in (None, "Tensor"):
            continue
        roles = {role: role for role in kind["_tensor_data_names"]}
        parts = beside(tensors, f"{module}._{own}_", roles)
        if not parts:
            raise CheckpointError(f"the headers of the files say that {name} is packed by torchao, and it is missing")
        if absent := roles.keys() - parts.keys():
            raise lacks(next(iter(parts.values())), ", ".join(sorted(absent)))
        empty = {role: torch.empty(part.shape, dtype=_KINDS[part.dtype], device="meta") for role, part in parts.items()}
        shape = tuple(_together(kind, empty).shape)
        yield PackedTensor(next(iter(parts.values())).file, name, shape, "BF16", parts, partial(_numbers, kind))


def _numbers(kind: dict[str, Any], parts: Parts) -> Tensor:
    return _together(kind, parts).dequantize().float()


def _together(kind: dict[str, Any], parts: Parts) -> Any:
    """The tensor of torchao's class that its parts are."""
    flat = {f"of._weight_{role}": part for role, part in parts.items()}
    header = {"of.weight": json.dumps(kind), "tensor_names": json.dumps(["of.weight"])}
    found, _ = _library().unflatten_tensor_state_dict(flat, header)
    return found["of.weight"]


def _library() -> Any:
    try:
        return importlib.import_module("torchao.prototype.safetensors.safetensors_support")
    except ImportError as error:
        raise InputError("a checkpoint that is packed by torchao needs torchao: pip install torchao") from error
