"""Parameters that transformers' loader computes from stored tensors: computed so each time that they are read."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lens.model.hf_compat import WeightConverter
from moe_lens.model.loading.checkpoint import FLOATS, OpenFiles, StoredTensor

Sources = Mapping[str, Sequence[StoredTensor]]
"""What a conversion takes, by its patterns, in the order of their names."""


@dataclass(frozen=True)
class ConvertedTensor(StoredTensor):
    """One of the parameters that a conversion gives; `name` is the one that it has in the model."""

    sources: Sources = field(default_factory=dict)
    way: Any = None
    """A `WeightConverter`."""
    target: str = ""
    """The first of the parameters that it gives."""
    model: Any = None
    """It need hold no numbers."""

    def read(self, files: OpenFiles) -> Tensor:
        """The parameter, of all that the conversion gives."""
        return _convert(self.way, self.target, self.sources, self.model, lambda stored: stored.read(files))[self.name]

    @property
    def files(self) -> set[Path]:
        """The files that its sources are in."""
        return {file for some in self.sources.values() for stored in some for file in stored.files}

    @property
    def nbytes(self) -> int:
        """Bytes that its sources take in their files."""
        return sum(stored.nbytes for some in self.sources.values() for stored in some)


def converted(way: WeightConverter, target: str, sources: Sources, model: Any) -> dict[str, ConvertedTensor]:
    """The parameters that a conversion gives, by name; none where it cannot be done with these tensors.

    Args:
        way: Transformers' conversion.
        target: The first of the parameters.
        sources: What it takes.
        model: That has them; it need hold no numbers.
    """
    try:
        made = _convert(way, target, sources, model, _without_numbers)
    except (ValueError, RuntimeError, LookupError, AttributeError, TypeError):  # each operation checks in its own way
        return {}
    first = next(stored for some in sources.values() for stored in some)
    return {
        name: ConvertedTensor(first.file, name, tuple(value.shape), first.dtype, sources, way, target, model)
        for name, value in made.items()
    }


def _convert(
    way: WeightConverter, target: str, sources: Sources, model: Any, read: Callable[[StoredTensor], Tensor]
) -> dict[str, Tensor]:
    mine: Any = copy.deepcopy(way)  # it collects what it is given
    for pattern, some in sources.items():
        for stored in some:
            mine.add_tensor(target, stored.name, pattern, partial(read, stored))
    made = mine.convert(target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _without_numbers(stored: StoredTensor) -> Tensor:
    return torch.empty(stored.shape, dtype=FLOATS[stored.dtype], device="meta")
