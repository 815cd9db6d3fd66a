"""Coalitions of experts: those picked for a domain, and those that they are held against."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moe_lens.stats import RoutingResult

PICKED, BUSIEST, RANDOM, MATCHED = "picked", "busiest", "random", "matched"
KINDS: dict[str, str] = {
    PICKED: "picked for the domain on the other half of the sources",
    BUSIEST: "the same number of each layer, those that all domains together use most",
    RANDOM: "the same number of each layer, drawn at random",
    MATCHED: "drawn at random from the same layers, none of them picked, until they carry as much routing weight",
}
"""Coalitions that are taken out, and what each is."""
N_RANDOM = 5
TOLERANCE = 0.1
"""By how much the routing weight of a matched coalition may differ from that of the picked, as a share of it."""
ATTEMPTS = 100
"""Draws after which no matched coalition is found."""

Experts = Bool[Tensor, "layer n_experts"]
Mass = Float[Tensor, "layer n_experts"]


def variants(n_matched: int) -> tuple[tuple[str, int], ...]:
    """Kind and number of every coalition of a domain."""
    numbers = {PICKED: 1, BUSIEST: 1, RANDOM: N_RANDOM, MATCHED: n_matched}
    return tuple((kind, number) for kind, n in numbers.items() for number in range(n))


def beaten(controls: Float[Tensor, " control"], picked: float) -> float:
    """The share of controls that are below what was picked; ties count by half."""
    return float(((controls < picked).double() + (controls == picked).double() / 2).mean())


@dataclass(frozen=True, eq=False)
class Coalitions:
    """All coalitions of one domain that are taken out of one half of the sources."""

    members: Bool[Tensor, "variant layer n_experts"]
    """In the order of `variants`; without any where none was found that matches."""
    mass: Float[Tensor, " variant"]
    """Share of the domain's routing weight that each carries in the half that it is taken out of."""


def of_sources(result: RoutingResult, kept: Sequence[bool]) -> RoutingResult:
    """The counts of some of the sources."""
    rows = torch.tensor(list(kept))
    by_source = ("tokens", "assignments", "top1", "weights", "sums", "measured")
    names = tuple(source for source, keep in zip(result.sources, kept, strict=True) if keep)
    return replace(result, sources=names, **{name: getattr(result, name)[rows] for name in by_source})


def differences(values: Mapping[str, Float[Tensor, "layer n_experts"]]) -> dict[str, Float[Tensor, "layer n_experts"]]:
    """What each domain has of an expert, minus the mean of the other domains."""
    total = torch.stack(list(values.values())).sum(0)
    return {domain: own - (total - own) / (len(values) - 1) for domain, own in values.items()}


def pick(scores: Float[Tensor, "layer n_experts"], n: int) -> Experts:
    """The n experts of each layer with the greatest scores, as far as these are above 0."""
    best = torch.zeros_like(scores, dtype=torch.bool)
    best.scatter_(1, scores.sort(dim=1, descending=True, stable=True).indices[:, :n], True)
    return best & (scores > 0)


def coalitions(picked: Experts, mass: Mass, busy: Mass, top_k: int, n_matched: int, key: object) -> Coalitions:
    """The picked experts and all that they are held against.

    Args:
        picked: On the other half.
        mass: Routing weight that the domain gives each expert, in the half that they are taken out of.
        busy: Share of tokens that choose each expert, mean over all domains.
        top_k: Active experts of a token: so many are left in every layer.
        n_matched: Coalitions to match.
        key: Of the draws.
    """
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(str(key).encode()).digest()[:7], "big"))
    mass = mass / mass.sum()
    counts = picked.sum(1).tolist()
    found = []
    for kind, _ in variants(n_matched):
        if kind == PICKED:
            found.append(picked)
        elif kind == MATCHED:
            found.append(matched(picked, mass, top_k, generator))
        else:
            worth = busy if kind == BUSIEST else torch.rand(mass.shape, generator=generator)
            members = torch.zeros_like(picked)
            for row, n in enumerate(counts):
                members[row, worth[row].argsort(descending=True, stable=True)[:n]] = True
            found.append(members)
    members = torch.stack(found)
    return Coalitions(members, (members * mass).sum((1, 2)))


def matched(picked: Experts, mass: Mass, top_k: int, generator: torch.Generator) -> Experts:
    """Unpicked experts of the same layers that carry as much mass within `TOLERANCE`; none if they cannot be found.

    In each layer experts are added at random until they carry what the layer's picked ones do, as nearly as may be;
    then, where some layers had too little, in any of these layers until the whole is equal.
    """
    aim, none = float(mass[picked].sum()), torch.zeros_like(picked)
    most, worth = picked.shape[1] - top_k, mass.tolist()
    for _ in range(ATTEMPTS if aim > 0 else 0):
        members = torch.zeros_like(picked)
        for row in picked.any(1).nonzero()[:, 0].tolist():
            free = (~picked[row]).nonzero()[:, 0]
            order = free[torch.randperm(len(free), generator=generator)][:most]
            carried = torch.cat([mass.new_zeros(1), mass[row, order].cumsum(0)])
            members[row, order[: int((carried - mass[row, picked[row]].sum()).abs().argmin())]] = True
        rest = (picked.any(1, keepdim=True) & ~picked & ~members).nonzero()
        lacking, counts = aim - float(mass[members].sum()), members.sum(1).tolist()
        for row, expert in rest[torch.randperm(len(rest), generator=generator)].tolist():
            if counts[row] < most and abs(lacking - worth[row][expert]) < lacking:
                members[row, expert] = True
                counts[row] += 1
                lacking -= worth[row][expert]
        if abs(lacking) <= TOLERANCE * aim:
            return members
    return none
