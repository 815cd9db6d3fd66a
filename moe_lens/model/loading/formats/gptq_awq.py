"""GPTQ and AWQ: integers of few bits in words of 32, with a scale and a zero for each group."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_lens.errors import CheckpointError, UnsupportedModelError
from moe_lens.model.loading.formats import arithmetic
from moe_lens.model.loading.formats.packed_tensor import Found, Parts, Tensors, beside, lacks, made_of


def gptq(tensors: Tensors, said: Mapping[str, Any]) -> Found:
    """Rows of the transposed matrix in words, with a scale and a zero for each group of rows."""
    layout = said.get("checkpoint_format") or said.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or said.get("is_marlin_format"):
        raise UnsupportedModelError(f"the checkpoint is packed by GPTQ in the layout {layout}, which is not read here")
    yield from _quantised_rows(tensors, said, partial(_gptq_matrix, 1 if layout == "gptq" else 0), by_rows=True)


def awq(tensors: Tensors, said: Mapping[str, Any]) -> Found:
    """As GPTQ, but packed along the other side, in an order of AWQ's own."""
    layout = str(said.get("version") or said.get("format") or "gemm").lower()
    bits = int(said.get("bits") or said.get("w_bit") or 4)
    if layout != "gemm" or said.get("backend") == "llm-awq" or bits != 4:
        raise UnsupportedModelError(
            f"the checkpoint is packed by AWQ in the layout {layout} of {bits} bits; only gemm of 4 is read"
        )
    yield from _quantised_rows(tensors, said, _awq_matrix, by_rows=False)


def _quantised_rows(
    tensors: Tensors, said: Mapping[str, Any], unpack: Callable[..., Tensor], *, by_rows: bool
) -> Found:
    group = int(said.get("group_size") or said.get("q_group_size") or -1)
    for stored_name, stored in tensors.items():
        module = stored_name.removesuffix(".qweight")
        if module == stored_name:
            continue
        if stored.dtype in ("I8", "I16", "I64"):
            raise UnsupportedModelError(f"{stored.file}: {stored_name} is in words of {stored.dtype}; only I32 is read")
        parts = beside(
            tensors, module, {"weight": ".qweight", "zeros": ".qzeros", "scale": ".scales", "order": ".g_idx"}
        )
        needed = {"zeros", "scale"} | ({"order"} if by_rows and said.get("desc_act") else set())
        if absent := needed - parts.keys():
            raise lacks(stored, " and ".join(sorted(absent)))
        n_out = parts["scale"].shape[1]
        bits = parts["zeros"].shape[1] * 32 // n_out
        n_in = stored.shape[0] * 32 // bits if by_rows else stored.shape[0]
        if bits not in (2, 3, 4, 8):
            raise CheckpointError(f"{stored.file}: {module}.qzeros and .scales do not fit one another")
        unpack_one = partial(unpack, bits, (n_out, n_in), group)
        yield made_of(f"{module}.weight", parts, (n_out, n_in), unpack_one)


def _gptq_matrix(offset: int, bits: int, shape: tuple[int, int], group: int, parts: Parts) -> Tensor:
    n_out, n_in = shape
    numbers = arithmetic.bit_stream(parts["weight"].mT, bits, n_in)
    zeros = (arithmetic.bit_stream(parts["zeros"], bits, n_out).mT + offset) & (2**bits - 1)
    return _less_zeros(numbers, zeros, parts, group)


_AWQ_ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
"""Where in a word each of eight columns is."""


def _awq_matrix(bits: int, shape: tuple[int, int], group: int, parts: Parts) -> Tensor:
    def columns(words: Tensor) -> Tensor:
        found = arithmetic.bit_stream(words, bits, shape[0])
        return found.unflatten(1, (-1, 8))[..., _AWQ_ORDER].flatten(1)

    return _less_zeros(columns(parts["weight"]).mT, columns(parts["zeros"]).mT, parts, group)


def _less_zeros(numbers: Tensor, zeros: Tensor, parts: Parts, group: int) -> Tensor:
    """(number − zero) × scale, each of the group that a column belongs to."""
    scale, n_in = parts["scale"].float().mT, numbers.shape[1]
    order = parts.get("order")
    if order is None or not order.numel():
        order = torch.arange(n_in, device=numbers.device) // _width(n_in, scale.shape[1], group)
    if int(order.max()) >= scale.shape[1]:
        raise ValueError(f"{n_in} columns are of {int(order.max()) + 1} groups, and there are {scale.shape[1]} scales")
    order = order.long()
    return (numbers - zeros[:, order]).float() * scale[:, order]


def _width(columns: int, groups: int, said: int) -> int:
    """Columns of a group: as many as config.json says, or, of a layer with other groups, a power of two.

    Raises:
        ValueError: there are not as many groups as that gives.
    """
    said = said if said > 0 else columns
    for width in (said, columns, *(2**power for power in range(2, columns.bit_length()))):
        if -(-columns // width) == groups:
            return width
    raise ValueError(f"{columns} columns in groups of {said} need {-(-columns // said)} scales, and there are {groups}")
