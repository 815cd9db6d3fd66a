"""The study `routing`: which experts each domain's tokens are sent to (arXiv 2603.05806, Figure 1)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import pandas as pd

from moe_lens.checked import Positive, Seed
from moe_lens.data import Reading, TokenBatch
from moe_lens.model.loading.batch_sizes import batch_tokens
from moe_lens.routing import LayerRouting
from moe_lens.stats import (
    PairResult,
    PairStats,
    Result,
    RoutedBatch,
    RoutingResult,
    RoutingStats,
    VocabularyResult,
    VocabularyStats,
    compare_domains,
    conditional_information,
    observe,
    standing_committee,
)
from moe_lens.stats.null_routing import experts_of_tokens, n_draws, permuted_experts, random_router_hooks
from moe_lens.stats.observation import routed as routing_of
from moe_lens.stats.parallel_sources import parallel_key
from moe_lens.studies.forecast import Load
from moe_lens.studies.forward_passes import drawn_by_place
from moe_lens.studies.frames import by_domain
from moe_lens.studies.study import TEXTS, Earlier, Gathered, Study

GROUPS = 64
"""Groups of sources that tokens are counted apart in: the units of what the domain says beyond the token."""

NULLS: dict[str, str] = {
    "random_router": "the router's rows are replaced by random directions of the same norms",
    "token_unigram": "each token draws experts as often as it chooses them in all domains, whatever its context",
    "uniform": "experts are drawn at random for each token and layer",
}
"""Routings in which the domain can matter through the texts alone, or not at all."""

MODEL, RANDOM = "model", "random_router"


def nulls_of(model: Any) -> tuple[str, ...]:
    """Those of `NULLS` that a model can have: a router that does not read what its experts read has no random one."""
    return tuple(null for null in NULLS if null != RANDOM or not model.family.reads_own)


R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class RoutingStudy(Study):
    """Load, specialisation, co-activation, persistence, vocabulary, and tests between domains, beside their nulls."""

    nulls: bool = False
    """Whether the nulls (`nulls_of` the model) are measured, too, which reads the texts once more."""
    seed: Seed = 0
    """Of the nulls, and of permutations."""
    parallel: str | None = None
    """A regular expression of what may differ in the names of sources that are one document in several domains, such
    as `parallel_sources.LANGUAGE`: pairs of domains that have such sources are compared on those, by swapping them."""

    name: ClassVar[str] = "routing"
    passes: ClassVar[tuple[str, ...]] = (MODEL, "nulls")
    keeps: ClassVar[bool] = False

    def chosen_passes(self) -> tuple[str, ...]:
        """The model's own routing, and the nulls' if they are asked for."""
        return self.passes if self.nulls else self.passes[:1]

    def load(self, model: Any, name: str, reading: Reading, domains: Positive) -> Load:  # noqa: ARG002
        """One forward pass; the model's own predictions are noted in the first."""
        tokens = reading.tokens or 0
        return Load.stacked(tokens, batch_tokens(model, kept=self.keeps), logits=tokens if name == MODEL else 0)

    def check(self, model: Any) -> None:  # noqa: ARG002
        """Refuse what is no regular expression."""
        if self.parallel is not None:
            parallel_key(self.parallel)

    def begin(self, model: Any, name: str) -> Gathered:
        """Counts of experts, of pairs of them, and of them by token."""
        if name == MODEL:
            return {**_counters(model, MODEL), **{f"{MODEL} {by}": _by(model, by) for by in ("next", "predicted")}}
        return {key: value for null in nulls_of(model) for key, value in _counters(model, null).items()}

    def prepare(self, model: Any, name: str, domain: str, earlier: Earlier) -> VocabularyResult | None:  # noqa: ARG002
        """For the null of tokens: how often each is sent where, in all domains together."""
        if name == MODEL:
            return None
        counts = VocabularyStats(*_size(model), model.cfg.d_vocab, groups=GROUPS)
        for of in earlier.values():
            counts.merge(_vocabulary(of[MODEL][f"{MODEL} input"]))
        return counts.result()

    def step(self, model: Any, name: str, batch: TokenBatch, into: Gathered, prepared: Any) -> None:
        """One forward pass."""
        if name == MODEL:
            routed = observe(model, batch, predicted=True)
            _count(into, MODEL, routed)
            for by in ("next", "predicted"):
                into[f"{MODEL} {by}"].update(routed)
            return
        random: dict[int, LayerRouting] = {}
        beside = random_router_hooks(model, random, self.seed) if f"{RANDOM} routing" in into else None
        routed = observe(model, batch, beside=beside)
        if random:
            _count(into, RANDOM, routing_of(model, batch, random))
        drawn = drawn_by_place(batch, f"{self.seed} token", len(model.moe_layers), n_draws(routed.routing))
        _count(into, "token_unigram", experts_of_tokens(routed, prepared, drawn))
        drawn = drawn_by_place(batch, f"{self.seed} uniform", len(model.moe_layers), model.n_experts)
        _count(into, "uniform", permuted_experts(routed, drawn))

    def results(self, earlier: Mapping[str, Gathered]) -> dict[str, Result]:
        """All results; the first word of a name is the routing."""
        return {name: into[name].result() for into in earlier.values() for name in into if name != TEXTS}

    def tables(
        self,
        model: Mapping[str, Any],  # noqa: ARG002
        results: Mapping[str, Mapping[str, Result]],
    ) -> dict[str, pd.DataFrame]:
        """Tables by domain, with the routing ("model", or one of `NULLS`) in the second column.

        `specialisation`, `most_specialised`, `layers`, `pairs` (of the model alone), `persistence`, `vocabulary`; and
        of two domains or more `domain_experts`, `domain_layers`, `domain_pairs`, the tests between them (of
        three or more `domain_nearer`, which of two others a domain is nearer to), and
        `given_token_layers`, `given_token_pairs`, what is left of them once the token is known; and of the model alone
        `committee`, `committee_layers`, the experts that carry most weight across domains, beside a random router's.
        """
        first = next(iter(results.values()))
        routings = [routing for routing in (MODEL, *NULLS) if f"{routing} routing" in first]
        found: dict[str, list[pd.DataFrame]] = {}
        for routing in routings:
            counts = {name: _as(RoutingResult, of[f"{routing} routing"]) for name, of in results.items()}
            pairs = {name: _as(PairResult, of[f"{routing} pairs"]) for name, of in results.items()}
            tokens = {name: _as(VocabularyResult, of[f"{routing} input"]) for name, of in results.items()}
            tables = {
                "specialisation": by_domain({name: of.to_frame() for name, of in counts.items()}),
                "most_specialised": by_domain({name: of.most_specialised() for name, of in counts.items()}),
                "layers": by_domain({name: of.per_layer() for name, of in counts.items()}),
                "persistence": by_domain({name: of.persistence() for name, of in pairs.items()}),
                "vocabulary": by_domain({name: of.per_layer().assign(by="input") for name, of in tokens.items()}),
            }
            if routing == MODEL:
                tables["pairs"] = by_domain({name: of.to_frame() for name, of in pairs.items()})
                for by in ("next", "predicted"):
                    of_token = {name: _as(VocabularyResult, of[f"{MODEL} {by}"]) for name, of in results.items()}
                    more = by_domain({name: of.per_layer().assign(by=by) for name, of in of_token.items()})
                    tables["vocabulary"] = pd.concat([tables["vocabulary"], more], ignore_index=True)
            if len(results) > 1:
                key = None if self.parallel is None else parallel_key(self.parallel)
                compared = compare_domains(counts, seed=self.seed, parallel=key)
                beyond = conditional_information(tokens, seed=self.seed)
                tables["domain_experts"] = compared.to_frame()
                tables["domain_layers"] = compared.per_layer()
                tables["domain_pairs"] = compared.per_pair()
                if len(results) > 2:
                    tables["domain_nearer"] = compared.nearest()
                tables["given_token_layers"] = beyond.to_frame()
                tables["given_token_pairs"] = beyond.per_pair()
            for name, table in tables.items():
                table.insert(min(1, len(table.columns)), "routing", routing)
                found.setdefault(name, []).append(table)
        tables = {name: pd.concat(parts, ignore_index=True) for name, parts in found.items()}
        return tables | self._committee(results)

    def _committee(self, results: Mapping[str, Mapping[str, Result]]) -> dict[str, pd.DataFrame]:
        """`committee` and `committee_layers`; none of one domain, or of domains that cannot be halved."""
        first = next(iter(results.values()))
        counts = {name: _as(RoutingResult, of[f"{MODEL} routing"]) for name, of in results.items()}
        if len(results) < 2 or any(len(of.sources) < 2 for of in counts.values()):
            return {}
        how = {"parallel": None if self.parallel is None else parallel_key(self.parallel), "seed": self.seed}
        found, control = standing_committee(counts, **how), None
        if f"{RANDOM} routing" in first:
            random = {name: _as(RoutingResult, of[f"{RANDOM} routing"]) for name, of in results.items()}
            control = standing_committee(random, **how)
        return {"committee": found.to_frame(control), "committee_layers": found.per_layer(control)}


def _vocabulary(accumulator: Any) -> VocabularyStats:
    assert isinstance(accumulator, VocabularyStats)
    return accumulator


def _size(model: Any) -> tuple[tuple[int, ...], int, int]:
    return model.moe_layers, model.n_experts, model.top_k


def _by(model: Any, by: Any) -> VocabularyStats:
    return VocabularyStats(*_size(model), model.cfg.d_vocab, by=by)


def _counters(model: Any, routing: str) -> dict[str, Any]:
    return {
        f"{routing} routing": RoutingStats(*_size(model)),
        f"{routing} pairs": PairStats(*_size(model)),
        f"{routing} input": VocabularyStats(*_size(model), model.cfg.d_vocab, groups=GROUPS),
    }


def _count(into: Gathered, routing: str, batch: RoutedBatch) -> None:
    for kind in ("routing", "pairs", "input"):
        into[f"{routing} {kind}"].update(batch)


def _as(kind: type[R], result: Result) -> R:
    assert isinstance(result, kind)
    return result
