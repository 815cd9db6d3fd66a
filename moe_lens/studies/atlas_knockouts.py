"""Exact knock-outs of the foremost experts of each layer and domain, beside others that carry as much weight."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.data import TokenBatch
from moe_lens.interventions.coalitions import Removal
from moe_lens.resampling import jackknife_interval
from moe_lens.stats import Result, RoutingResult, bootstrap_all
from moe_lens.studies.localisation_effects import CoalitionEffects, read_without
from moe_lens.studies.matched_coalitions import matched

HOW: Removal = "zero"
FOREMOST = 2
"""Experts of each layer and domain that are taken out: those whose share is most above that in the other domains."""
MATCHED = 4
"""Coalitions of other experts of the layer that carry as much of the domain's routing weight, within a tenth."""


def kinds(layers: Sequence[int]) -> list[str]:
    """Of each variant: for every layer and place, the expert itself, then its controls."""
    return ["expert", *["matched"] * MATCHED] * (FOREMOST * len(layers))


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


def coalitions(routing: Mapping[str, RoutingResult], seed: int) -> Bool[Tensor, "domain variant layer n_experts"]:
    """All that is taken out, in the order of `kinds`; nobody where there is none."""
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
                every += [picked, *(matched(picked, mass / mass.sum(), of.top_k, generator) for _ in range(MATCHED))]
    return torch.stack(every).unflatten(0, (len(routing), -1))


def measure(
    model: Any, batch: TokenBatch, own: int, members: Bool[Tensor, "domain variant layer n_experts"], columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the beginnings of a batch's windows lose without each coalition, as `CoalitionStats` takes it.

    Args:
        model: A `HookedMoE`.
        batch: What to read.
        own: Number of the domain that is read: without other domains' controls it is not.
        members: The coalitions.
        columns: Predicted tokens of a window that are read.
    """
    short = replace(
        batch, **{n: getattr(batch, n)[:, : columns + 1] for n in ("tokens", "mask", "counted")}, packing=None
    )
    read = members.any((-2, -1))
    read[torch.arange(len(members)) != own] &= torch.arange(members.shape[1]) % (1 + MATCHED) == 0
    every = read.expand(len(batch.sources), 1, *read.shape)
    one_half = dict.fromkeys(batch.sources, 0)
    return *read_without(model, short, members[None].expand(2, *members.shape), one_half, every, [HOW]), every


def table(results: Mapping[str, Mapping[str, Result]], layers: tuple[int, ...], seed: int) -> pd.DataFrame:
    """A row per domain, layer and place of an expert, and domain that is read without it.

    Columns: domain, layer, place, expert, read; added (nats a token), low, high (95 % interval over sources), tokens,
    sources; and where the domain's own texts are read: mass (the expert's share of the layer's routing weight),
    controls, control_added (mean over the matched coalitions), control_mass, beyond (added − control_added),
    beyond_low, beyond_high (95 %, simultaneous over all rows that have one, by Bonferroni), starred: whether that lies
    above 0.
    """
    routing: dict[str, RoutingResult] = {}
    for domain, of in results.items():
        counts = of["routing"]
        assert isinstance(counts, RoutingResult)
        routing[domain] = counts
    experts, members = foremost(routing), coalitions(routing, seed)
    every = members.unflatten(1, (len(layers), FOREMOST, 1 + MATCHED)).any((-2, -1))
    tests = int((every[..., 0] & every[..., 1:].any(-1)).sum())
    rows = []
    for read, of in results.items():
        effects = of["knockouts"]
        assert isinstance(effects, CoalitionEffects)
        added, tokens = effects.of(HOW)
        added, tokens = added.flatten(1), tokens.flatten(1).double()
        total = added.sum(0) / tokens.sum(0)

        def mean(times: Tensor, added: Tensor = added, tokens: Tensor = tokens) -> Tensor:
            return (times @ added) / (times @ tokens)

        ends = bootstrap_all(mean, effects.predicted)
        low, high = (torch.full_like(total, torch.nan),) * 2 if ends is None else ends
        shape = (len(results), len(layers), FOREMOST, 1 + MATCHED)
        total, low, high = (value.view(shape) for value in (total, low, high))
        per_source = added.view(-1, *shape), tokens.view(-1, *shape)
        for number, domain in enumerate(results):
            mass = routing[domain].weights.sum(0)
            mass = mass / mass.sum(-1, keepdim=True)
            for row, layer in enumerate(layers):
                for place in range(FOREMOST):
                    at = number, row, place
                    if not every[at][0]:
                        continue
                    expert = int(experts[at])
                    line: dict[str, Any] = {"domain": domain, "layer": layer, "place": place, "expert": expert}
                    line |= {"read": read, "added": float(total[at][0])}
                    line |= {"low": float(low[at][0]), "high": float(high[at][0])}
                    line |= {"tokens": int(effects.predicted.sum()), "sources": len(effects.sources)}
                    if domain == read:
                        line["mass"] = float(mass[row, expert])
                        kept = every[at].clone()
                        kept[0] = False
                        out = members.unflatten(1, (len(layers), FOREMOST, 1 + MATCHED))[at][kept][:, row]
                        sums, read_tokens = (value[(slice(None), *at)] for value in per_source)
                        line |= _held_against(sums, read_tokens, kept, tests)
                        line["control_mass"] = float((out * mass[row]).sum(-1).mean()) if len(out) else float("nan")
                    rows.append(line)
    columns = ["domain", "layer", "place", "expert", "read", "added", "low", "high", "tokens", "sources", "mass"]
    columns += ["controls", "control_added", "control_mass", "beyond", "beyond_low", "beyond_high", "starred"]
    frame = pd.DataFrame(rows).reindex(columns=columns)
    return frame.astype({"controls": "Int64", "starred": "boolean"})


def _held_against(
    added: Float[Tensor, "source variant"],
    tokens: Float[Tensor, "source variant"],
    kept: Bool[Tensor, " variant"],
    tests: int,
) -> dict[str, Any]:
    """An expert's effect minus the mean of its controls'."""
    if not bool(kept.any()):
        return {"controls": 0}
    n = tokens[:, 0]
    control, sums = added[:, kept].mean(1), added[:, 0] - added[:, kept].mean(1)
    beyond = sums.sum() / n.sum()
    without = (sums.sum() - sums) / (n.sum() - n)
    low, high = jackknife_interval(beyond, without, torch.zeros(len(n), dtype=torch.long), level=1 - 0.05 / tests)
    found = {"controls": int(kept.sum()), "control_added": float(control.sum() / n.sum()), "beyond": float(beyond)}
    found |= {"beyond_low": float(low), "beyond_high": float(high)}
    return found | ({} if bool(low.isnan()) else {"starred": bool(low > 0)})
