"""Smaller models, made by hand: the same transformers class with fewer experts and slices of the parameters."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_lens.pruning import Plan
from tests.families import build

COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")
CHANGES = {"deepseek_v2, groups": {"n_group": 2, "topk_group": 1}, "deepseek_v3": {"n_group": 2, "topk_group": 2}}
"""Groups large enough that half of each will do."""


def whole(name: str, **changes: Any) -> PreTrainedModel:
    """The model that is pruned."""
    return build(name, **{**CHANGES.get(name, {}), **changes})


def by_hand(name: str, kept: Mapping[int, tuple[int, ...]], top_k: int) -> PreTrainedModel:
    """A plain model of `whole(name)` whose layers have the kept experts alone."""
    model = whole(name)
    config: Any = copy.deepcopy(model.config)
    count = len(next(iter(kept.values())))
    for key in COUNTS:
        if hasattr(config, key):
            setattr(config, key, count)
    config.num_experts_per_tok = top_k
    smaller = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for (key, target), (other, value) in zip(
            [*smaller.named_parameters(), *smaller.named_buffers()],
            [*model.named_parameters(), *model.named_buffers()],
            strict=True,
        ):
            assert key == other
            if target.shape != value.shape:
                value = value[list(kept[int(key.split(".")[2])])]
            target.copy_(value)
    return smaller


def make_plan(model: Any, kept: Mapping[int, tuple[int, ...]], top_k: int) -> Plan:
    """A plan that keeps what it is told."""
    from moe_lens.model.cache.identity import identity

    values = torch.zeros(len(kept), model.n_experts)
    for row, experts in zip(values, kept.values(), strict=True):
        row[list(experts)] = 1
    return Plan(
        model=identity(model), layers=tuple(kept), kept=tuple(kept.values()), top_k=top_k, values=values, method="hand"
    )
