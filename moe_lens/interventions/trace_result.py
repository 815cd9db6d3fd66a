"""`TraceResult`: what causal tracing found."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.checked import Natural, Seed
from moe_lens.errors import InputError
from moe_lens.interventions.coordinates import check_axes, read_axes
from moe_lens.reprs import Drawn, Summary
from moe_lens.resampling import bootstrap_all
from moe_lens.storage import believed, listed, load_tensors, save_tensors, whole_numbers


@dataclass(frozen=True, eq=False)
class SiteEffects(Summary):
    """Effects of restoring one kind of activation, draw by draw."""

    values: Float[Tensor, "draw *axes"]
    """Score of the restored run minus that of the corrupted one, in float64; 0 where nothing was restored."""
    axes: Mapping[str, tuple[Natural, ...]]
    """Coordinates by name of the axis; "size" is the number of experts of a coalition."""
    level: float = 0.95
    """Of the interval."""

    def __post_init__(self) -> None:
        check_axes("values of each draw", self.values.shape[1:], self.axes)
        if not 0 < self.level < 1:
            raise InputError(f"level is {self.level}; expected a number between 0 and 1")

    @property
    def mean(self) -> Float[Tensor, "*axes"]:
        """Over draws."""
        return self.values.mean(0)

    @cached_property
    def interval(self) -> tuple[Float[Tensor, "*axes"], Float[Tensor, "*axes"]]:
        """Of the mean over draws, by resampling them: low and high; NaN with fewer than `MIN_SOURCES` draws.

        It is about the noise alone, for this one prompt.
        """

        def mean(times: Float[Tensor, "resample draw"]) -> Float[Tensor, "resample *axes"]:
            return torch.einsum("rd,d...->r...", times, self.values) / len(self.values)

        ends = bootstrap_all(mean, torch.ones(len(self.values)), level=self.level)
        low, high = torch.full((2, *self.values.shape[1:]), torch.nan) if ends is None else ends
        return low, high

    def to_frame(self) -> pd.DataFrame:
        """One row per cell: a column for each axis, `effect`, `low`, `high`."""
        index = pd.MultiIndex.from_product(list(self.axes.values()), names=list(self.axes))
        low, high = self.interval
        columns = {"effect": self.mean, "low": low, "high": high}
        return index.to_frame(index=False).assign(**{name: v.flatten().numpy() for name, v in columns.items()})


@dataclass(frozen=True, eq=False, kw_only=True)
class TraceResult(Drawn):
    """Effects of every site on one prompt."""

    sites: Mapping[str, SiteEffects]
    """"resid", "attn" and "mlp" over layer and pos, "expert" over layer and expert, "coalition" over layer and size.

    Layers are those that have the site; a site that the family lacks is missing.
    """
    clean: float
    """Score of the clean run."""
    corrupted: Float[Tensor, " draw"]
    """Scores of the corrupted runs."""
    score: str
    """"probability" of the answer, or "logit difference" between answer and foil."""
    tokens: tuple[str, ...]
    """Of the prompt."""
    subject: tuple[int, ...]
    """Positions whose embeddings were corrupted."""
    at: tuple[int, ...]
    """Positions at which experts and coalitions were restored."""
    noise_std: float
    """Standard deviation of the noise, in units of the embeddings."""
    seed: Seed
    """Of the noise."""
    routing: str
    """"free" or "frozen"."""
    level: float
    """Of the intervals."""

    def __post_init__(self) -> None:
        for name, effects in self.sites.items():
            if self.corrupted.ndim != 1 or len(effects.values) != self.n:
                told = f"corrupted has shape {tuple(self.corrupted.shape)}, and {name} {len(effects.values)} draws"
                raise InputError(f"{told}; expected as many")
            if effects.level != self.level:
                raise InputError(f"level is {self.level}, and {effects.level} in {name}; expected the same")
        for name in ("subject", "at"):
            places = getattr(self, name)
            if any(not 0 <= place < len(self.tokens) for place in places) or len(set(places)) < len(places):
                raise InputError(f"{name} is {places}; expected positions of the {len(self.tokens)} tokens, each once")

    @property
    def n(self) -> int:
        """Draws of noise."""
        return len(self.corrupted)

    def __repr__(self) -> str:
        return (
            f"TraceResult({self.score} {self.clean:.3f}, corrupted {self.corrupted.mean().item():.3f}; "
            f"{self.n} draws; {', '.join(self.sites)})"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per site and cell: site, layer, pos, expert, size (where they apply), effect, low, high, n."""
        frames = [effects.to_frame().assign(site=site) for site, effects in self.sites.items()]
        whole = pd.concat(frames, ignore_index=True).assign(n=self.n)
        columns = ["site", "layer", "pos", "expert", "size", "effect", "low", "high", "n"]
        return whole.reindex(columns=columns).astype({name: "Int64" for name in ("pos", "expert", "size")})

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file."""
        tensors = {f"site.{name}": effects.values for name, effects in self.sites.items()}
        axes = {name: list(effects.axes.items()) for name, effects in self.sites.items()}
        header = {name: getattr(self, name) for name in _HEADER}
        save_tensors(path, "TraceResult", {**tensors, "corrupted": self.corrupted}, {**header, "axes": axes})

    @classmethod
    def load(cls, path: str | Path) -> "TraceResult":
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, broken or holds something else.
        """
        tensors, header = load_tensors(path, "TraceResult")
        with believed(path, "TraceResult"):
            fields = {name: header[name] for name in _HEADER}
            sites = {
                name: SiteEffects(tensors[f"site.{name}"], read_axes(axes), fields["level"])
                for name, axes in header["axes"].items()
            }
            fields |= {name: whole_numbers(name, fields[name], least=0) for name in ("subject", "at")}
            fields["tokens"] = listed("tokens", fields["tokens"])
            return cls(sites=sites, corrupted=tensors["corrupted"], **fields)


_HEADER = ("clean", "score", "tokens", "subject", "at", "noise_std", "seed", "routing", "level")
