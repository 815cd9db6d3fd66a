"""The noise of causal tracing: normal, added to what `hook_embed` holds of a subject, and how large that is to be."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

EMBEDDING = "hook_embed"


def embedding_deviation(model: Any, at_once: int = 8192) -> float:
    """Standard deviation of all numbers that `hook_embed` holds of the whole vocabulary."""
    matrix = model.W_E
    sums = torch.zeros(2, dtype=torch.float64)

    def add(embeddings: Tensor, hook: Any) -> None:  # noqa: ARG001
        wide = embeddings.double()
        sums.add_(torch.stack([wide.sum(), wide.square().sum()]).cpu())

    with model.hooks(fwd_hooks=[(EMBEDDING, add)]):
        for ids in torch.arange(len(matrix), device=matrix.device).split(at_once):
            model.embed(ids[None])
    total, squares = sums.tolist()
    return math.sqrt((squares - total**2 / matrix.numel()) / (matrix.numel() - 1))


def noisy(positions: Sequence[int], std: float, seed: int) -> Callable[..., Tensor]:
    """A hook that adds seeded noise to the embeddings at some positions, another draw for each item."""

    def corrupt(embeddings: Tensor, hook: Any) -> Tensor:  # noqa: ARG001  # TransformerLens passes hook by name
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(len(embeddings), len(positions), embeddings.shape[-1], generator=generator) * std
        embeddings = embeddings.clone()
        embeddings[:, list(positions)] += drawn.to(embeddings)
        return embeddings

    return corrupt
