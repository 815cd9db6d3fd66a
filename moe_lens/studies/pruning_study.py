"""The study `pruning`: what a domain loses with a part of the experts gone, beside random plans of the same size.

Gone from each layer are the experts that the domain's tokens choose least, as counted on one half of its sources; what
that costs is read on the other half, and the other way round.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moe_lens.checked import Natural, Positive, Seed
from moe_lens.data import Reading, TokenBatch
from moe_lens.errors import InputError, UnfitError
from moe_lens.model.loading.batch_sizes import BATCH_TOKENS
from moe_lens.stats import Result, RoutingResult, RoutingStats, bootstrap_all, observe
from moe_lens.stats.parallel_sources import LANGUAGE, balanced_halves, parallel_blocks
from moe_lens.studies.forecast import Load
from moe_lens.studies.localisation_effects import CoalitionEffects, CoalitionStats, load_without, read_without
from moe_lens.studies.matched_coalitions import PICKED, RANDOM, of_sources
from moe_lens.studies.study import Earlier, Gathered, Study

HOW = ("prune",)
HALF, DOUBLE = "half", "double"
SHARES: dict[str, float] = {PICKED: 1.0, HALF: 0.5, DOUBLE: 2.0}
"""Kinds of plans for a domain, and how many times the study's share goes: half and double show what the share decides.
They are read by the domain itself alone, and have no random plans."""


@dataclass(frozen=True)
class PruningStudy(Study):
    """Perplexity of every domain without the experts that one domain's tokens choose least, beside random plans."""

    share: float = 0.25
    """Share of each layer's experts that are removed."""
    random: Natural = 40
    """Random plans of the same size."""
    parallel: str = LANGUAGE
    """What may differ in the names of sources that are one document in several domains: they stay together."""
    seed: Seed = 0
    """Of halves and random plans."""

    name: ClassVar[str] = "pruning"
    passes: ClassVar[tuple[str, ...]] = ("routing", "plans")

    def check(self, model: Any) -> None:
        """Refuse numbers that make no plan, and a model without an expert to spare."""
        if not 0 < self.share < 1 or self.random < 1:
            raise InputError(f"share is {self.share}, random is {self.random}; expected one in (0, 1), and at least 1")
        if self.gone(model.n_experts, model.top_k) < 1:
            raise UnfitError(
                f"this model chooses {model.top_k} of {model.n_experts} experts: of a share of {self.share} none can go"
            )

    def load(self, model: Any, name: str, reading: Reading, domains: Positive) -> Load:
        """Routing, or a clean run and one more without each plan."""
        if name == "routing":
            return Load.stacked(reading.tokens or 0, BATCH_TOKENS, logits=0)
        return load_without(model, reading, domains + len(SHARES) - 1 + self.random)

    def gone(self, n_experts: Positive, top_k: Positive, kind: str = PICKED) -> int:
        """How many experts of each layer go; of a kind of `SHARES`."""
        wanted = round(SHARES.get(kind, 1.0) * self.share * n_experts)
        return min(max(wanted, int(kind == HALF)), n_experts - top_k)

    def begin(self, model: Any, name: str) -> Gathered:
        """Empty counts, or sums of what is lost."""
        if name == "routing":
            return {"routing": RoutingStats(model.moe_layers, model.n_experts, model.top_k)}
        return {"pruned": CoalitionStats(HOW, [*SHARES, *[RANDOM] * self.random])}

    def prepare(self, model: Any, name: str, domain: str, earlier: Earlier) -> Any:  # noqa: ARG002
        """The plans of all domains, and the halves of the sources of the one that is read."""
        if name == "routing":
            return None
        results = {name: _routing(of["routing"]["routing"].result()) for name, of in earlier.items()}
        blocks = parallel_blocks({domain: of.sources for domain, of in results.items()}, self.parallel)
        halves = balanced_halves(blocks, self.seed)
        return list(results).index(domain), self._plans(results, halves), halves[domain]

    def _plans(
        self, results: Mapping[str, RoutingResult], halves: Mapping[str, Mapping[str, int]]
    ) -> Bool[Tensor, "2 domain plan layer n_experts"]:
        """Experts that are gone where a half is read; random plans are those of all halves and domains."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = self.random, *next(iter(results.values())).specialisation.shape
        random = self._least(torch.rand(shape, generator=generator), next(iter(results.values())).top_k)
        found = []
        for half in (0, 1):
            for domain, of in results.items():
                kept = [halves[domain][source] != half for source in of.sources]
                if not any(kept):
                    raise UnfitError(
                        f"domain {domain!r} has too few sources to choose experts on one half of them and read the "
                        "other without; give texts of two sources or more"
                    )
                worth = of_sources(of, kept).specialisation
                own = torch.stack([self._least(worth, of.top_k, kind) for kind in SHARES])
                found.append(torch.cat([own, random]))
        return torch.stack(found).unflatten(0, (2, len(results)))

    def _least(
        self, worth: Float[Tensor, "*some n_experts"], top_k: int, kind: str = PICKED
    ) -> Bool[Tensor, "*some n_experts"]:
        order = worth.argsort(dim=-1, stable=True)[..., : self.gone(worth.shape[-1], top_k, kind)]
        return torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, order, True)

    def step(self, model: Any, name: str, batch: TokenBatch, into: Gathered, prepared: Any) -> None:
        """Count routing; or read every plan of the own domain, and of the others' those of the study's own share."""
        if name == "routing":
            into["routing"].update(observe(model, batch))
            return
        own, plans, half = prepared
        read = torch.zeros(len(batch.sources), 1, *plans.shape[1:3], dtype=torch.bool)
        read[..., 0] = True
        read[:, :, own] = True
        into["pruned"].update(*read_without(model, batch, plans, half, read, HOW), read, batch.sources)

    def results(self, earlier: Mapping[str, Gathered]) -> dict[str, Result]:
        """Routing, and what is lost."""
        return {"routing": earlier["routing"]["routing"].result(), "pruned": earlier["plans"]["pruned"].result()}

    def tables(
        self,
        model: Mapping[str, Any],
        results: Mapping[str, Mapping[str, Result]],
    ) -> dict[str, pd.DataFrame]:
        """`pruning`: a row for each domain that is read, and each plan.

        Columns: domain; plan, the domain that it is for; kind, `picked` for it (`half` and `double` with half and twice
        as many experts, as far as a token's can be chosen) or `random`; gone, how many experts of each layer; number,
        of random plans; ratio of perplexities to the whole model with low and high, its 95 % interval over sources;
        tokens, sources.
        """
        rows = []
        for domain, of in results.items():
            effects = of["pruned"]
            assert isinstance(effects, CoalitionEffects)
            added, tokens = effects.of(*HOW)
            values, weights = added.double().flatten(1), tokens.double().flatten(1)

            def ratios(times: Tensor, values: Tensor = values, weights: Tensor = weights) -> Tensor:
                return ((times @ values) / (times @ weights)).exp()

            found = ratios(torch.ones(1, len(values), dtype=torch.float64))[0].view(added.shape[1:])
            ends = bootstrap_all(ratios, weights)
            low, high = (torch.full_like(found, torch.nan),) * 2 if ends is None else ends.view(2, *found.shape)
            own = list(results).index(domain)
            first = effects.kinds.index(RANDOM)
            plans = [(name, PICKED, 0, (d, 0)) for d, name in enumerate(results)]
            plans += [(domain, kind, 0, (own, i)) for i, kind in enumerate(effects.kinds[1:first], start=1)]
            plans += [(domain, RANDOM, n, (own, n + first)) for n in range(self.random)]
            read = {"tokens": int(effects.predicted.sum()), "sources": len(effects.sources)}
            rows += [
                {"domain": domain, "plan": name, "kind": kind, "number": n,
                 "gone": self.gone(model["experts"], model["top_k"], kind), "ratio": float(found[at]),
                 "low": float(low[at]), "high": float(high[at]), **read}
                for name, kind, n, at in plans
            ]  # fmt: skip
        return {"pruning": pd.DataFrame(rows)}


def _routing(result: Result) -> RoutingResult:
    assert isinstance(result, RoutingResult)
    return result
