"""Packing: windows of text one after another in one row, with no attention from one to the next."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from moe_lens.checked import Positive, checked
from moe_lens.data.windows import Window


@checked
@dataclass(frozen=True, eq=False)
class Packing:
    """How the rows of a batch lie one after another in fewer, fuller rows that the model reads.

    Positions start again with every window, which is what tells transformers that no attention reaches across.
    """

    tokens: Int[Tensor, "row column"]
    positions: Int[Tensor, "row column"]
    at: Int[Tensor, "batch pos"]
    """Where each token of the batch lies, counting row by row; 0 for padding."""

    def unpack(self, values: Shaped[Tensor, "row column *rest"]) -> Shaped[Tensor, "batch pos *rest"]:
        """Values of packed tokens as values of the batch; those of padding mean nothing."""
        return values.flatten(0, 1)[self.at.to(values.device)]

    def pack(
        self, values: Shaped[Tensor, "batch pos *rest"], mask: Bool[Tensor, "batch pos"]
    ) -> Shaped[Tensor, "row column *rest"]:
        """The inverse of `unpack` at real tokens; 0 elsewhere."""
        packed = values.new_zeros(self.tokens.numel(), *values.shape[2:])
        packed[self.at[mask].to(values.device)] = values[mask.to(values.device)]
        return packed.view(*self.tokens.shape, *values.shape[2:])


@checked
def packed_rows(rows: Sequence[Window], columns: Positive, width: Positive) -> Packing:
    """Lay windows one after another: each where the row that was begun last has room; otherwise a new row begins.

    Args:
        rows: Windows of at most `columns` tokens, one a row of the batch.
        columns: The greatest length of a packed row.
        width: Columns of the batch.
    """
    starts, row, column = [], 0, 0
    for window in rows:
        if column + len(window.ids) > columns:
            row, column = row + 1, 0
        starts.append((row, column))
        column += len(window.ids)
    columns = min(columns, max(at + len(window.ids) for (_, at), window in zip(starts, rows, strict=True)))
    tokens = torch.zeros(row + 1, columns, dtype=torch.long)
    # What is left of a row is a document of its own: its positions start at 0 too.
    positions = torch.arange(columns).repeat(row + 1, 1)
    at = torch.zeros(len(rows), width, dtype=torch.long)
    for number, ((row, column), window) in enumerate(zip(starts, rows, strict=True)):
        n = len(window.ids)
        tokens[row, column : column + n] = torch.tensor(window.ids)
        positions[row, column : column + n] = torch.arange(n)
        positions[row, column + n :] = torch.arange(columns - column - n)
        at[number, :n] = row * columns + column + torch.arange(n)
    return Packing(tokens, positions, at)
