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
from moe_lens.studies.localisation_effects import CoalitionEffects, read_without
from moe_lens.studies.localisation_scores import ScoreResult
from moe_lens.studies.matched_coalitions import matched

HOW: Removal = "zero"
EVERY = 512
"""If a model has more experts than that in all, only the foremost are taken out."""
FOREMOST = 2
"""Experts of each layer and domain that are held against others: those whose share is most above that in the other
domains."""
MATCHED = 4
"""Coalitions of other experts of the layer that carry as much of the domain's routing weight, within a tenth."""


def singles(layers: Sequence[int], n_experts: int) -> list[str]:
    """Of each expert that is taken out by itself."""
    n = len(layers) * n_experts
    return ["expert"] * (n if n <= EVERY else FOREMOST * len(layers))


def kinds(layers: Sequence[int]) -> list[str]:
    """Of each control: for every layer and place."""
    return ["matched"] * (MATCHED * FOREMOST * len(layers))


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
        key = hashlib.sha256(f"{seed} {domain}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        mass = of.weights.sum(0)
        for row, places in enumerate(experts.tolist()):
            for expert in places:
                picked = torch.zeros(mass.shape, dtype=torch.bool)
                if expert >= 0:
                    picked[row, expert] = True
                every += [matched(picked, mass / mass.sum(), of.top_k, generator) for _ in range(MATCHED)]
    return torch.stack(every).unflatten(0, (len(routing), -1))


def beginning(batch: TokenBatch, columns: int) -> TokenBatch:
    """The first predicted tokens of a batch's windows, and what stands before them."""
    kept = {name: getattr(batch, name)[:, : columns + 1] for name in ("tokens", "mask", "counted")}
    return replace(batch, **kept, packing=None)


def measure(
    model: Any, short: TokenBatch, members: Bool[Tensor, "domain variant layer n_experts"], own: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the beginnings of windows lose without each of some experts, as `CoalitionStats` takes it.

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
    return *read_without(model, short, members[None].expand(2, *members.shape), one_half, every, [HOW]), every


def tables(results: Mapping[str, Mapping[str, Result]], layers: tuple[int, ...], seed: int) -> dict[str, pd.DataFrame]:
    """`knockouts`, `compared` and `controls`.

    `knockouts` has a row per expert that was taken out by itself and domain that was read without it: layer, expert,
    read; added (nats a token), low, high (95 % interval over sources, of the row by itself), first_order (what gradient
    × activation gives for the same tokens), tokens, sources.

    `compared` has a row per domain, layer and place of a foremost expert, on the domain's own texts. Columns: domain,
    layer, place, expert; mass (its share of the layer's routing weight); added, low, high, tokens, sources, as above;
    controls (how many), control_added (mean over them), control_mass; beyond (added − control_added), beyond_low,
    beyond_high, all_low, all_high (intervals of beyond and of added, 95 % simultaneous over all rows that have one, by
    Bonferroni), starred: whether both lie above 0 (see `held_against`).

    `controls` has a row per control, a coalition that is taken out as one: domain, layer, place, expert, number,
    experts (a list), mass; and added, low, high, tokens and sources.
    """
    routing: dict[str, RoutingResult] = {}
    for domain, of in results.items():
        counts = of["routing"]
        assert isinstance(counts, RoutingResult)
        routing[domain] = counts
    each, members, experts = alone(routing), controls(routing, seed), foremost(routing)
    knocked, compared, held = [], [], []
    places = members.unflatten(1, (len(layers), FOREMOST, MATCHED))
    tests = int(places.any((-2, -1)).any(-1).sum())
    for number, (domain, of) in enumerate(results.items()):
        one, others = _Effects.of(of["knockouts"], each), _Effects.of(of["controls"], members)
        estimates = of["first_order_beginnings"]
        assert isinstance(estimates, ScoreResult)
        estimate = estimates.per_token([True] * len(estimates.sources))
        for at, (row, expert) in one.experts():
            line = {"layer": layers[row], "expert": expert, "read": domain, **one.effect(at)}
            knocked.append({**line, "first_order": float(estimate[row, expert])})
        mass = routing[domain].weights.sum(0)
        mass = mass / mass.sum(-1, keepdim=True)
        where = {key: at for at, key in one.experts()}
        for row, places_ in enumerate(experts[number].tolist()):
            for place, expert in enumerate(places_):
                if expert < 0:
                    continue
                key = {"domain": domain, "layer": layers[row], "place": place, "expert": expert}
                variants = [(number, (row * FOREMOST + place) * MATCHED + i) for i in range(MATCHED)]
                variants = [at for at in variants if bool(members[at].any())]
                own = [{**key, **others.control(at, mass[row], row)} for at in variants]
                at, share = where[row, expert], float(mass[row, expert])
                sums = torch.stack([others.added[:, *v] for v in variants], 1) if variants else torch.zeros(0, 0)
                line = {**key, "mass": share, **one.effect(at)}
                line |= against_controls(one.added[:, *at], sums, one.tokens[:, *at], tests)
                compared.append({**line, "control_mass": sum(c["mass"] for c in own) / len(own) if own else None})
                held += own
    frame = pd.DataFrame(compared).reindex(columns=_COMPARED).astype({"controls": "Int64", "starred": "boolean"})
    return {
        "knockouts": pd.DataFrame(
            knocked, columns=["layer", "expert", "read", *_EFFECT[:3], "first_order", *_EFFECT[3:]]
        ),
        "compared": frame.astype({"control_mass": float}),
        "controls": pd.DataFrame(held, columns=[*_KEY, "number", "experts", "mass", *_EFFECT]),
    }


_KEY, _EFFECT = ["domain", "layer", "place", "expert"], ["added", "low", "high", "tokens", "sources"]
_COMPARED = [*_KEY, "mass", *_EFFECT, "controls", "control_added", "control_mass", "beyond", "beyond_low"]
_COMPARED += ["beyond_high", "all_low", "all_high", "starred"]


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
        ends = bootstrap_all(lambda times: (times @ flat[0]) / (times @ flat[1]), result.predicted)
        ends = torch.full((2, flat[0].shape[1]), torch.nan) if ends is None else ends
        return cls(result, members, added, tokens, ends.unflatten(1, added.shape[1:]))

    def experts(self) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Where each single expert is, and which: (row of its layer, id); the first of equal ones."""
        seen = set()
        for domain, variant, row, expert in self.members.nonzero().tolist():
            if (row, expert) not in seen:
                seen.add((row, expert))
                yield (domain, variant), (row, expert)

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
