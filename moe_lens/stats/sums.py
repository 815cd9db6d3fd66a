"""What accumulators are made of: sums that know how to be merged, shared between processes and saved.

Whole numbers stay exact (int64); everything else is summed in float64. All live on the CPU.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from jaxtyping import Int, Shaped, UInt8
from torch import Tensor

from moe_lens.distributed import all_reduce, gather
from moe_lens.errors import several


class Aggregate(ABC):
    """A piece of an accumulator's state."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Take in what another of the same kind has seen."""

    @abstractmethod
    def all_reduce(self) -> None:
        """Take in what every other process has seen."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Everything it knows; empty if it has seen nothing."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state_dict` was taken from."""


class Total(Aggregate):
    """One running sum of tensors of one shape."""

    def __init__(self) -> None:
        self._value: Tensor | None = None

    @property
    def seen(self) -> bool:
        """Whether anything was added."""
        return self._value is not None

    @property
    def value(self) -> Shaped[Tensor, "*shape"]:
        """The sum so far."""
        assert self._value is not None, "asked for a sum of nothing"
        return self._value

    def add(self, value: Shaped[Tensor, "*shape"]) -> None:
        """Add to the sum."""
        wide = to_wide_cpu(value)
        self._value = wide.clone() if self._value is None else self._value + wide

    def merge(self, other: Self) -> None:
        """Add another's sum."""
        if other._value is not None:
            self.add(other._value)

    def all_reduce(self) -> None:
        """Add the sums of every other process."""
        known = [found for found in gather(_layout(self._value)) if found]
        if known:
            mine = torch.zeros(known[0][0], dtype=known[0][1]) if self._value is None else self._value
            self._value = all_reduce(mine)

    def state_dict(self) -> dict[str, Tensor]:
        """The sum."""
        return {} if self._value is None else {"sum": self._value}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the place of the sum."""
        self._value = state["sum"].clone() if "sum" in state else None


class Maximum(Aggregate):
    """The elementwise greatest of tensors of one shape."""

    def __init__(self, shape: Sequence[int]):
        self.value = torch.full(tuple(shape), -torch.inf, dtype=torch.float64)

    def add(self, value: Shaped[Tensor, "*shape"]) -> None:
        """Take in a tensor."""
        self.value = torch.maximum(self.value, value.double().cpu())

    def merge(self, other: Self) -> None:
        """Take in another's maximum."""
        self.add(other.value)

    def all_reduce(self) -> None:
        """Take in those of every other process."""
        self.value = all_reduce(self.value, "max")

    def state_dict(self) -> dict[str, Tensor]:
        """The maximum."""
        return {"max": self.value}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the place of the maximum."""
        self.value = state["max"].clone()


class BySource(Aggregate):
    """One running sum per source, so that what is computed from them can be resampled by source."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, rows: Shaped[Tensor, " batch *shape"], sources: Sequence[str]) -> Self:
        """Add each row to the sum of its source."""
        for row, source in zip(to_wide_cpu(rows), several(sources, "sources"), strict=True):
            self._sums[source] = self._sums[source] + row if source in self._sums else row.clone()
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source seen, sorted."""
        return tuple(sorted(self._sums))

    def stacked(self) -> Shaped[Tensor, " source *shape"]:
        """The sums in the order of `sources`."""
        return torch.stack([self._sums[source] for source in self.sources])

    def merge(self, other: Self) -> None:
        """Add the sums of another."""
        for source, value in other._sums.items():
            self._sums[source] = self._sums[source] + value if source in self._sums else value

    def all_reduce(self) -> None:
        """Add the sums of every other process; which sources there are is agreed on first."""
        found = gather((self.sources, _layout(next(iter(self._sums.values()), None))))
        names = sorted({source for sources, _ in found for source in sources})
        if not names:
            return
        shape, dtype = next(layout for _, layout in found if layout)
        sums = torch.zeros(len(names), *shape, dtype=dtype)
        for i, source in enumerate(names):
            if source in self._sums:
                sums[i] = self._sums[source]
        self._sums = dict(zip(names, all_reduce(sums), strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, and the names of their sources as bytes."""
        return {"sums": self.stacked(), "sources": to_bytes(self.sources)} if self._sums else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the place of the sums."""
        self._sums = dict(zip(from_bytes(state["sources"]), state["sums"].clone(), strict=True)) if state else {}


class Counts(Aggregate):
    """How often each key was seen: memory grows with the number of different keys, not with how many are counted."""

    COMPACT_AT = 2**18
    """Waiting keys are merged into the sorted ones when there are so many, or as many as there are sorted ones."""

    def __init__(self) -> None:
        self._keys = torch.empty(0, dtype=torch.long)
        self._counts = torch.empty(0, dtype=torch.long)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, keys: Int[Tensor, " some"]) -> None:
        """Count keys, which may repeat."""
        self._wait(*keys.cpu().long().unique(return_counts=True))

    def merge(self, other: Self) -> None:
        """Add another's counts."""
        self._wait(*other.compact())

    def all_reduce(self) -> None:
        """Add the counts of every other process."""
        found = gather(self.compact())
        self._keys, self._counts = summed([pair[0] for pair in found], [pair[1] for pair in found])

    def _wait(self, keys: Tensor, counts: Tensor) -> None:
        self._waiting.append((keys, counts))
        if sum(len(waiting) for waiting, _ in self._waiting) > max(self.COMPACT_AT, len(self._keys)):
            self.compact()

    def compact(self) -> tuple[Int[Tensor, " key"], Int[Tensor, " key"]]:
        """The keys seen, ascending, and how often each was."""
        if self._waiting:
            keys, counts = zip((self._keys, self._counts), *self._waiting, strict=True)
            self._keys, self._counts = summed(keys, counts)
            self._waiting = []
        return self._keys, self._counts

    def state_dict(self) -> dict[str, Tensor]:
        """Keys and counts."""
        keys, counts = self.compact()
        return {"keys": keys, "counts": counts} if len(keys) else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the place of the counts."""
        self._waiting = []
        self._keys, self._counts = (
            state[name].clone() if state else torch.empty(0, dtype=torch.long) for name in ("keys", "counts")
        )


def summed(keys: Sequence[Tensor], counts: Sequence[Tensor]) -> tuple[Int[Tensor, " key"], Int[Tensor, " key"]]:
    """Keys, ascending, each once, and their counts, added."""
    unique, place = torch.cat(list(keys)).unique(return_inverse=True)
    return unique, torch.zeros_like(unique).index_add_(0, place, torch.cat(list(counts)))


def to_wide_cpu(value: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Float64 or int64, on the CPU."""
    return value.detach().to("cpu", torch.float64 if value.dtype.is_floating_point else torch.long)


def to_bytes(value: Any) -> UInt8[Tensor, " bytes"]:
    """Anything JSON can hold, as a tensor, so that a state is tensors alone."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def from_bytes(value: UInt8[Tensor, " bytes"]) -> Any:
    """The inverse of `to_bytes`."""
    return json.loads(bytes(value.tolist()))


def _layout(value: Tensor | None) -> tuple[tuple[int, ...], torch.dtype] | None:
    return None if value is None else (tuple(value.shape), value.dtype)
