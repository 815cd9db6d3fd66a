"""The bias that routers like DeepSeek-V3's add to affinities for the choice alone, where experts are gone."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

_BIAS = "e_score_correction_bias"
"""Its name in the routers of all families that choose among groups, for which it decides before a hook can."""


def selection_bias(model: Any, layer: int) -> Tensor | None:
    """That of a layer's router, if it chooses among groups; None where hooks decide all that a bias could."""
    if not model.family.groups:
        return None
    return getattr(getattr(model._moe(layer), model.family.router), _BIAS, None)


@contextmanager
def no_bias(model: Any, gone: Mapping[int, Bool[Tensor, "*tokens n_experts"]]) -> Generator[None]:
    """A bias of −∞ for experts that are gone: without affinity they, or their group, might still be chosen for it.

    Args:
        model: A `HookedMoE`.
        gone: By layer: for all tokens, or for each of as many as the layer reads inside `with`.
    """
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for layer, experts in gone.items():
            if (bias := selection_bias(model, layer)) is not None:
                before.append((bias, bias.data))
                bias.data = bias.data.masked_fill(experts.to(bias.device), -torch.inf)
        yield
    finally:
        for bias, value in before:
            bias.data = value
