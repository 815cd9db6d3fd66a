"""Batches of routing made up for tests."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lens.routing import Routing
from moe_lens.stats import RoutedBatch


def routed(
    indices: Tensor,
    counted: Tensor | None = None,
    sources: Sequence[str] = (),
    *,
    n_experts: int,
    layers: Sequence[int] | None = None,
    weights: Tensor | None = None,
    logits: Tensor | None = None,
    **about: Any,
) -> RoutedBatch:
    routing = Routing(
        layers=tuple(range(len(indices)) if layers is None else layers),
        n_experts=n_experts,
        indices=indices,
        weights=torch.ones(indices.shape) if weights is None else weights,
        logits=logits,
        probs=None if logits is None else logits.softmax(-1),
    )
    return RoutedBatch(routing=routing, counted=counted, sources=sources, **about)


def random_batch(
    generator: torch.Generator,
    *,
    layers: Sequence[int] = (1, 3),
    n_experts: int = 5,
    top_k: int = 2,
    vocabulary: int = 7,
    sources: Sequence[str] = ("a", "b", "c"),
    rows: int | None = None,
    width: int | None = None,
) -> RoutedBatch:
    """Routing chosen by random logits, some tokens not counted, sources drawn at random."""

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rows, width = rows or number(1, 4), width or number(1, 6)
    logits = torch.randn(len(layers), rows, width, n_experts, generator=generator)
    probs = logits.softmax(-1)
    weights, indices = probs.topk(top_k)
    counted = torch.rand(rows, width, generator=generator) < 0.7
    counted[0, 0] = True
    return routed(
        indices,
        counted,
        [sources[number(0, len(sources))] for _ in range(rows)],
        n_experts=n_experts,
        layers=layers,
        weights=weights,
        logits=logits,
        tokens=torch.randint(vocabulary, (rows, width), generator=generator),
        predicted=torch.randint(vocabulary, (rows, width), generator=generator),
    )
