"""A standing committee: few experts that carry most of the routing weight of every domain (arXiv 2601.03425).

Members are picked on one half of the sources and what they carry is measured on the other, and the other way round:
experts that are picked for their weight carry more of it where they were picked than elsewhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.checked import Natural, Positive, Seed
from moe_lens.errors import InputError
from moe_lens.resampling import bootstrap_all
from moe_lens.stats.accumulator import Result
from moe_lens.stats.parallel_sources import balanced_halves
from moe_lens.stats.routing_stats import RoutingResult

MOST = 0.5
"""Share of the weight that a committee must carry in every domain."""


@dataclass(frozen=True, eq=False)
class StandingCommittee(Result):
    """What committees of as many experts as a token has active carry, in sources on which they were not picked."""

    domains: tuple[str, ...]
    layers: tuple[Natural, ...]
    size: Positive
    n_experts: Positive
    domain: Int[Tensor, " source"]
    weight: Float[Tensor, "source layer"]
    """All routing weight of a source."""
    shared: Float[Tensor, "source layer"]
    """That of the experts with the greatest mean share over domains."""
    own: Float[Tensor, "source layer"]
    """That of the experts with the greatest share of the source's own domain."""
    members: Bool[Tensor, "layer n_experts"]
    """Picked on all sources."""
    half: Float[Tensor, " layer"]
    """Experts that it takes, in the order of their mean share, to carry half of the weight of every domain."""
    jaccard: Float[Tensor, " layer"]
    """Of the experts with the greatest share of two domains, those of both over those of either; mean over pairs."""

    @property
    def uniform(self) -> float:
        """What it would carry if all experts were alike."""
        return self.size / self.n_experts

    @property
    def uniform_jaccard(self) -> float:
        """`jaccard` of two sets of experts drawn at random: at the mean number that they share, size² / n_experts."""
        both = self.size**2 / self.n_experts
        return both / (2 * self.size - both)

    def to_frame(self, control: "StandingCommittee | None" = None) -> pd.DataFrame:
        """A row per layer and domain.

        Columns: size (experts of the committee), mass (share of the domain's routing weight that it carries), low, high
        (its interval over sources, 95 % for all domains of a layer together), own (what as many experts picked for this
        domain carry), uniform; and with a control: control (what its own committee carries), beyond (mass minus that),
        beyond_low, beyond_high (paired by source).

        Raises:
            InputError: The control read other sources.
        """
        if control is not None and (control.domains, control.layers) != (self.domains, self.layers):
            raise InputError("the control is of other domains or layers; expected the same texts and model")
        frames = []
        for number, domain in enumerate(self.domains):
            at = self.domain == number
            mine = _Share(self.shared[at], self.weight[at])
            level = 1 - 0.05 / len(self.domains)
            columns: dict[str, Tensor] = dict(zip(("mass", "low", "high"), mine.with_ends(None, level), strict=True))
            columns["own"] = _Share(self.own[at], self.weight[at]).of_all()
            if control is not None:
                theirs = _Share(control.shared[at], control.weight[at])
                columns["control"] = theirs.of_all()
                beyond = mine.with_ends(theirs, level)
                columns |= dict(zip(("beyond", "beyond_low", "beyond_high"), beyond, strict=True))
            frame = pd.DataFrame({name: value.numpy() for name, value in columns.items()})
            about = {"size": self.size, "uniform": self.uniform, "sources": int(at.sum())}
            frames.append(frame.assign(layer=list(self.layers), domain=domain, **about))
        frame = pd.concat(frames, ignore_index=True)
        first = ["layer", "domain", "size"]
        return frame.reindex(columns=[*first, *(name for name in frame.columns if name not in first)])

    def per_layer(self, control: "StandingCommittee | None" = None) -> pd.DataFrame:
        """A row per layer: members, least (mass, in the domain where it is least), half, jaccard, finding.

        With a control also control_least, control_half and control_jaccard. The finding is "a standing committee" if
        the interval of mass lies above one half in every domain, and above the control's mass in every domain.
        """
        frame = self.to_frame(control)
        rows = []
        for number, (layer, of) in enumerate(frame.groupby("layer", sort=False)):
            row = {"layer": layer, "size": self.size, "least": of["mass"].min(), "half": float(self.half[number])}
            row["jaccard"] = float(self.jaccard[number])
            row["members"] = " ".join(map(str, self.members[number].nonzero()[:, 0].tolist()))
            if control is not None:
                row["control_least"] = of["control"].min()
                row |= {f"control_{name}": float(getattr(control, name)[number]) for name in ("half", "jaccard")}
            rows.append({**row, "finding": _finding(of)})
        return pd.DataFrame(rows)


class _Share(NamedTuple):
    """A ratio of sums over the sources of a domain."""

    above: Float[Tensor, "source layer"]
    below: Float[Tensor, "source layer"]

    def of(self, times: Float[Tensor, "resample source"]) -> Float[Tensor, "resample layer"]:
        return (times @ self.above) / (times @ self.below)

    def of_all(self) -> Float[Tensor, " layer"]:
        return self.above.sum(0) / self.below.sum(0)

    def with_ends(self, less: "_Share | None", level: float) -> list[Float[Tensor, " layer"]]:
        """The share, or how much greater it is than another, and the ends of its interval."""
        value = self.of_all() - (0 if less is None else less.of_all())
        ends = bootstrap_all(
            lambda times: self.of(times) - (0 if less is None else less.of(times)), self.below.sum(1), level=level
        )
        return [value, *([torch.full_like(value, torch.nan)] * 2 if ends is None else ends)]


def _finding(of: Any) -> str:
    if of["low"].isna().any():
        return "cannot be told: a domain has fewer than ten sources"
    if (of["high"] < MOST).any():
        return "no standing committee: it carries less than half in some domain"
    if (of["low"] <= MOST).any():
        return "undecided: its mass may be half or less in some domain"
    if "beyond_low" not in of:
        return "carries more than half in every domain; no control was run"
    if (of["beyond_low"] > 0).all():
        return "a standing committee"
    return "not beyond the control: its committee carries as much in some domain"


def standing_committee(
    results: Mapping[str, RoutingResult],
    *,
    size: Positive | None = None,
    parallel: Callable[[str], str] | None = None,
    seed: Seed = 0,
) -> StandingCommittee:
    """Find the experts that carry most of the routing weight across domains.

    Args:
        results: Of each domain, by the same model.
        size: Experts of the committee; as many as a token has active if not given.
        parallel: What the names of sources have in common that are one document: they stay in one half.
        seed: Of the halves.

    Raises:
        InputError: Fewer than two domains, results of different models, a size that is none, or a domain of one source.
    """
    first = next(iter(results.values()), None)
    if first is None or len(results) < 2:
        raise InputError(f"got the domains {list(results)}; expected at least two")
    if len({(of.layers, of.n_experts, of.top_k) for of in results.values()}) > 1:
        raise InputError("the results differ in layers, experts or top_k; expected those of one model")
    size = first.top_k if size is None else size
    if not 1 <= size <= first.n_experts:
        raise InputError(f"size is {size}; the layers have {first.n_experts} experts")
    blocks = {
        domain: {name: name if parallel is None else parallel(name) for name in of.sources}
        for domain, of in results.items()
    }
    halves = balanced_halves(blocks, seed)
    side = {domain: torch.tensor([halves[domain][name] for name in of.sources]) for domain, of in results.items()}
    few = [domain for domain, of in side.items() if len(of.unique()) < 2]
    if few:
        raise InputError(f"the domains {few} have too few sources to pick experts on half of them; two are needed")

    def shares(half: int | None) -> Float[Tensor, "domain layer n_experts"]:
        weights = [of.weights[:] if half is None else of.weights[side[name] == half] for name, of in results.items()]
        return torch.stack([of.sum(0) / of.sum(0).sum(-1, keepdim=True) for of in weights])

    parts: dict[str, list[Tensor]] = {"weight": [], "shared": [], "own": []}
    picked = {half: shares(1 - half) for half in (0, 1)}
    for number, (name, of) in enumerate(results.items()):
        shared, own = (
            torch.stack([_greatest(value(picked[half]), size) for half in (0, 1)])[side[name]]
            for value in (lambda share: share.mean(0), lambda share, number=number: share[number])
        )
        parts["weight"].append(of.weights.sum(-1))
        parts["shared"].append((of.weights * shared).sum(-1))
        parts["own"].append((of.weights * own).sum(-1))
    every = shares(None)
    sets = _greatest(every, size)
    numbers = torch.arange(len(results)).repeat_interleave(torch.tensor([len(of.sources) for of in results.values()]))
    return StandingCommittee(
        domains=tuple(results),
        layers=first.layers,
        size=size,
        n_experts=first.n_experts,
        domain=numbers,
        **{name: torch.cat(of) for name, of in parts.items()},
        members=_greatest(every.mean(0), size),
        half=torch.stack([_needed(picked[half], shares(half)) for half in (0, 1)]).mean(0),
        jaccard=_jaccard(sets),
    )


def _greatest(shares: Float[Tensor, "*batch n_experts"], size: int) -> Bool[Tensor, "*batch n_experts"]:
    return torch.zeros_like(shares, dtype=torch.bool).scatter(-1, shares.topk(size, dim=-1).indices, True)


def _needed(
    picked: Float[Tensor, "domain layer n_experts"], shares: Float[Tensor, "domain layer n_experts"]
) -> Float[Tensor, " layer"]:
    """Experts that carry half in every domain, in the order of their mean share on the other half of the sources."""
    order = picked.mean(0).argsort(dim=-1, descending=True, stable=True).expand_as(shares)
    least = shares.gather(-1, order).cumsum(-1).amin(0)
    return (least >= MOST - 1e-9).double().argmax(-1).double() + 1


def _jaccard(sets: Bool[Tensor, "domain layer n_experts"]) -> Float[Tensor, " layer"]:
    pairs = [(one, other) for at, one in enumerate(sets) for other in sets[:at]]
    return torch.stack([(one & other).sum(-1) / (one | other).sum(-1) for one, other in pairs]).double().mean(0)
