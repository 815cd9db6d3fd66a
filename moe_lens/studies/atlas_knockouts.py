"""Exact knock-outs of experts, and of others that carry as much weight as the foremost of each layer and domain."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.data import TokenBatch
from moe_lens.interventions.coalitions import Removal
from moe_lens.stats import Result, RoutingResult, bootstrap_all
from moe_lens.studies.held_against import against_controls
from moe_lens.studies.localisation_effects import CoalitionEffects, read_parts
from moe_lens.studies.localisation_scores import ScoreResult
from moe_lens.studies.matched_coalitions import matched

HOW: Removal = "zero"
EVERY = 512
"""If a model has more experts than that in all, only the foremost are taken out."""
FOREMOST = 2
"""Experts of each layer and domain that are held against others: those whose share is most above that in the other
domains."""
COSTLIEST = 5
"""Experts that are held against others because they cost most, each on the domain where it does."""
MATCHED = 4
"""Coalitions of other experts of the layer that carry as much of the domain's routing weight, within a tenth."""


def singles(layers: Sequence[int], n_experts: int) -> list[str]:
    """Of each expert that is taken out by itself."""
    n = len(layers) * n_experts
    return ["expert"] * (n if n <= EVERY else FOREMOST * len(layers))


def kinds(layers: Sequence[int]) -> list[str]:
    """Of each control: for every layer and place."""
    return ["matched"] * (MATCHED * FOREMOST * len(layers))


def costliest_kinds() -> list[str]:
    """Of each control of the costliest experts."""
    return ["matched"] * (MATCHED * COSTLIEST)


def worth(routing: Mapping[str, RoutingResult]) -> dict[str, Float[Tensor, "layer n_experts"]]:
    """Share of each domain's tokens that choose an expert, minus the mean share of the other domains, if there are any.

    With one domain, minus the share under uniform routing.
    """
    shares = {domain: of.specialisation for domain, of in routing.items()}
    total = sum(shares.values(), torch.zeros(()))
    if len(shares) == 1:
        return {domain: of - routing[domain].baseline for domain, of in shares.items()}
    return {domain: of - (total - of) / (len(shares) - 1) for domain, of in shares.items()}


def foremost(routing: Mapping[str, RoutingResult]) -> Int[Tensor, "domain layer place"]:
    """The experts that are taken out; −1 where no more have any share above that of others."""
    found = []
    for of in worth(routing).values():
        best, expert = of.sort(dim=1, descending=True, stable=True)
        found.append(expert.masked_fill(best <= 0, -1)[:, :FOREMOST])
    return torch.stack(found)


def alone(routing: Mapping[str, RoutingResult]) -> Bool[Tensor, "domain variant layer n_experts"]:
    """The experts that are taken out, each by itself: all of them (one row), or the foremost of each domain."""
    first = next(iter(routing.values()))
    shape = len(first.layers), first.n_experts
    n = shape[0] * shape[1]
    if n <= EVERY:
        return torch.eye(n, dtype=torch.bool).view(1, n, *shape)
    found = foremost(routing)
    members = torch.zeros(*found.shape, *shape, dtype=torch.bool)
    domain, row, place = (found >= 0).nonzero().unbind(-1)
    members[domain, row, place, row, found[domain, row, place]] = True
    return members.flatten(1, 2)


def controls(routing: Mapping[str, RoutingResult], seed: int) -> Bool[Tensor, "domain variant layer n_experts"]:
    """The controls of each domain's foremost experts, in the order of `kinds`; nobody where there is none."""
    every = []
    for (domain, of), experts in zip(routing.items(), foremost(routing), strict=True):
        generator = _generator(f"{seed} {domain}")
        for row, places in enumerate(experts.tolist()):
            for expert in places:
                every += _drawn(of, (row, expert) if expert >= 0 else None, generator)
    return torch.stack(every).unflatten(0, (len(routing), -1))


def _generator(key: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))


def _drawn(of: RoutingResult, which: tuple[int, int] | None, generator: torch.Generator) -> list[Tensor]:
    """Controls of one expert; nobody where there is none."""
    mass = of.weights.sum(0)
    picked = torch.zeros(mass.shape, dtype=torch.bool)
    if which is not None:
        picked[which] = True
    return [matched(picked, mass / mass.sum(), of.top_k, generator) for _ in range(MATCHED)]


def costliest(
    routing: Mapping[str, RoutingResult], knocked: Mapping[str, Result]
) -> tuple[list[tuple[int, int, int]], int]:
    """The experts that cost most of all that were taken out, the costliest first, and of how many they were chosen.

    Args:
        routing: Of each domain.
        knocked: What each domain loses without each expert.

    Returns:
        (domain, row of the layer, expert) of each: the domain where it costs most, if it costs anything there; and the
        number of experts × domains.
    """
    members, found = alone(routing), []
    for number, result in enumerate(knocked.values()):
        assert isinstance(result, CoalitionEffects)
        added, tokens = (value.double().sum(0) for value in result.of(HOW))
        found += [(float(added[at] / tokens[at]), (number, *key)) for at, key in _singles(members)]
    best: dict[tuple[int, int], tuple[int, int, int]] = {}
    for value, (number, row, expert) in sorted(found, key=lambda one: (-one[0], one[1])):
        if value > 0:
            best.setdefault((row, expert), (number, row, expert))
    return list(best.values())[:COSTLIEST], len(found)


def costliest_controls(
    routing: Mapping[str, RoutingResult], experts: Sequence[tuple[int, int, int]], seed: int
) -> Bool[Tensor, "domain variant layer n_experts"]:
    """The controls of the costliest experts, for the domain of each: nobody for the other domains."""
    names, first = list(routing), next(iter(routing.values()))
    members = torch.zeros(len(names), COSTLIEST * MATCHED, len(first.layers), first.n_experts, dtype=torch.bool)
    for place, (number, row, expert) in enumerate(experts):
        generator = _generator(f"{seed} costliest {names[number]} {row} {expert}")
        own = _drawn(routing[names[number]], (row, expert), generator)
        members[number, place * MATCHED : (place + 1) * MATCHED] = torch.stack(own)
    return members


def _singles(members: Bool[Tensor, "domain variant layer n_experts"]) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Where each single expert is, and which: (row of its layer, id); the first of equal ones."""
    seen = set()
    for domain, variant, row, expert in members.nonzero().tolist():
        if (row, expert) not in seen:
            seen.add((row, expert))
            yield (domain, variant), (row, expert)


def beginning(batch: TokenBatch, columns: int) -> TokenBatch:
    """The first predicted tokens of a batch's windows, and what stands before them."""
    kept = {name: getattr(batch, name)[:, : columns + 1] for name in ("tokens", "mask", "counted")}
    return replace(batch, **kept, packing=None)


def measure(
    model: Any, short: TokenBatch, members: Bool[Tensor, "domain variant layer n_experts"], own: int | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the beginnings of windows lose without each of some experts, and at the first of their predicted tokens.

    Both as `CoalitionStats` takes it; the tokens are those of the whole beginnings.

    Args:
        model: A `HookedMoE`.
        short: What to read: see `beginning`.
        members: What is taken out.
        own: Number of the only domain whose experts are taken out; all domains' if not given.
    """
    read = members.any((-2, -1))
    if own is not None:
        read[torch.arange(len(members)) != own] = False
    every = read.expand(len(short.sources), 1, *read.shape)
    one_half = dict.fromkeys(short.sources, 0)
    both = members[None].expand(2, *members.shape)
    nats, predicted, (added, first) = read_parts(model, short, both, one_half, every, [HOW])
    return (nats, predicted, added, every), (nats, predicted, first, every)


def tables(results: Mapping[str, Mapping[str, Result]], layers: tuple[int, ...], seed: int) -> dict[str, pd.DataFrame]:
    """`knockouts`, `compared` and `controls`.

    `knockouts` has a row per expert that was taken out by itself and domain that was read without it: layer, expert,
    read; added (nats a token), low, high (95 % interval over sources, of the row by itself), at_first (the part of
    added that falls on the first four predicted tokens of windows, nats a token of all), first_order (what gradient ×
    activation gives for the same tokens), tokens, sources.

    `compared` has a row per expert that is held against controls, on a domain's own texts: by share, for every domain,
    layer and place of a foremost expert; and by cost, the costliest of all, on the domain where each costs most, unless
    it is there by share. Columns: by; domain, layer, place, expert; mass (its share of the layer's routing weight);
    added, low, high, tokens, sources, as above; controls (how many), control_added (mean over them), control_least,
    control_most, control_mass; over_most (added − control_most), over_most_low, over_most_high, all_low, all_high
    (intervals of over_most and of added), starred: whether both lie above 0 (see `held_against`). Intervals are 95 %
    simultaneous (Bonferroni). Half of the chance of error goes to the comparisons by share, and half to those by cost:
    these are corrected for every expert and domain that could have been the costliest, not for the few that were.

    `controls` has a row per control, a coalition that is taken out as one: by, domain, layer, place, expert, number,
    experts (a list), mass; and added, low, high, tokens and sources.
    """
    routing: dict[str, RoutingResult] = {}
    for domain, of in results.items():
        counts = of["routing"]
        assert isinstance(counts, RoutingResult)
        routing[domain] = counts
    knocked, compared, held = [], [], []
    members, leading = controls(routing, seed), foremost(routing)
    dear, among = costliest(routing, {domain: of["knockouts"] for domain, of in results.items()})
    dear_members = costliest_controls(routing, dear, seed)
    tests = int(members.unflatten(1, (-1, MATCHED)).any((-3, -2, -1)).sum())
    for number, (domain, of) in enumerate(results.items()):
        one = _Effects.of(of["knockouts"], alone(routing))
        others, more = _Effects.of(of["controls"], members), _Effects.of(of["costliest"], dear_members)
        estimates, firsts = of["first_order_beginnings"], of["firsts"]
        assert isinstance(estimates, ScoreResult) and isinstance(firsts, CoalitionEffects)
        estimate = estimates.per_token([True] * len(estimates.sources))
        where = dict((key, at) for at, key in _singles(one.members))
        for (row, expert), at in where.items():
            line = {"layer": layers[row], "expert": expert, "read": domain, **one.effect(at)}
            line["at_first"] = float(firsts.of(HOW)[0][:, *at].double().sum() / one.tokens[:, *at].sum())
            knocked.append({**line, "first_order": float(estimate[row, expert])})
        mass = routing[domain].weights.sum(0)
        mass = mass / mass.sum(-1, keepdim=True)
        chosen = [
            ("share", row, place, expert, others, (row * FOREMOST + place) * MATCHED, tests)
            for row, places in enumerate(leading[number].tolist())
            for place, expert in enumerate(places)
            if expert >= 0
        ]
        there = {(row, expert) for _, row, _, expert, *_ in chosen}
        chosen += [
            ("cost", row, place, expert, more, place * MATCHED, among)
            for place, (domain_, row, expert) in enumerate(dear)
            if domain_ == number and (row, expert) not in there
        ]
        for by, row, place, expert, effects, start, family in chosen:
            key = {"by": by, "domain": domain, "layer": layers[row], "place": place, "expert": expert}
            variants = [(number, start + i) for i in range(MATCHED)]
            variants = [at for at in variants if bool(effects.members[at].any())]
            own = [{**key, **effects.control(at, mass[row], row)} for at in variants]
            at = where[row, expert]
            sums = (
                torch.stack([effects.added[:, *v] for v in variants], 1)
                if variants
                else one.added.new_zeros(len(one.added), 0)
            )
            line = {**key, "mass": float(mass[row, expert]), **one.effect(at)}
            line |= against_controls(one.added[:, *at], sums, one.tokens[:, *at], FAMILIES * family)
            compared.append({**line, "control_mass": sum(c["mass"] for c in own) / len(own) if own else None})
            held += own
    frame = pd.DataFrame(compared).reindex(columns=_COMPARED).astype({"controls": "Int64", "starred": "boolean"})
    columns = ["layer", "expert", "read", *_EFFECT[:3], "at_first", "first_order", *_EFFECT[3:]]
    return {
        "knockouts": pd.DataFrame(knocked, columns=columns),
        "compared": frame.astype({"control_mass": float}),
        "controls": pd.DataFrame(held, columns=[*_KEY, "number", "experts", "mass", *_EFFECT]),
    }


FAMILIES = 2
"""Comparisons by share and by cost: each has half of the chance of error."""
_KEY, _EFFECT = ["by", "domain", "layer", "place", "expert"], ["added", "low", "high", "tokens", "sources"]
_COMPARED = [*_KEY, "mass", *_EFFECT, "controls", "control_added", "control_least", "control_most", "control_mass"]
_COMPARED += ["over_most", "over_most_low", "over_most_high", "all_low", "all_high", "starred"]


@dataclass(frozen=True, eq=False)
class _Effects:
    """What one domain's texts lose without each of some coalitions."""

    result: CoalitionEffects
    members: Bool[Tensor, "domain variant layer n_experts"]
    added: Float[Tensor, "source domain variant"]
    tokens: Float[Tensor, "source domain variant"]
    ends: Float[Tensor, "2 domain variant"]

    @classmethod
    def of(cls, result: Result, members: Tensor) -> "_Effects":
        assert isinstance(result, CoalitionEffects)
        added, tokens = (value.double() for value in result.of(HOW))
        flat = added.flatten(1), tokens.flatten(1)
        ends = bootstrap_all(lambda times: (times @ flat[0]) / (times @ flat[1]), flat[1])
        ends = torch.full((2, flat[0].shape[1]), torch.nan) if ends is None else ends
        return cls(result, members, added, tokens, ends.unflatten(1, added.shape[1:]))

    def effect(self, at: tuple[int, int]) -> dict[str, Any]:
        """What is added without one of them, with its interval."""
        value = float(self.added[:, *at].sum() / self.tokens[:, *at].sum())
        low, high = self.ends[:, *at].tolist()
        n = {"tokens": int(self.result.predicted.sum()), "sources": len(self.result.sources)}
        return {"added": value, "low": low, "high": high, **n}

    def control(self, at: tuple[int, int], mass: Float[Tensor, " n_experts"], row: int) -> dict[str, Any]:
        """A control: its experts, all of one layer, the weight that they carry, and what is added without them."""
        out = self.members[at][row]
        about = {"number": at[1] % MATCHED, "experts": out.nonzero()[:, 0].tolist(), "mass": float(mass[out].sum())}
        return about | self.effect(at)
