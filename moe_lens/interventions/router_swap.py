"""The routers of another checkpoint in a model: what changes if nothing else does?"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moe_lens.errors import InputError


@contextmanager
def swapped_routers(model: Any, other: Any) -> Generator[None]:
    """Give a model the routers of another one, all their parameters and buffers, as long as the context lasts.

    The bias for the choice is one of them, wherever a family keeps it.

    Args:
        model: A `HookedMoE`.
        other: One of the same shape; it is left as it is.

    Raises:
        InputError: Routers of other layers or shapes, or kept where they cannot be written.
    """
    if model.moe_layers != other.moe_layers:
        raise InputError(f"one model has experts in layers {model.moe_layers}, the other in {other.moe_layers}")
    pairs: list[tuple[Tensor, Tensor]] = []
    for layer in model.moe_layers:
        mine, theirs = (_tensors(each, layer) for each in (model, other))
        shapes = [{name: tuple(value.shape) for name, value in of.items()} for of in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise InputError(f"routers of layer {layer} have {shapes[0]} and {shapes[1]}; expected the same")
        pairs += [(mine[name], theirs[name]) for name in mine]
    kept = [value.detach().clone() for value, _ in pairs]
    try:
        _write([value for value, _ in pairs], [value for _, value in pairs])
        yield
    finally:
        _write([value for value, _ in pairs], kept)


def _tensors(model: Any, layer: int) -> dict[str, Tensor]:
    moe = model._moe(layer)
    router = getattr(moe, model.family.router)
    found = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    if model.family.bias:  # which some blocks hold themselves, beside the router (LFM2, MiniMax-M2)
        found |= {**dict(moe.named_parameters(recurse=False)), **dict(moe.named_buffers(recurse=False))}
    if any(value.is_meta for value in found.values()):
        raise InputError(f"the router of layer {layer} is kept on the disk; load the model into memory to swap it")
    return found


@torch.no_grad()
def _write(into: list[Tensor], values: list[Tensor]) -> None:
    for mine, value in zip(into, values, strict=True):
        mine.copy_(value)
