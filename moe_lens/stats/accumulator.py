"""`Accumulator`: what every statistic that reads a corpus can do; and `Result`, what it gives."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import pandas as pd
from torch import Tensor

from moe_lens.distributed import world_size
from moe_lens.errors import InputError
from moe_lens.reprs import Summary
from moe_lens.stats.sums import Aggregate, from_bytes, to_bytes
from moe_lens.storage import believed, load_tensors, save_tensors

ResultT = TypeVar("ResultT", bound="Result")


class Accumulator(ABC, Generic[ResultT]):
    """Sums over batches: merging any parts of a corpus, in any order and grouping, gives what the whole would give.

    Counts are exact; sums of other numbers agree to the rounding of float64. Memory does not depend on the number of
    tokens: what is kept by source grows with the number of sources, and counts of a vocabulary with the vocabulary.
    """

    def __init__(self, about: Mapping[str, Any], parts: Mapping[str, Aggregate]):
        self._about = {"kind": type(self).__name__, **about}
        self._parts = dict(parts)
        self._shared = False

    @abstractmethod
    def update(self, *args: Any, **kwargs: Any) -> Self:
        """Count a batch."""

    @abstractmethod
    def result(self) -> ResultT:
        """What was seen so far, frozen.

        Raises:
            InputError: nothing was counted.
        """

    def merge(self, other: Self) -> Self:
        """Add what another accumulator of the same kind has seen; the other is left as it is.

        Raises:
            InputError: the two do not count the same things.
        """
        self._check(other._about, "merge it with")
        for name, part in self._parts.items():
            part.merge(other._parts[name])
        return self

    def all_reduce(self) -> Self:
        """Add what the accumulators of all other processes have seen, so that each holds the whole; once, at the end.

        Without `torch.distributed`, or with one process, nothing happens.

        Raises:
            InputError: it was done before: everything would be counted once more for each process.
        """
        if self._shared:
            raise InputError("this accumulator already holds the sums of all processes; all_reduce once, at the end")
        if world_size() > 1:
            for part in self._parts.values():
                part.all_reduce()
            self._shared = True
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Everything it knows, as tensors by name: to be saved, and to go on from."""
        state = {
            f"{name}.{key}": value for name, part in self._parts.items() for key, value in part.state_dict().items()
        }
        return {"about": to_bytes(self._about), **state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Self:
        """Go on from what `state_dict` gave; what was counted here before is forgotten.

        Raises:
            InputError: the state is that of another kind of accumulator.
        """
        self._check(from_bytes(state["about"]), "load the state of")
        for name, part in self._parts.items():
            prefix = f"{name}."
            part.load_state_dict({key[len(prefix) :]: state[key] for key in state if key.startswith(prefix)})
        return self

    def _check(self, other: Mapping[str, Any], what: str) -> None:
        # Through JSON, as the other may come from there: tuples become lists.
        mine = from_bytes(to_bytes(self._about))
        theirs = from_bytes(to_bytes(dict(other)))
        different = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        if different:
            told = "; ".join(f"{key} is {mine.get(key)} here and {theirs.get(key)} there" for key in different)
            raise InputError(f"cannot {what} an accumulator that counts something else: {told}")


class Result(Summary, ABC):
    """A frozen dataclass of tensors and plain values that can be written and read."""

    @abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """The numbers, as a table."""

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file; `to_frame().to_parquet(…)` writes the table.

        Raises:
            InputError: the file cannot be written there.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # pyright: ignore[reportArgumentType]
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in values.items() if name not in tensors}
        save_tensors(path, type(self).__name__, tensors, {"fields": plain})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, broken or holds something else.
        """
        tensors, header = load_tensors(path, cls.__name__)
        with believed(path, cls.__name__):
            return cls(**tensors, **{name: _frozen(value) for name, value in header["fields"].items()})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
