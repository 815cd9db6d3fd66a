"""The rules of the verdicts: which quantities of a study answer which claim of the paper (arXiv 2603.05806)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from moe_lens.partial_sum import PartialSum
from moe_lens.stats import MEASURES, Result, RoutingResult, SimilarityResult, bootstrap, halves, load_evenness
from moe_lens.studies.lens import NONE, QUANTITIES, LensTotals
from moe_lens.studies.study_result import StudyResult
from moe_lens.studies.variant_losses import VariantLosses
from moe_lens.studies.verdict_bounds import Bound, OfDomain, Threshold, Verdict

RESAMPLES = 4000
"""Of sources: simultaneous intervals reach far into the tails."""

LEVEL = 0.95

Studies = Mapping[str, StudyResult]
Thresholds = Mapping[str, Threshold]
Times = Float[Tensor, "resample source"]
Statistic = Callable[[Times], Float[Tensor, " resample"]]
R = TypeVar("R", bound=Result)


class _Missing(Exception):
    """Something that a rule needs was not run."""


class _Bounds:
    """Makes bounds of one domain, with intervals that hold for all domains of the row together."""

    def __init__(self, sizes: Real[Tensor, " source"], domains: int, thresholds: Thresholds):
        self.sizes, self.level, self.thresholds = sizes, 1 - (1 - LEVEL) / domains, thresholds

    def __call__(self, what: str, statistic: Statistic, *, above: bool, threshold: str, control: bool = False) -> Bound:
        value = statistic(torch.ones(1, len(self.sizes), dtype=torch.float64))
        interval = bootstrap(statistic, self.sizes, level=self.level, resamples=RESAMPLES)
        low, high = (None, None) if interval is None else (interval.low, interval.high)
        return Bound(what, float(value[0]), low, high, above, self.thresholds[threshold], control)


def one_expert_above_half(studies: Studies, thresholds: Thresholds) -> Verdict:
    """Claim 1a: picked on one half of the sources, measured on the other, and reversed."""

    def bounds(of: Mapping[str, Result], domains: int, seed: int) -> Iterator[Bound]:
        own = _as(RoutingResult, of, "model routing")
        bound = _Bounds(own.tokens, domains, thresholds)
        tokens, picked = own.tokens.double(), _picked(own, seed)

        def mean(sums: Float[Tensor, " source"]) -> Statistic:
            return lambda times: (times @ sums) / (times @ tokens)

        share = _assigned(own, picked)
        yield bound("greatest share", mean(share), above=True, threshold="share")
        unigram, random = (_as(RoutingResult, of, f"{name} routing") for name in ("token_unigram", "random_router"))
        given_token = _aligned(unigram.assignments, unigram.sources, own.sources)
        less = share - given_token.flatten(1).gather(1, picked[:, None])[:, 0].double()
        yield bound("the same less that given the token", mean(less), above=True, threshold="nothing", control=True)
        drawn = _aligned(_assigned(random, _picked(random, seed)), random.sources, own.sources)
        yield bound("greatest share of a random router", mean(drawn), above=False, threshold="share", control=True)

    return _verdict(
        "1a",
        "one expert is active for more than half of a domain's tokens",
        "greatest share of an expert, picked on other sources, > .50; above the share given the token alone, and a "
        "random router's below .50",
        "routing",
        studies,
        bounds,
    )


def few_experts_take_half(studies: Studies, thresholds: Thresholds) -> Verdict:
    """Claim 1b: mean over layers."""

    def bounds(of: Mapping[str, Result], domains: int, seed: int) -> Iterator[Bound]:  # noqa: ARG001
        own = _as(RoutingResult, of, "model routing")
        bound = _Bounds(own.tokens, domains, thresholds)

        def share(counts: Float[Tensor, "source layer n_experts"]) -> Statistic:
            def of_all(times: Times) -> Float[Tensor, " resample"]:
                covering = load_evenness.experts_covering(torch.einsum("rs,sle->rle", times, counts), 0.5)
                return covering.double().mean(-1) / own.n_experts

            return of_all

        ours = share(own.assignments.double())
        yield bound("share of experts that take half", ours, above=False, threshold="experts for half")
        random = _as(RoutingResult, of, "random_router routing")
        theirs = share(_aligned(random.assignments.double(), random.sources, own.sources))
        yield bound(
            "the same less that of a random router",
            lambda times: ours(times) - theirs(times),
            above=False,
            threshold="nothing",
            control=True,
        )

    return _verdict(
        "1b",
        "very few experts take half of a domain's assignments",
        "experts for 50 % of assignments, mean over layers, ≤ E/8 †; fewer than with a random router",
        "routing",
        studies,
        bounds,
    )


def top_expert_is_the_ensemble(studies: Studies, thresholds: Thresholds) -> Verdict:
    """Claim 2: KL(ensemble ‖ lens), in nats, and agreement of the best token, means over layers with experts."""
    lens = studies.get("lens")
    plan = {} if lens is None else lens.manifest["plan"]

    def bounds(of: Mapping[str, Result], domains: int, seed: int) -> Iterator[Bound]:
        totals = _as(LensTotals, of, "lens")
        layers = torch.tensor([totals.layers.index(layer) for layer in plan["model"]["moe_layers"]])
        _, active, *_ = PartialSum.controls(plan["model"]["top_k"], seed=seed)
        bound = _Bounds(totals.tokens[:, layers[0], 0, 0], domains, thresholds)

        def mean(which: PartialSum, quantity: str) -> Callable[[Times], Float[Tensor, "resample layer"]]:
            at = totals.sums.index(which.label), list(QUANTITIES).index(quantity)
            above, below = (value[:, layers, at[0], at[1]].double() for value in (totals.totals, totals.tokens))
            return lambda times: (times @ above) / (times @ below)

        def left(which: PartialSum) -> Statistic:
            ours, none = mean(which, "kl_ensemble"), mean(NONE, "kl_ensemble")
            return lambda times: (ours(times) / none(times)).mean(-1)

        top = PartialSum(ranks=[0])
        agrees, matters = mean(top, "agrees_ensemble"), mean(top, "agrees_where_it_matters")
        yield bound(
            "agreement with the ensemble", lambda times: agrees(times).mean(-1), above=True, threshold="agreement"
        )
        yield bound(
            "KL(ensemble ‖ top) / KL(ensemble ‖ none)", left(top), above=False, threshold="KL left", control=True
        )
        ours, random = left(top), left(active)
        yield bound(
            "the same less that of a random active expert",
            lambda times: ours(times) - random(times),
            above=False,
            threshold="nothing",
            control=True,
        )
        yield bound(
            "agreement where the residual alone differs",
            lambda times: matters(times).nanmean(-1),
            above=True,
            threshold="agreement where it matters",
            control=True,
        )

    return _verdict(
        "2",
        "the top expert's output approximates the ensemble's prediction",
        "top-1 agreement of rank 0 with the ensemble ≥ .95 †; KL(ensemble ‖ u + g₁E₁) / KL(ensemble ‖ u) ≤ .10 † and "
        "below a random active expert's, agreement ≥ .90 † where u alone and the ensemble differ",
        "lens",
        studies,
        bounds,
    )


def cosine_is_high(studies: Studies, thresholds: Thresholds) -> Verdict:
    """Claim 3: of the layer that is greatest on other sources."""

    def bounds(of: Mapping[str, Result], domains: int, seed: int) -> Iterator[Bound]:
        found = _as(SimilarityResult, of, "similarity")
        half = _half(found.sources, seed)
        at = list(MEASURES).index("top")
        picked = torch.zeros(len(half), dtype=torch.long)
        for mine in (0, 1):
            there = half != mine
            means = found.sums[there].sum(0)[:, at] / found.tokens[there].sum(0)
            picked[half == mine] = means.argmax()
        every = torch.arange(len(half))
        sums, tokens = found.sums[every, picked].double(), found.tokens[every, picked].double()
        bound = _Bounds(tokens, domains, thresholds)

        def mean(measure: str) -> Statistic:
            column = sums[:, list(MEASURES).index(measure)]
            return lambda times: (times @ column) / (times @ tokens)

        top, none = mean("top"), mean("none")
        yield bound("cos(u + a₀, u + S)", top, above=True, threshold="cosine")
        yield bound(
            "(cos − cos_u) / (1 − cos_u)",
            lambda times: (top(times) - none(times)) / (1 - none(times)),
            above=True,
            threshold="cosine gained",
            control=True,
        )
        yield bound("cos(a₀, S − a₀)", mean("rest_top"), above=True, threshold="nothing", control=True)

    return _verdict(
        "3",
        "hidden states with one expert and with all are extremely similar",
        "greatest layer's mean cosine, picked on other sources, ≥ .95; (cos − cos_u) / (1 − cos_u) ≥ .90 †, and the "
        "leave-one-out cosine above that of independent directions, 0",
        "single_expert",
        studies,
        bounds,
    )


def perplexity_stays(studies: Studies, thresholds: Thresholds) -> Verdict:
    """Claim 4: paired by source, all layers at once."""

    def bounds(of: Mapping[str, Result], domains: int, seed: int) -> Iterator[Bound]:  # noqa: ARG001
        losses = _as(VariantLosses, of, "losses")
        tokens = losses.tokens.double()
        bound = _Bounds(tokens, domains, thresholds)

        def against_all(treatment: str) -> Statistic:
            if (treatment, None, 1) not in losses.variants:
                raise _Missing(f"one expert ({treatment}) was not run")
            lost = losses.nats[:, losses.variants.index((treatment, None, 1))] - losses.nats[:, 0]
            return lambda times: ((times @ lost) / (times @ tokens)).exp()

        ratio = against_all("dropped")
        yield bound("perplexity, k = 1 ÷ all", ratio, above=False, threshold="perplexity")
        random = against_all("random")
        yield bound(
            "the same less that of a random active expert",
            lambda times: ratio(times) - random(times),
            above=False,
            threshold="nothing",
            control=True,
        )

    return _verdict(
        "4",
        "perplexity increases by only 5 % with a single expert",
        "perplexity with one expert ÷ with all, paired by source, ≤ 1.05; below a random active expert's",
        "single_expert",
        studies,
        bounds,
    )


def pruning_is_free(studies: Studies, thresholds: Thresholds) -> Verdict:  # noqa: ARG001
    """Claim 5, which no study of a report measures yet."""
    estimate = (
        "perplexity with a quarter † of the experts out, scored on other sources, ÷ with all, ≤ 1.05 †; better than "
        "≥ 95 % of 40 random plans of its size"
    )
    return Verdict(
        "5", "experts can be pruned for a domain", estimate, True, missing="pruning on other sources was not run"
    )


def knowledge_is_localised(studies: Studies, thresholds: Thresholds) -> Verdict:  # noqa: ARG001
    """Claim 6, which no study of a report measures yet."""
    estimate = (
        "nats that a domain's own experts cost it more than others, less the same of matched coalitions, > 0; picked "
        "beats ≥ 95 % of 40 of them"
    )
    return Verdict("6", "knowledge sits in few experts", estimate, False, missing="localisation was not run")


RULES: tuple[Callable[[Studies, Thresholds], Verdict], ...] = (
    one_expert_above_half,
    few_experts_take_half,
    top_expert_is_the_ensemble,
    cosine_is_high,
    perplexity_stays,
    pruning_is_free,
    knowledge_is_localised,
)


def _verdict(
    key: str,
    claim: str,
    estimate: str,
    study: str,
    studies: Studies,
    bounds: Callable[[Mapping[str, Result], int, int], Iterable[Bound]],
) -> Verdict:
    """Apply a rule to every domain."""
    result = studies.get(study)
    if result is None:
        return Verdict(key, claim, estimate, True, missing=f"the study {study} was not run")
    seed = int(result.manifest["plan"]["settings"].get("seed", 0))
    domains = []
    for name, of in result.results.items():
        found: list[Bound] = []
        missing = ""
        try:
            for bound in bounds(of, len(result.results), seed):
                found.append(bound)  # noqa: PERF402  # those before something that was not run are kept
        except _Missing as error:
            missing = str(error)
        if not found:
            return Verdict(key, claim, estimate, True, missing=missing)
        read = next(row for row in result.manifest["read"] if row["name"] == name)
        domains.append(OfDomain(name, int(read["sources"]), tuple(found), missing))
    return Verdict(key, claim, estimate, True, tuple(domains))


def _as(kind: type[R], of: Mapping[str, Result], name: str) -> R:
    result = of.get(name)
    if result is None:
        raise _Missing(f"{name} was not run")
    assert isinstance(result, kind)
    return result


def _half(sources: tuple[str, ...], seed: int) -> Int[Tensor, " source"]:
    found = halves(sources, seed)
    return torch.tensor([found[source] for source in sources])


def _picked(result: RoutingResult, seed: int) -> Int[Tensor, " source"]:
    """Of each source the expert, numbered through the layers, that the other half of the sources uses most."""
    half = _half(result.sources, seed)
    picked = torch.zeros(len(half), dtype=torch.long)
    for mine in (0, 1):
        there = half != mine
        if bool(there.any()):
            picked[half == mine] = result.assignments[there].sum(0).flatten().argmax()
    return picked


def _assigned(result: RoutingResult, expert: Int[Tensor, " source"]) -> Float[Tensor, " source"]:
    """Tokens of each source that chose its expert."""
    return result.assignments.flatten(1).gather(1, expert[:, None])[:, 0].double()


def _aligned(
    values: Float[Tensor, "source *shape"], sources: tuple[str, ...], wanted: tuple[str, ...]
) -> Float[Tensor, "source *shape"]:
    """In the order of other sources, which are the same."""
    places = {source: i for i, source in enumerate(sources)}
    return values[torch.tensor([places[source] for source in wanted])]
