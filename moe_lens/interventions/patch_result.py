"""`PatchResult`: what patching found."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from moe_lens.checked import Natural, Positive
from moe_lens.interventions.coordinates import check_axes, read_axes
from moe_lens.reprs import Drawn
from moe_lens.storage import believed, listed, load_tensors, save_tensors


@dataclass(frozen=True, eq=False, kw_only=True)
class PatchResult(Drawn):
    """The metric after patching, for every cell of the sweep; a cell in which nothing changes holds the base's."""

    values: Float[Tensor, "..."]
    """The metric, in float64, along `axes`."""
    axes: Mapping[str, tuple[Natural, ...]]
    """Coordinates by name of the axis, in the order of the values' axes; "pos" counts along the input's axis."""
    site: str
    """What was patched."""
    metric: str
    """What was measured."""
    direction: str
    """"denoising" (clean into corrupted) or "noising" (corrupted into clean)."""
    routing: str
    """"free" or "frozen"."""
    clean: float
    """The metric of the clean run."""
    corrupted: float
    """The metric of the corrupted run."""
    n: Positive
    """Pairs of clean and corrupted texts that the metric goes over."""
    tokens: tuple[str, ...] = ()
    """Of the base, as text, if there is one pair and a tokenizer."""

    def __post_init__(self) -> None:
        check_axes("values", self.values.shape, self.axes)

    def __repr__(self) -> str:
        sizes = " × ".join(f"{len(at)} {name}" for name, at in self.axes.items())
        return f"PatchResult({self.site}, {self.direction}, {self.metric}: {sizes}, n = {self.n})"

    @property
    def effect(self) -> Float[Tensor, "..."]:
        """How far patching leads from the base to the source: 0 changes nothing, 1 is the source's metric.

        Not bounded; not finite if both runs have the same metric.
        """
        base, source = self.corrupted, self.clean
        if self.direction == "noising":
            base, source = source, base
        return (self.values - base) / (source - base)

    def to_frame(self) -> pd.DataFrame:
        """One row per cell: a column for each axis, `value` (the metric) and `effect`."""
        index = pd.MultiIndex.from_product(list(self.axes.values()), names=list(self.axes))
        frame = index.to_frame(index=False)
        return frame.assign(value=self.values.flatten().numpy(), effect=self.effect.flatten().numpy())

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file."""
        header = {name: getattr(self, name) for name in _HEADER}
        save_tensors(path, "PatchResult", {"values": self.values}, {**header, "axes": list(self.axes.items())})

    @classmethod
    def load(cls, path: str | Path) -> "PatchResult":
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, broken or holds something else.
        """
        tensors, header = load_tensors(path, "PatchResult")
        with believed(path, "PatchResult"):
            fields = {name: header[name] for name in _HEADER}
            fields |= {"tokens": listed("tokens", fields["tokens"]), "axes": read_axes(header["axes"])}
            return cls(**fields, values=tensors["values"])


_HEADER = ("site", "metric", "direction", "routing", "clean", "corrupted", "n", "tokens")
