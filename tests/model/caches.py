"""Caches of the tiny families in float64, and how near two values have to be."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from moe_lens.model.cache.moe_cache import MoECache
from tests.families import CONFIGS
from tests.wrapped import Case, wrapped

F64 = 1e-14
"""Relative to the largest value: fifty roundings in float64."""

FAMILIES = list(CONFIGS)
SHARED = ["deepseek", "qwen2_moe"]  # with a dense layer 0 and shared experts


@cache
def full(name: str) -> tuple[Case, Tensor, MoECache]:
    """A family in float64, its logits and a cache of everything quiet. Not to be changed."""
    case = wrapped(name, torch.float64)
    with torch.no_grad():
        logits, kept = case.model.run_with_cache(case.tokens, names_filter=quiet)
    return case, logits, kept


def quiet(name: str) -> bool:
    """All but attention's insides, which would select eager attention and change the last bits."""
    return ".attn." not in name


def fresh(name: str, tokens: Tensor | None = None, names_filter: Any = quiet, **options: Any) -> MoECache:
    """A new cache, which a test may change."""
    case = wrapped(name, torch.float64)
    with torch.no_grad():
        given = case.tokens if tokens is None else tokens
        return case.model.run_with_cache(given, names_filter=names_filter, **options)[1]


def close(one: Tensor, other: Tensor, relative: float = F64) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= relative * other.abs().max())


def same(one: Tensor, other: Tensor) -> bool:
    return close(one, other) if one.is_floating_point() else torch.equal(one, other)
