"""Texts that are longer than what a model reads at a time, in pieces, and rows of different lengths as one batch."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def pieces(ids: Sequence[int], context: int, opening: Sequence[int] = ()) -> Iterator[tuple[int, list[int]]]:
    """Where in `ids` each piece begins, and the piece: at most `context` ids, `opening` put before each.

    Args:
        ids: of a text, without what opens it.
        context: the greatest length of a piece, what opens it included.
        opening: what the tokenizer puts before a text, such as BOS.
    """
    room = max(1, context - len(opening))
    for start in range(0, len(ids), room):
        yield start, [*opening, *ids[start : start + room]]


def pad(rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Rows of different lengths as one batch, padded on the right, and a mask that is true at real tokens."""
    width = max(map(len, rows))
    tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in rows])  # any id will do: it is masked
    return tokens, torch.arange(width) < torch.tensor(list(map(len, rows)))[:, None]
