"""The study `atlas`: a page for every expert. What chooses it, what it reads and writes, and what breaks without it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor

from moe_lens import names
from moe_lens.checked import Natural, Seed
from moe_lens.data import TokenBatch
from moe_lens.errors import InputError, UnfitError
from moe_lens.protocols import require_stream_width
from moe_lens.resampling import bootstrap_all
from moe_lens.routing import output_factors
from moe_lens.stats import (
    ActivationMeans,
    ImportanceStats,
    LossResult,
    LossStats,
    NeuronStats,
    OutputSimilarityStats,
    PairStats,
    Result,
    RoutingResult,
    RoutingStats,
    TokenSample,
    TokenSampleResult,
    VocabularyStats,
    chosen_for,
    explain_choices,
    observe,
)
from moe_lens.stats.parallel_sources import balanced_halves, parallel_blocks, parallel_key, too_few_sources
from moe_lens.studies import atlas_choice, atlas_knockouts, atlas_reading
from moe_lens.studies.atlas_contexts import TEXTS as SAMPLE
from moe_lens.studies.atlas_contexts import context_stats, contexts_table, count_contexts
from moe_lens.studies.explain import text_of
from moe_lens.studies.forward_passes import (
    COMPUTED,
    drawn_by_place,
    each_layer,
    forward,
    losses,
    predicted,
    token_places,
)
from moe_lens.studies.frames import by_domain
from moe_lens.studies.localisation_effects import CoalitionEffects, CoalitionStats
from moe_lens.studies.localisation_scores import ScoreResult, ScoreStats, scores_of
from moe_lens.studies.study import TEXTS, Earlier, Gathered, Study
from moe_lens.studies.texts_read import Texts

COMPARED_TOKENS = 256
"""Tokens of a domain on which every expert is computed, to compare their outputs."""
EXPLAINED_TOKENS = 2**11
"""Tokens of a domain whose choices are explained, drawn at random."""
TOKENS = "token_sample"
_CHUNK = 64
_BY_SOURCE = RoutingResult, LossResult, ScoreResult, CoalitionEffects


@dataclass(frozen=True)
class Atlas(Study):
    """What chooses each expert, what it reads and writes, and what breaks without it, with intervals and controls."""

    contexts: bool = True
    """Whether pieces of the texts are kept, and shown."""
    texts: tuple[str, ...] = ()
    """Further texts to show token by token."""
    knockout_tokens: Natural = 512
    """Tokens of a domain that are read without an expert: the beginning of every window."""
    seed: Seed = 0
    """Of halves, of random contexts and of controls."""

    name: ClassVar[str] = "atlas"
    passes: ClassVar[tuple[str, ...]] = ("choice", "outputs", "effects", "costliest")

    def check(self, model: Any) -> None:
        """Refuse narrow experts, a router that has no choice, empty and overlong texts, and knockout_tokens of 0."""
        require_stream_width(model, "what they write")
        if model.top_k == model.n_experts:
            raise UnfitError(f"this model always chooses all its {model.n_experts} experts: no choice is left to show")
        if self.knockout_tokens < 1:
            raise InputError(f"knockout_tokens is {self.knockout_tokens}; expected at least 1")
        for text in self.texts:
            if model.tokenizer is None or len(model.own_ids(text)[1]) < 1:
                raise InputError(f"the text {text!r} holds no token")
            if (length := sum(map(len, model.own_ids(text)))) > model.cfg.n_ctx:
                raise InputError(
                    f"the text {text[:60]!r}… has {length} tokens; the model's context is {model.cfg.n_ctx}"
                )

    def begin(self, model: Any, name: str) -> Gathered:
        """Empty counts and sums."""
        layers, n_experts, top_k = model.moe_layers, model.n_experts, model.top_k
        if name == "choice":
            counts: dict[str, Any] = {
                "routing": RoutingStats(layers, n_experts, top_k),
                "pairs": PairStats(layers, n_experts, top_k),
                "tokens": VocabularyStats(layers, n_experts, top_k, model.cfg.d_vocab),
            }
            if not self.contexts:
                return counts
            drawn = TokenSample(layers, n_experts, top_k, n=EXPLAINED_TOKENS)
            return counts | {TOKENS: drawn} | context_stats(len(layers) * n_experts)
        if name == "outputs":
            means = {f"means{half}": ActivationMeans(layers, n_experts, top_k, model.cfg.d_model) for half in (0, 1)}
            kinds = {"importance": ImportanceStats, "neurons": NeuronStats, "alike": OutputSimilarityStats}
            return means | {kind: of(layers, n_experts) for kind, of in kinds.items()}
        if name == "costliest":
            return {name: CoalitionStats([atlas_knockouts.HOW], atlas_knockouts.costliest_kinds())}
        singles = atlas_knockouts.singles(layers, n_experts)
        return {
            "first_order": ScoreStats(layers, n_experts),
            "first_order_beginnings": ScoreStats(layers, n_experts),
            "loss": LossStats(),
            "knockouts": CoalitionStats([atlas_knockouts.HOW], singles),
            "firsts": CoalitionStats([atlas_knockouts.HOW], singles),
            "controls": CoalitionStats([atlas_knockouts.HOW], atlas_knockouts.kinds(layers)),
        }

    def prepare(self, model: Any, name: str, domain: str, earlier: Earlier) -> Any:  # noqa: ARG002
        """Of the domain that is read: halves of its sources, or how far windows are read without which experts."""
        if name == "choice":
            return None
        texts = _texts(earlier[domain]["choice"][TEXTS].result())
        if name == "outputs":
            blocks = parallel_blocks(
                {name: _texts(of["choice"][TEXTS].result()).sources for name, of in earlier.items()}
            )
            return balanced_halves(blocks, self.seed)[domain], COMPARED_TOKENS / int(texts.tokens.sum())
        routing = {name: of["choice"]["routing"].result() for name, of in earlier.items()}
        own, columns = list(earlier).index(domain), -(-self.knockout_tokens // int(texts.windows.sum()))
        if name == "costliest":
            knocked = {name: of["effects"]["knockouts"].result() for name, of in earlier.items()}
            experts, _ = atlas_knockouts.costliest(routing, knocked)
            return own, atlas_knockouts.costliest_controls(routing, experts, self.seed), columns
        return own, atlas_knockouts.alone(routing), atlas_knockouts.controls(routing, self.seed), columns

    def step(self, model: Any, name: str, batch: TokenBatch, into: Gathered, prepared: Any) -> None:
        """Count choices, sum up outputs, or measure what experts are worth."""
        if name == "choice":
            routed = observe(model, batch)
            for kind in ("routing", "pairs", "tokens"):
                into[kind].update(routed)
            if self.contexts:
                count_contexts(into, routed, batch, self.seed)
                into[TOKENS].update(routed, **token_places(batch))
        elif name == "outputs":
            self._outputs(model, batch, into, *prepared)
        elif name == "costliest":
            own, controls, columns = prepared
            short = atlas_knockouts.beginning(batch, columns)
            into[name].update(*atlas_knockouts.measure(model, short, controls, own)[0], batch.sources)
        else:
            own, alone, controls, columns = prepared
            short = atlas_knockouts.beginning(batch, columns)
            for name, read in (("first_order", batch), ("first_order_beginnings", short)):
                into[name].update(*scores_of(model, read, "attribution"), batch.sources)
            for name, found in zip(("knockouts", "firsts"), atlas_knockouts.measure(model, short, alone), strict=True):
                into[name].update(*found, batch.sources)
            into["controls"].update(*atlas_knockouts.measure(model, short, controls, own)[0], batch.sources)
            into["loss"].update(losses(model, batch, []), predicted(batch), batch.sources)

    def _outputs(self, model: Any, batch: TokenBatch, into: Gathered, half: Mapping[str, int], rate: float) -> None:
        row_half = torch.tensor([half[source] for source in batch.sources])[:, None]
        sample = batch.counted & (drawn_by_place(batch, f"{self.seed} compared")[0, ..., 0] < rate)
        wanted = [names.RESID_MID, names.MLP_IN, COMPUTED, names.ROUTING_WEIGHTS]
        wanted += [names.EXPERT_OUT, names.EXPERT_POST]

        def sum_up(layer: int, of: dict[str, Tensor]) -> None:
            resid, read, indices, weights, outputs, inner = (batch.unpack(of[name]) for name in wanted)
            factors = output_factors(weights, model.family)
            for number in (0, 1):
                counted = batch.counted & (row_half == number)
                parts = (value.cpu() for value in (resid, outputs, factors, indices))
                into[f"means{number}"].update(layer, *parts, counted)
            into["importance"].update(layer, resid, outputs, weights, indices, batch.counted, factors)
            into["neurons"].update(layer, inner, indices, batch.counted)
            for part in read[sample.to(read.device)].split(_CHUNK):
                every = torch.arange(model.n_experts, device=part.device).expand(len(part), -1)
                into["alike"].update(layer, model.expert_outputs(layer, part, every).detach())

        forward(model, batch, each_layer(model, wanted, sum_up), blocks_only=True)

    def results(self, earlier: Mapping[str, Gathered]) -> dict[str, Result]:
        """All sums; means of those halves that hold any text."""
        kept = {name: sums for into in earlier.values() for name, sums in into.items() if name != TEXTS}
        empty = {name for name, sums in kept.items() if isinstance(sums, ActivationMeans) and not sums.seen}
        return {name: sums.result() for name, sums in kept.items() if name not in empty}

    def kept(self, results: Mapping[str, Result]) -> dict[str, Result]:
        """Sums by source alone: of the others, which take most of the room, the tables hold what there is to know."""
        return {name: result for name, result in results.items() if isinstance(result, _BY_SOURCE)}

    def tables(
        self,
        model: Mapping[str, Any],
        results: Mapping[str, Mapping[str, Result]],
    ) -> dict[str, pd.DataFrame]:
        """Tables of what was counted.

        `experts` (of all domains together), `domains` (by domain, with intervals, nulls and tests), `tokens` (those
        that choose an expert, by how much they add to its divergence from the base rate), `sent` (where each token is
        sent), `partners`, `pairs` (a layer's strongest), `knockouts`, `compared` and `controls` (see
        `atlas_knockouts.tables`), `quality` (loss of each domain, with low and high, 95 % over sources; uniform: if all
        tokens were alike; nats a token), and, if pieces of texts are kept, `contexts` and `explained` (what choices can
        be predicted from; missing where a domain has fewer than three sources).
        """
        tables = atlas_choice.tables(results, seed=self.seed)
        tables |= atlas_knockouts.tables(results, tuple(model["moe_layers"]), self.seed)
        tables["quality"] = by_domain({name: _quality(of["loss"], model) for name, of in results.items()})
        if self.contexts:
            tables["contexts"] = contexts_table(results, tuple(model["moe_layers"]), int(model["experts"]))
            if (samples := self._explained(results)) is not None:
                tables["explained"] = explain_choices(samples, **self._held()).to_frame()
        return tables

    def _held(self) -> dict[str, Any]:
        """What is held out together: sources of several domains that are one document."""
        return {"seed": self.seed, "parallel": parallel_key()}

    def _explained(self, results: Mapping[str, Mapping[str, Result]]) -> dict[str, TokenSampleResult] | None:
        """The tokens whose choices are explained; None where sources are too few to hold any out."""
        samples = atlas_choice.of_kind(results, TOKENS, TokenSampleResult)
        return None if too_few_sources({name: of.source for name, of in samples.items()}, parallel_key()) else samples

    def read_off(
        self, model: Any, results: Mapping[str, Mapping[str, Result]], tables: Mapping[str, pd.DataFrame]
    ) -> dict[str, pd.DataFrame]:
        """Tables of what only the model itself can tell.

        `writing` (tokens that an expert's mean output, its neurons and its router row point at), `neurons`, `nearest`
        (experts of like weights and outputs), `text_tokens` and `text_slots` (texts token by token), `words` (the
        texts of all tokens in any table), and beside `explained` `chosen_for`.
        """
        found = atlas_reading.tables(model, results)
        if self.contexts and (drawn := self._explained(results)) is not None:
            found["chosen_for"] = chosen_for(drawn, text_of(model), **self._held())
        samples = {name: of[SAMPLE] for name, of in results.items()} if self.contexts else {}
        found |= atlas_reading.shown_texts(model, samples, self.texts)
        return {**found, "words": atlas_reading.words(model, {**tables, **found})}


def _texts(result: Result) -> Texts:
    assert isinstance(result, Texts)
    return result


def _quality(result: Result, model: Mapping[str, Any]) -> pd.DataFrame:
    assert isinstance(result, LossResult)
    n = result.tokens.double()
    ends = bootstrap_all(lambda times: (times @ result.nats) / (times @ n), n)
    low, high = (math.nan, math.nan) if ends is None else ends.tolist()
    row = {"loss": result.loss, "low": low, "high": high, "uniform": math.log(model["vocabulary"])}
    return pd.DataFrame([{**row, "tokens": result.n_tokens, "sources": len(result.sources)}])
