"""What an attribution gives: a value for each expert or rank of each layer, and for each position."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.checked import Natural
from moe_lens.errors import InputError
from moe_lens.reprs import Drawn
from moe_lens.storage import believed, load_tensors, save_tensors, whole_numbers

Unit = Literal["expert", "rank"]
_HEADER = ("method", "routing", "baseline", "metric", "clean", "unit", "layers")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ExpertAttribution(Drawn):
    """How much of a metric each expert accounts for: metric(run) − metric(run without the expert's contribution).

    Positive: the expert raises the metric; what lowers a loss is negative. In the metric's own unit, with the metric's
    own weights: if it is a mean over tokens, values are shares of that mean.
    """

    method: str
    """How the values were found; see `expert_attribution`."""
    routing: str
    """`"free"`, `"frozen"`, or `"free − frozen"`: the re-routing effect."""
    baseline: str
    """What the contribution is compared with: `"zero"` or `"mean"`."""
    metric: str
    """Name of the metric."""
    clean: float
    """The metric of the run as it is."""
    unit: Unit
    """What the second axis counts: experts, or ranks by routing weight."""
    layers: tuple[Natural, ...]
    """The layers in the model that the first axis stands for."""
    values: Float[Tensor, "layer unit *where"]
    """The attributions; zero where nothing was routed. `where` is [batch, pos], or nothing if all positions are one."""
    count: Int[Tensor, "layer unit *where"]
    """How many (token, slot) pairs stand behind each value."""
    difference: Float[Tensor, " layer"] | None = None
    """Metric of the run minus that of the run with all selected contributions of the layer at their baseline at once:
    what integrated gradients of a layer sum to. None for other methods."""

    def __post_init__(self) -> None:
        if (
            self.values.shape != self.count.shape
            or len(self.values) != len(self.layers)
            or self.values.ndim not in (2, 4)
        ):
            shapes = tuple(self.values.shape), tuple(self.count.shape)
            raise InputError(
                f"values and count have shapes {shapes}; expected both [layer, {self.unit}, batch, pos] or [layer, "
                f"{self.unit}] with {len(self.layers)} layers"
            )
        if len(set(self.layers)) < len(self.layers):
            raise InputError(f"layers are {self.layers}; expected each once")

    def __repr__(self) -> str:
        shape = " × ".join(map(str, self.values.shape))
        return f"ExpertAttribution({self.method}, {self.routing}, of {self.metric}, by {self.unit}: {shape})"

    def total(self) -> Float[Tensor, "layer unit"]:
        """Sums over batch and positions. Knock-outs of all positions at once need not be the sum of single ones."""
        return self.values.flatten(2).sum(-1) if self.values.ndim > 2 else self.values

    def used(self) -> Int[Tensor, "layer unit"]:
        """How many (token, slot) pairs each expert or rank has in all; the active ones have more than 0."""
        return self.count.flatten(2).sum(-1) if self.count.ndim > 2 else self.count

    def rerouting(self, frozen: "ExpertAttribution") -> "ExpertAttribution":
        """Free − frozen: what comes of the layers behind choosing other experts.

        Args:
            frozen: the same attribution with `routing="frozen"`.

        Raises:
            InputError: the two are not free and frozen, or differ in anything else.
        """
        same = ("method", "baseline", "metric", "unit", "layers")
        for name in same:
            if getattr(self, name) != getattr(frozen, name):
                raise InputError(
                    f"{name} is {getattr(self, name)!r} here and {getattr(frozen, name)!r} there; expected the same"
                )
        if (self.routing, frozen.routing) != ("free", "frozen") or self.values.shape != frozen.values.shape:
            raise InputError(
                f"got routing {self.routing!r} {tuple(self.values.shape)} and {frozen.routing!r} "
                f"{tuple(frozen.values.shape)}; expected 'free' and 'frozen' of one shape"
            )
        if not math.isclose(self.clean, frozen.clean, rel_tol=1e-5) or not torch.equal(self.count, frozen.count):
            slots = int(self.count.sum()), int(frozen.count.sum())
            raise InputError(
                f"the two are of other inputs or selections: the metric is {self.clean:.6g} here and "
                f"{frozen.clean:.6g} there, on {slots[0]} and {slots[1]} slots; expected the same"
            )
        return replace(self, routing="free − frozen", values=self.values - frozen.values, difference=None)

    def to_frame(self) -> pd.DataFrame:
        """A row per layer, expert or rank (and batch and pos) that something was routed to: value, count."""
        at = np.nonzero(self.count.numpy())
        columns = {"layer": np.asarray(self.layers)[at[0]], self.unit: at[1]}
        if len(at) == 4:
            columns |= {"batch": at[2], "pos": at[3]}
        return pd.DataFrame({**columns, "value": self.values.numpy()[at], "count": self.count.numpy()[at]})

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file."""
        tensors = {"values": self.values, "count": self.count}
        if self.difference is not None:
            tensors["difference"] = self.difference
        save_tensors(path, "ExpertAttribution", tensors, {name: getattr(self, name) for name in _HEADER})

    @classmethod
    def load(cls, path: str | Path) -> "ExpertAttribution":
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, broken or holds something else.
        """
        tensors, header = load_tensors(path, "ExpertAttribution")
        with believed(path, "ExpertAttribution"):
            fields: dict[str, Any] = {name: header[name] for name in _HEADER} | tensors
            return cls(**{**fields, "layers": whole_numbers("layers", fields["layers"], least=0)})
