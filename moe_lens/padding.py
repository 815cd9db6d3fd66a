"""Rows of different lengths as one batch."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def pad(rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Rows of different lengths as one batch, padded on the right, and a mask that is true at real tokens."""
    width = max(map(len, rows))
    tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in rows])  # any id will do: it is masked
    return tokens, torch.arange(width) < torch.tensor(list(map(len, rows)))[:, None]
