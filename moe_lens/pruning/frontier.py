"""What smaller models cost: perplexity by method and number of experts kept, on texts that the plans have not seen."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.checked import AnyModel, Natural, Positive, Seed
from moe_lens.data import Domains, TokenBatch, Tokens, in_memory, tokenize
from moe_lens.errors import InputError
from moe_lens.model.families.expert_groups import Groups
from moe_lens.model.loading.batch_sizes import tokens_at_once, wants_few_passes
from moe_lens.pruning.merging import merge
from moe_lens.pruning.plan_from_scores import plan
from moe_lens.pruning.plans import Plan
from moe_lens.pruning.preview import hides_alone, side_by_side
from moe_lens.pruning.scores import Method, Scores
from moe_lens.pruning.scoring import score
from moe_lens.reprs import Drawn
from moe_lens.stats import LossResult, LossStats, Result
from moe_lens.stats.parallel_sources import balanced_halves, parallel_blocks
from moe_lens.studies.findings import Findings, across, repeated_texts, too_few
from moe_lens.studies.forward_passes import Hooks, input_device, losses, nothing, predicted
from moe_lens.studies.frames import where
from moe_lens.studies.texts_read import TextStats

ALL = "all"
"""Calibrated on all domains, each counting the same."""


class Point(NamedTuple):
    """A smaller model: how its experts were chosen, and how many of them there are."""

    method: str
    calibrated: str
    """The domain whose texts the scores are from, or `ALL`."""
    treatment: str
    """Of the other experts: "dropped" or "merged"."""
    kept: int
    """Experts of a layer, mean over layers if they differ."""
    top_k: int
    """Experts active per token."""


@dataclass(frozen=True, eq=False)
class Frontier(Drawn, Result):
    """Losses of smaller models, by source; every source was judged by plans made from other sources."""

    points: tuple[tuple[str, str, str, int, int], ...]
    """As `Point`; the first is the whole model."""
    n_experts: Positive
    domains: tuple[str, ...]
    sources: tuple[tuple[str, ...], ...]
    """Of each domain; the tensors hold those of all domains one after another."""
    nats: Float[Tensor, "point source"]
    tokens: Int[Tensor, " source"]
    row_losses: Float[Tensor, "point source"]
    rows: Int[Tensor, " source"]
    repeated: tuple[Natural, ...] = ()
    """Texts of each domain that several sources have: plans may have been judged on what they were made from."""

    def of(self, point: Point | tuple[str, str, str, int, int], domain: str) -> LossResult:
        """The loss of a smaller model in a domain.

        Raises:
            InputError: it was not measured.
        """
        if tuple(point) not in self.points or domain not in self.domains:
            raise InputError(f"{tuple(point)} was not measured in {domain!r}; see points and domains")
        number, at = self.points.index(tuple(point)), self.domains.index(domain)
        start = sum(map(len, self.sources[:at]))
        cut = slice(start, start + len(self.sources[at]))
        return LossResult(
            self.sources[at], self.nats[number, cut], self.tokens[cut], self.row_losses[number, cut], self.rows[cut]
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per smaller model and domain.

        Columns: method, calibrated, treatment, kept (experts a layer), share (of the experts), top_k, domain, loss
        (nats a token), perplexity and its 95 % interval over sources, ratio to the whole model and its paired
        interval, tokens, sources. Intervals are missing where there are fewer than `MIN_SOURCES` sources.
        """
        rows = []
        for point, domain in product(self.points, self.domains):
            found, whole = self.of(point, domain), self.of(self.points[0], domain)
            alone, paired = found.interval(), found.ratio_interval(whole)
            rows.append(
                {
                    **Point(*point)._asdict(),
                    "share": point[3] / self.n_experts,
                    "domain": domain,
                    "loss": found.loss,
                    "perplexity": found.perplexity,
                    "low": alone.low if alone else None,
                    "high": alone.high if alone else None,
                    "ratio": found.ratio(whole),
                    "ratio_low": paired.low if paired else None,
                    "ratio_high": paired.high if paired else None,
                    "tokens": found.n_tokens,
                    "sources": len(found.sources),
                }
            )
        return pd.DataFrame(rows)

    def findings(self) -> Findings:
        """What each method costs by number of experts kept: the least and the greatest ratio over domains."""
        table: Any = self.to_frame()
        ends, experts = ("ratio_low", "ratio_high"), self.n_experts
        small = table[table["method"] != self.points[0][0]]
        lines = [f"perplexity × of each domain by experts kept, of {experts} a layer (frontier.parquet):"]
        for (method, calibrated, treatment), rows in small.groupby(["method", "calibrated", "treatment"], sort=False):
            how = f", {calibrated}'s texts" * (calibrated != ALL) + f", {treatment}" * (treatment != "dropped")
            active = {*rows["top_k"]} - {self.points[0][4]}
            how += f", {', '.join(map(str, sorted(active)))} active" * bool(active)
            kept = (f"{n}: {across(where(rows, kept=n), 'ratio', ends)}" for n in sorted(set(rows["kept"])))
            lines.append(f"  {method}{how}  {';  '.join(kept)}")
        about = f"frontier of {experts} experts a layer on {', '.join(self.domains)}"
        then = "moe-lens report --model FOLDER/model, the same studies of the smaller model"
        sources = {name: len(of) for name, of in zip(self.domains, self.sources, strict=True)}
        warnings = too_few(sources) + repeated_texts(dict(zip(self.domains, self.repeated, strict=False)))
        return Findings(tuple(lines), warnings, then, about)


def halved(
    domains: Domains, model: AnyModel, *, n_tokens: Positive, context: Positive, seed: Seed = 0
) -> tuple[tuple[Tokens, ...], tuple[Tokens, ...]]:
    """Each domain's texts, divided by source into two halves of about `n_tokens` / 2 each.

    Sources that are parallel, as translations of a document are, are in the same half: their names differ in a language
    code between slashes alone.

    Raises:
        InputError: a domain has a single source, or sources that are parallel only: nothing in it is independent of
            the rest.
    """
    several = in_memory(domains)
    blocks = parallel_blocks({domain.name: sorted({p.source for p in domain.passages}) for domain in several})
    sides = balanced_halves(blocks, seed)
    for name, of in sides.items():
        if len(set(of.values())) < 2:
            raise InputError(
                f"domain {name!r} has a single source, so that there is no other to measure on (sources whose names "
                'differ in a language code alone are one); give passages their "source"'
            )
    parts: tuple[list[Tokens], list[Tokens]] = [], []
    for domain in several:
        side = sides[domain.name]
        for number, part in enumerate(parts):
            own = replace(domain, passages=tuple(p for p in domain.passages if side[p.source] == number))
            part.append(tokenize(own, model, n_tokens=max(2, n_tokens // 2), context=context, seed=seed))
    return tuple(parts[0]), tuple(parts[1])


class _Judge:
    """Adds up losses of smaller models, by domain and source."""

    def __init__(self, domains: Sequence[str]):
        self.domains = tuple(domains)
        self.sums: dict[Point, dict[str, LossStats]] = {}

    @torch.no_grad()
    def judge(self, made: Mapping[Point, Plan | None], model: Any, texts: Sequence[Tokens], on_batch: Any) -> None:
        """Measure plans (None: the whole model) on one half of the texts."""
        for point in made:
            self.sums.setdefault(point, {domain: LossStats() for domain in self.domains})
        few = wants_few_passes(model)
        shared = [point for point, of in made.items() if few and (of is None or hides_alone(of, model))]
        self._judge_together(shared, [made[point] for point in shared], model, texts, on_batch)
        for point, of in made.items():
            if point in shared:
                continue
            with nullcontext() if of is None else of.preview(model):
                for domain in texts:
                    for batch in domain:
                        found = losses(model, batch, [])
                        self.sums[point][domain.domain].update(found, predicted(batch), batch.sources)
                        on_batch()

    def _judge_together(
        self, points: Sequence[Point], plans: Sequence[Plan | None], model: Any, texts: Sequence[Tokens], on_batch: Any
    ) -> None:
        """Measure plans that can share passes: a batch has its rows once for each of them."""
        most = tokens_at_once(model, input_device(model))
        for name, batch in ((domain.domain, batch) for domain in texts for batch in domain):
            at_once = max(1, most // batch.tokens.numel())
            for first in range(0, len(points), at_once):
                some = points[first : first + at_once]
                hooks: Hooks = [*side_by_side(plans[first : first + at_once], model)]
                found = losses(model, _repeated(batch, len(some)), hooks).split(len(batch.tokens))
                for point, of in zip(some, found, strict=True):
                    self.sums[point][name].update(of, predicted(batch), batch.sources)
                on_batch()

    def frontier(self, n_experts: int) -> Frontier:
        """What was added up."""
        found = {point: [by[domain].result() for domain in self.domains] for point, by in self.sums.items()}
        first = next(iter(found.values()))
        return Frontier(
            points=tuple(found),
            n_experts=n_experts,
            domains=self.domains,
            sources=tuple(result.sources for result in first),
            nats=torch.stack([torch.cat([result.nats for result in results]) for results in found.values()]),
            tokens=torch.cat([result.tokens for result in first]),
            row_losses=torch.stack([torch.cat([r.row_losses for r in results]) for results in found.values()]),
            rows=torch.cat([result.rows for result in first]),
        )


def _repeated(batch: TokenBatch, times: int) -> TokenBatch:
    """The batch's rows over and over, each read by itself."""
    tensors = {name: getattr(batch, name).repeat(times, 1) for name in ("tokens", "mask", "counted")}
    return replace(batch, **tensors, sources=batch.sources * times, windows=batch.windows * times, packing=None)


def frontier(
    model: AnyModel,
    texts: tuple[Sequence[Tokens], Sequence[Tokens]],
    methods: Sequence[Method],
    keep: Sequence[float | int],
    *,
    merged: Sequence[Method] = (),
    specialists: Method | None = None,
    top_k: Sequence[int] = (),
    pruned_top_k: Positive | None = None,
    seed: Seed = 0,
    on_batch: Callable[[], None] = nothing,
) -> Frontier:
    """Perplexity of smaller models, cross-fitted: plans made from one half of the sources are judged on the other.

    Args:
        model: A `HookedMoE`; nothing is written and no parameter is changed for good.
        texts: Two halves of every domain, as `halved` makes them.
        methods: How experts are chosen to stay; see `METHODS`.
        keep: How many: shares of the experts or numbers a layer.
        merged: Methods whose plans are also measured with pruned experts merged instead of dropped.
        specialists: The method by which, besides, models for a single domain are made; merged, too, if `merged` has it.
        top_k: Numbers of active experts that are measured with all experts kept.
        pruned_top_k: Active experts of every model with fewer experts: as many as of the whole model if not given.
        seed: Of the method `"random"`, which draws the same experts for both halves.
        on_batch: Called after every batch of every pass.

    Raises:
        InputError: no method, one for merging that has no plans here, or halves of other domains; see also `score`
            and `plan`.
    """
    if not methods:
        raise InputError("methods is empty; give at least one")
    if other := [method for method in merged if method not in methods]:
        raise InputError(f"merged names {other[0]!r}, which is not among the methods {list(methods)}")
    names = [[tokens.domain for tokens in half] for half in texts]
    if len(names) != 2 or names[0] != names[1]:
        raise InputError(f"texts are of the domains {names}; expected two halves of the same ones, as of `halved`")
    if specialists and ALL in names[0]:
        raise InputError(f"a domain is called {ALL!r}, which stands for all domains together here; rename it")
    whole = Point("all experts", ALL, "dropped", model.n_experts, model.top_k)
    judge = _Judge(names[0])
    for seen, unseen in (texts, texts[::-1]):
        scores: dict[Method, Scores] = {
            method: score(model, seen, method, seed=seed if method == "random" else None, on_batch=on_batch)
            for method in _needed(methods, specialists)
        }
        made: dict[Point, Plan | None] = {whole: None}
        made |= _plans(model, scores, seen, methods, keep, merged, specialists, pruned_top_k, on_batch)
        for k in (k for k in dict.fromkeys(top_k) if k != model.top_k):
            made[whole._replace(top_k=k)] = plan(next(iter(scores.values())), top_k=k)
        judge.judge(made, model, unseen, on_batch)
    read = {domain: TextStats() for domain in judge.domains}
    for tokens in (*texts[0], *texts[1]):
        for batch in tokens:
            read[tokens.domain].update(batch)
    return replace(judge.frontier(model.n_experts), repeated=tuple(of.result().repeated for of in read.values()))


def _needed(methods: Sequence[Method], specialists: Method | None) -> list[Method]:
    return list(dict.fromkeys([*methods, *([specialists] if specialists else [])]))


def _plans(
    model: Any,
    scores: Mapping[Method, Scores],
    seen: Sequence[Tokens],
    methods: Sequence[Method],
    keep: Sequence[float | int],
    merged: Sequence[Method],
    specialists: Method | None,
    top_k: int | None,
    on_batch: Callable[[], None],
) -> dict[Point, Plan]:
    """All plans of one half, each once: a model that is judged twice would count its texts twice."""
    made: dict[Point, Plan] = {}
    groups = Groups.of_model(model)

    def even(method: Method, count: float | int, domain: str | None = None) -> Plan:
        """A plan that the model's config has words for."""
        chosen = plan(scores[method], count, domain=domain, top_k=top_k)
        return chosen if groups is None else chosen.uniform(groups.number)

    for method, count in product(methods, keep):
        dropping = even(method, count)
        point = Point(method, ALL, "dropped", len(dropping.kept[0]), dropping.top_k)
        made[point] = dropping
        if method in merged and (both := point._replace(treatment="merged")) not in made:
            made[both] = merge(dropping, model, seen, on_batch=on_batch)
    for domain, count in product([tokens.domain for tokens in seen] if specialists else [], keep):
        assert specialists is not None
        special = even(specialists, count, domain)
        point = Point(specialists, domain, "dropped", len(special.kept[0]), special.top_k)
        made[point] = special
        if specialists in merged:
            made[point._replace(treatment="merged")] = merge(special, model, seen, on_batch=on_batch)
    return made
