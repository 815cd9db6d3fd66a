"""The study `ablation`: what texts lose without experts that were named, beside coalitions they are held against."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from moe_lens.checked import Positive, Seed
from moe_lens.data import TokenBatch
from moe_lens.errors import InputError
from moe_lens.interventions.coalitions import Removal
from moe_lens.resampling import bootstrap_all
from moe_lens.selection import Experts, Selection
from moe_lens.stats import Result, RoutingResult, RoutingStats, observe
from moe_lens.studies import matched_coalitions as chosen
from moe_lens.studies.held_against import against_controls
from moe_lens.studies.localisation import REMOVALS
from moe_lens.studies.localisation_effects import CoalitionEffects, CoalitionStats, read_without
from moe_lens.studies.study import TEXTS, Earlier, Gathered, Study


@dataclass(frozen=True)
class AblationStudy(Study):
    """Loss of each domain without some experts, beside controls.

    Controls are other experts of the same layers: as many, or with as much of the domain's routing weight.
    """

    experts: Experts
    """The experts to take out, all at once: `{layer: [expert, …]}` or `[(layer, expert), …]`."""
    how: tuple[Removal, ...] = REMOVALS
    """Ways to take them out, each run by itself: `reroute` forbids them, so that others are chosen; `zero` sets their
    contribution to zero."""
    matched: Positive = 20
    """Coalitions to match on the routing weight that a domain gives the experts."""
    seed: Seed = 0
    """Of the controls."""

    name: ClassVar[str] = "ablation"
    passes: ClassVar[tuple[str, ...]] = ("routing", "effects")

    def settings(self) -> dict[str, Any]:
        """What was asked for; experts in their order."""
        return {**vars(self), "experts": {str(layer): list(of) for layer, of in self._by_layer().items()}}

    def check(self, model: Any) -> None:
        """Refuse experts that the model does not have, and so many that too few are left."""
        Selection(experts=self.experts).check(model)
        if not self.how or len(set(self.how)) < len(self.how) or set(self.how) - set(REMOVALS):
            raise InputError(f"how is {self.how!r}; expected one or both of {', '.join(REMOVALS)}")
        for layer, experts in self._by_layer().items():
            if "reroute" in self.how and len(experts) > model.n_experts - model.top_k:
                left = model.n_experts - len(experts)
                raise InputError(
                    f"layer {layer}: {left} experts would be left to choose from, and a token needs {model.top_k}; "
                    "take out fewer, or set them to zero"
                )

    def begin(self, model: Any, name: str) -> Gathered:
        """Empty counts and sums."""
        if name == "routing":
            return {"routing": RoutingStats(model.moe_layers, model.n_experts, model.top_k)}
        return {"effects": CoalitionStats(self.how, [kind for kind, _ in chosen.variants(self.matched)])}

    def prepare(self, model: Any, name: str, domain: str, earlier: Earlier) -> Any:  # noqa: ARG002
        """The coalitions of a domain."""
        if name == "routing":
            return None
        routing = {of: passes["routing"]["routing"].result() for of, passes in earlier.items()}
        return self.coalitions(routing)[domain].members

    def coalitions(self, routing: Mapping[str, Result]) -> dict[str, chosen.Coalitions]:
        """The experts and their controls, which are matched on each domain's own routing weight."""
        found = {domain: of for domain, of in routing.items() if isinstance(of, RoutingResult)}
        first = next(iter(found.values()))
        named = self._members(first.layers, first.n_experts)
        busy = torch.stack([of.specialisation for of in found.values()]).mean(0)
        return {
            domain: chosen.coalitions(
                named, of.weights.sum(0), busy, first.top_k, self.matched, (self.seed, self.name, domain)
            )
            for domain, of in found.items()
        }

    def step(self, model: Any, name: str, batch: TokenBatch, into: Gathered, prepared: Any) -> None:
        """Count routing, or read a batch without each coalition."""
        if name == "routing":
            into["routing"].update(observe(model, batch))
            return
        there = prepared.any((-2, -1))
        read = there.expand(len(batch.sources), len(self.how), 1, -1)
        members, half = prepared[None, None].expand(2, -1, -1, -1, -1), dict.fromkeys(batch.sources, 0)
        into["effects"].update(*read_without(model, batch, members, half, read, self.how), read, batch.sources)

    def results(self, earlier: Mapping[str, Gathered]) -> dict[str, Result]:
        """Routing and effects."""
        return {name: into[name].result() for into in earlier.values() for name in into if name != TEXTS}

    def tables(
        self,
        model: Mapping[str, Any],  # noqa: ARG002
        results: Mapping[str, Mapping[str, Result]],
    ) -> dict[str, pd.DataFrame]:
        """`ablation`, `effects` and `coalitions`.

        `ablation` has a row for each domain, way of taking out and kind of coalition (`picked`: the experts that were
        named; `matched`: of the same layers, with as much of the domain's routing weight within 10 %; `random`: as many
        of each layer; `busiest`: as many, those that all domains use most). Columns: added (nats a token, mean over the
        coalitions of the kind), with low and high, its 95 % interval over sources, and ratio, exp(added); beyond, what
        the named experts cost more than this kind, with beyond_low and beyond_high; beaten, the share of the kind that
        costs less; control_least and control_most, the least and the greatest cost of the kind; over_most, what the
        named experts cost more than the costliest of the kind, with over_most_low and over_most_high; all_low and
        all_high, of what they cost; starred: whether they are shown to cost more than nothing and than each of the
        kind; these intervals hold for all domains and ways together (see `held_against`);
        coalitions (0: none could be matched); experts and mass (share of the domain's routing weight), means of the
        kind; loss of the whole model (nats a token); tokens, sources. `effects` has a row for each coalition by itself:
        mass, added, low, high, tokens, sources. `coalitions` lists their experts.
        """
        made = self.coalitions({domain: of["routing"] for domain, of in results.items()})
        rows, each, kinds = [], [], [kind for kind, _ in chosen.variants(self.matched)]
        for domain, of in results.items():
            effects = of["effects"]
            assert isinstance(effects, CoalitionEffects)
            for how in self.how:
                tests = len(results) * len(self.how)
                rows += [
                    {"domain": domain, "how": how, **row} for row in _rows(effects, how, kinds, made[domain], tests)
                ]
                each += [
                    {"domain": domain, "how": how, **row} for row in _each(effects, how, made[domain], self.matched)
                ]
        first = next(iter(results.values()))["routing"]
        assert isinstance(first, RoutingResult)
        listed = [
            {"domain": domain, "coalition": kind, "number": number, "layer": first.layers[row], "expert": expert}
            for domain, of in made.items()
            for (kind, number), members in zip(chosen.variants(self.matched), of.members, strict=True)
            for row, expert in members.nonzero().tolist()
        ]
        ablation = pd.DataFrame(rows).astype({"starred": "boolean"})
        return {"ablation": ablation, "effects": pd.DataFrame(each), "coalitions": pd.DataFrame(listed)}

    def _by_layer(self) -> dict[int, tuple[int, ...]]:
        return {layer: tuple(of) for layer, of in (Selection(experts=self.experts).by_layer or {}).items()}

    def _members(self, layers: tuple[int, ...], n_experts: int) -> Bool[Tensor, "layer n_experts"]:
        members = torch.zeros(len(layers), n_experts, dtype=torch.bool)
        for layer, experts in self._by_layer().items():
            members[layers.index(layer), list(experts)] = True
        return members


_HELD = ("control_least", "control_most", "over_most", "over_most_low", "over_most_high", "all_low", "all_high")


def _rows(
    effects: CoalitionEffects, how: str, kinds: list[str], made: chosen.Coalitions, tests: int
) -> list[dict[str, Any]]:
    added, tokens = effects.of(how)
    there = made.members.any((1, 2)) & (tokens[:, 0].sum(0) > 0)
    sums, counts = added[:, 0].double(), effects.predicted.double()
    named = sums[:, kinds.index(chosen.PICKED)]
    rows = []
    for kind in dict.fromkeys(kinds):
        at = torch.tensor([one == kind for one in kinds]) & there
        row: dict[str, Any] = {"coalition": kind}
        mean = sums[:, at].mean(1)  # NaN where there is none
        row |= _with_ends("added", ("low", "high"), mean, counts)
        row["ratio"] = float(torch.tensor(row["added"], dtype=torch.float64).exp())
        own = kind == chosen.PICKED
        beyond = torch.full_like(mean, torch.nan) if own else named - mean
        row |= _with_ends("beyond", ("beyond_low", "beyond_high"), beyond, counts)
        beaten = (sums[:, at].sum(0) < named.sum()).double().mean()
        row["beaten"] = float("nan") if own else float(beaten)
        held = {} if own else against_controls(named, sums[:, at], counts, tests)
        row |= {name: held.get(name, float("nan")) for name in _HELD}
        row["starred"] = held.get("starred")
        row["coalitions"] = int(at.sum())
        row["experts"] = float(made.members[at].sum((1, 2)).double().mean())
        row["mass"] = float(made.mass[at].double().mean())
        row["loss"] = float(effects.nats.sum() / counts.sum())
        rows.append({**row, "tokens": int(counts.sum()), "sources": len(effects.sources)})
    return rows


def _each(effects: CoalitionEffects, how: str, made: chosen.Coalitions, matched: int) -> Iterator[dict[str, Any]]:
    """A row for each coalition that there is."""
    added, tokens = (value[:, 0].double() for value in effects.of(how))
    for at, (kind, number) in enumerate(chosen.variants(matched)):
        if bool(made.members[at].any()):
            row: dict[str, Any] = {"coalition": kind, "number": number, "mass": float(made.mass[at])}
            row |= _with_ends("added", ("low", "high"), added[:, at], tokens[:, at])
            yield {**row, "tokens": int(tokens[:, at].sum()), "sources": len(effects.sources)}


def _with_ends(name: str, ends: tuple[str, str], sums: Tensor, counts: Tensor) -> dict[str, float]:
    """A mean over tokens and its interval over sources; missing below ten."""
    found = bootstrap_all(lambda times: (times @ sums) / (times @ counts), counts)
    low, high = (float("nan"), float("nan")) if found is None else found.tolist()
    return {name: float(sums.sum() / counts.sum()), ends[0]: low, ends[1]: high}
