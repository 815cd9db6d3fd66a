"""Cells of a `LensResult` at one position, for tables, texts and curves."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_lens.errors import InputError
from moe_lens.lenses import LensResult

NOT_SELECTED = "not selected"
"""What a cell says that names experts none of which the token selected."""


@dataclass(frozen=True)
class Cell:
    """What was read in one layer of one sum."""

    row: int
    column: int
    tokens: Sequence[int]
    logits: Sequence[float]
    probs: Sequence[float]
    expert: int | None
    weight: float


def place(result: LensResult, position: int, batch: int) -> tuple[int, int]:
    """Where a position, or a negative one of those that were read, stands on the axes (batch, pos).

    Raises:
        InputError: it was not read.
    """
    if -len(result.positions) <= position < 0:
        position = result.positions[position]
    if position not in result.positions:
        raise InputError(f"position {position} was not read; the result has {list(result.positions)}")
    rows = result.top_tokens.shape[2]
    if not 0 <= batch < rows:
        raise InputError(f"there is no row {batch} of the batch; the result has 0 to {rows - 1}")
    return batch, result.positions.index(position)


def cells(result: LensResult, position: int, batch: int) -> Iterator[Cell]:
    """What was read."""
    where = place(result, position, batch)
    for i in range(len(result.layers)):
        for j in range(len(result.sums)):
            tokens = result.top_tokens[i, j, *where].tolist()
            if tokens[0] < 0:
                continue
            expert, weight = int(result.expert[i, j, *where]), float(result.weight[i, j, *where])
            logits, probs = result.top_logits[i, j, *where].tolist(), result.top_probs[i, j, *where].tolist()
            yield Cell(i, j, tokens, logits, probs, None if expert < 0 else expert, weight)


def unselected(result: LensResult, position: int, batch: int) -> Iterator[tuple[int, int]]:
    """Row and column of sums that name experts none of which the token selected."""
    where = place(result, position, batch)
    best = result.top_tokens[:, :, *where, 0]
    if bool((best < 0).all()):  # padding
        return
    for i, layer in enumerate(result.layers):
        for j, which in enumerate(result.sums):
            if which.experts and layer not in result.dense and best[i, j] < 0:
                yield i, j
