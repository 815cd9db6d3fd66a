"""Sums kept apart by source, so that what is computed from them can be resampled by source."""

from collections.abc import Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor


class BySource:
    """One running sum per source. Counts stay exact integers; everything else is summed in float64."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, rows: Shaped[Tensor, " batch *shape"], sources: Sequence[str]) -> "BySource":
        """Add each row to the sum of its source."""
        wide = (rows.double() if rows.dtype.is_floating_point else rows.long()).cpu()
        for row, source in zip(wide, sources, strict=True):
            self._sums[source] = self._sums[source] + row if source in self._sums else row
        return self

    def merge(self, other: "BySource") -> "BySource":
        """Add the sums of another."""
        for source, value in other._sums.items():
            self._sums[source] = self._sums[source] + value if source in self._sums else value
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source seen, sorted."""
        return tuple(sorted(self._sums))

    def stacked(self) -> Shaped[Tensor, " source *shape"]:
        """The sums in the order of `sources`."""
        return torch.stack([self._sums[source] for source in self.sources])
