"""The claims of the paper (arXiv 2603.05806), and which quantities of a study answer each of them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

import pandas as pd
import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from moe_lens.partial_sum import PartialSum
from moe_lens.stats import MEASURES, RoutingResult, SimilarityResult, halves, load_evenness
from moe_lens.studies.claim_rules import NotRun, Read, Rule, Statistic, Times
from moe_lens.studies.frames import where
from moe_lens.studies.lens import NONE, QUANTITIES, LensTotals
from moe_lens.studies.localisation import contrast
from moe_lens.studies.localisation_effects import CoalitionEffects
from moe_lens.studies.matched_coalitions import PICKED, RANDOM, beaten
from moe_lens.studies.pruning_study import DOUBLE, HALF
from moe_lens.studies.study_result import StudyResult
from moe_lens.studies.variant_losses import VariantLosses
from moe_lens.studies.verdict_answers import Bound


def one_expert_above_half(read: Read) -> Iterator[Bound]:
    """Claim 1a: picked on one half of the sources, measured on the other, and reversed."""
    own = read.result(RoutingResult, "model routing")
    tokens, picked = own.tokens.double(), _picked(own, read.seed)

    def mean(sums: Float[Tensor, " source"]) -> Statistic:
        return lambda times: (times @ sums) / (times @ tokens)

    share = _assigned(own, picked)
    yield read.bound("greatest share", mean(share), tokens, above=True, threshold="share")
    unigram = read.result(RoutingResult, "token_unigram routing")
    given_token = _aligned(unigram.assignments, unigram.sources, own.sources)
    less = share - given_token.flatten(1).gather(1, picked[:, None])[:, 0].double()
    yield read.bound(
        "greatest share − its share by the token alone",
        mean(less),
        tokens,
        above=True,
        threshold="nothing",
        control=True,
    )
    random = read.result(RoutingResult, "random_router routing")
    drawn = _aligned(_assigned(random, _picked(random, read.seed)), random.sources, own.sources)
    yield read.bound("greatest share of a random router", mean(drawn), tokens, threshold="share", control=True)


def few_experts_take_half(read: Read) -> Iterator[Bound]:
    """Claim 1b: mean over layers."""
    own = read.result(RoutingResult, "model routing")

    def share(counts: Float[Tensor, "source layer n_experts"]) -> Statistic:
        def of_all(times: Times) -> Float[Tensor, " resample"]:
            covering = load_evenness.experts_covering_in_part(torch.einsum("rs,sle->rle", times, counts), 0.5)
            return covering.mean(-1) / own.n_experts

        return of_all

    ours = share(own.assignments.double())
    yield read.bound("share of experts for half", ours, own.tokens, threshold="experts for half", biased=True)
    random = read.result(RoutingResult, "random_router routing")
    theirs = share(_aligned(random.assignments.double(), random.sources, own.sources))
    less = _less(ours, theirs)
    what = "share of experts for half − a random router's"
    yield read.bound(what, less, own.tokens, threshold="nothing", control=True, biased=True)


def top_expert_is_the_ensemble(read: Read) -> Iterator[Bound]:
    """Claim 2: KL(ensemble ‖ lens), in nats, and agreement of the best token, means over layers with experts."""
    totals = read.result(LensTotals, "lens")
    model = read.plan["model"]
    layers = torch.tensor([totals.layers.index(layer) for layer in model["moe_layers"]])
    _, active, *_ = PartialSum.controls(model["top_k"], seed=read.seed)
    sizes = totals.tokens[:, layers[0], 0, 0]

    def mean(which: PartialSum, quantity: str) -> Callable[[Times], Float[Tensor, "resample layer"]]:
        at = totals.sums.index(which.label), list(QUANTITIES).index(quantity)
        above, below = (value[:, layers, at[0], at[1]].double() for value in (totals.totals, totals.tokens))
        return lambda times: (times @ above) / (times @ below)

    def left(which: PartialSum) -> Statistic:
        ours, none = mean(which, "kl_ensemble"), mean(NONE, "kl_ensemble")
        return lambda times: (ours(times) / none(times)).mean(-1)

    top = PartialSum(ranks=[0])
    agrees, matters = mean(top, "agrees_ensemble"), mean(top, "agrees_where_it_matters")
    yield read.bound(
        "agreement with the ensemble", lambda t: agrees(t).mean(-1), sizes, above=True, threshold="agreement"
    )
    what = "KL ratio: KL(ensemble ‖ u + g₀E₀) / KL(ensemble ‖ u)"
    yield read.bound(what, left(top), sizes, threshold="KL left", control=True)
    at = totals.sums.index(top.label), list(QUANTITIES).index("agrees_where_it_matters")
    yield read.bound(
        "agreement where u alone differs from the ensemble",
        lambda times: matters(times).nanmean(-1),
        totals.tokens[:, layers, *at].sum(1),
        above=True,
        threshold="agreement where it matters",
        control=True,
    )
    _need_others(read)
    less = _less(left(top), left(active))
    yield read.bound("KL ratio − a random active expert's", less, sizes, threshold="nothing", control=True)


def cosine_is_high(read: Read) -> Iterator[Bound]:
    """Claim 3: of the layer that is greatest on other sources."""
    found = read.result(SimilarityResult, "similarity")
    half = _half(found.sources, read.seed)
    at = list(MEASURES).index("top")
    picked = torch.zeros(len(half), dtype=torch.long)
    for mine in (0, 1):
        there = half != mine
        means = found.sums[there].sum(0)[:, at] / found.tokens[there].sum(0)
        picked[half == mine] = means.argmax()
    every = torch.arange(len(half))
    sums, tokens = found.sums[every, picked].double(), found.tokens[every, picked].double()

    def mean(measure: str) -> Statistic:
        column = sums[:, list(MEASURES).index(measure)]
        return lambda times: (times @ column) / (times @ tokens)

    top, none = mean("top"), mean("none")
    yield read.bound("cos(u + a₀, u + S)", top, tokens, above=True, threshold="cosine")
    yield read.bound(
        "(cos − cos_u) / (1 − cos_u)",
        lambda times: (top(times) - none(times)) / (1 - none(times)),
        tokens,
        above=True,
        threshold="cosine gained",
        control=True,
    )
    _need_others(read)
    yield read.bound("cos(a₀, S − a₀)", mean("rest_top"), tokens, above=True, threshold="nothing", control=True)


def perplexity_stays(read: Read) -> Iterator[Bound]:
    """Claim 4: paired by source, all layers at once."""
    _need_others(read)
    losses = read.result(VariantLosses, "losses")
    ratio = _ratio(losses, "dropped", 1)
    yield read.bound("perplexity ratio, k = 1 ÷ all", ratio, losses.tokens, threshold="perplexity")
    less = _less(ratio, _ratio(losses, "random", 1))
    what = "perplexity ratio − a random active expert's"
    yield read.bound(what, less, losses.tokens, threshold="nothing", control=True)


def pruning_is_free(read: Read) -> Iterator[Bound]:
    """Claim 5: a plan made on other sources of the domain, beside random plans of its size.

    At half and double the distance stand plans with half and double the share; studies of earlier versions have none.
    """
    effects = read.result(CoalitionEffects, "pruned")
    own = list(read.study.results).index(read.domain)
    added, tokens = (values[:, own].double() for values in effects.of("prune"))

    def ratios(times: Times) -> Float[Tensor, "resample plan"]:
        return ((times @ added) / (times @ tokens)).exp()

    def bound(kind: str, what: str) -> Bound:
        at = effects.kinds.index(kind)
        return read.bound(what, lambda times: ratios(times)[:, at], effects.predicted, threshold="pruned perplexity")

    what = "perplexity, pruned ÷ whole"
    shares = [kind for kind in (HALF, DOUBLE) if kind in effects.kinds]
    others = tuple(bound(kind, f"{what}, {kind} the share") for kind in shares)
    own_ratio = replace(bound(PICKED, what), others=others)
    yield own_ratio
    found = ratios(torch.ones(1, len(added), dtype=torch.float64))[0]
    picked = float(found[effects.kinds.index(PICKED)])
    random = found[[kind == RANDOM for kind in effects.kinds]]
    yield read.beaten(f"share of {len(random)} random plans beaten", beaten(-random, -picked), own_ratio)


def knowledge_is_localised(read: Read) -> Iterator[Bound]:
    """Claim 6: the primary contrast, in nats a token."""
    table = where(_contrast(read.study, read.level), domain=read.domain, control="matched")
    row = where(table, how=read.plan["settings"]["how"][0]).to_dict("records")[0]
    if not row["controls"]:
        raise NotRun("no matched coalition was found")
    low, high = (None if row[end] != row[end] else row[end] for end in ("low", "high"))
    what = "contrast (Δ own − Δ others), picked − matched"
    beyond = Bound(what, row["estimate"], low, high, True, read.thresholds["nothing"], control=True)
    yield beyond
    yield read.beaten(f"share of {row['controls']} matched coalitions beaten", row["beaten"], beyond)


RULES: tuple[Rule, ...] = (
    Rule(
        "1a",
        "one expert is active for more than half of a domain's tokens",
        "greatest share of an expert, picked on other sources, > .50; above its share by the token alone, and a "
        "random router's below .50",
        "routing",
        one_expert_above_half,
    ),
    Rule(
        "1b",
        "very few experts receive half of a domain's assignments",
        "experts for 50 % of assignments, the last in part, mean over layers, ≤ E/8 †; fewer than with a random router",
        "routing",
        few_experts_take_half,
    ),
    Rule(
        "2",
        "the top expert's output approximates the ensemble's prediction",
        "top-1 agreement of rank 0 with the ensemble ≥ .95 †; KL(ensemble ‖ u + g₀E₀) / KL(ensemble ‖ u) ≤ .10 † and "
        "below a random active expert's, agreement ≥ .90 † where u alone and the ensemble differ",
        "lens",
        top_expert_is_the_ensemble,
    ),
    Rule(
        "3",
        "hidden states with one expert and with all are extremely similar",
        "greatest layer's mean cosine, picked on other sources, ≥ .95; (cos − cos_u) / (1 − cos_u) ≥ .90 †, and the "
        "leave-one-out cosine above that of independent directions, 0",
        "single_expert",
        cosine_is_high,
    ),
    Rule(
        "4",
        "perplexity increases by only 5 % with a single expert",
        "perplexity with one expert ÷ with all, paired by source, ≤ 1.05; below a random active expert's",
        "single_expert",
        perplexity_stays,
    ),
    Rule(
        "5",
        "experts can be pruned for a domain",
        "perplexity without a quarter † of the experts, scored on other sources, ÷ with all, ≤ 1.05 †; better than "
        "≥ 95 % of 40 random plans of its size (at half and double the distance: without an eighth and a half)",
        "pruning",
        pruning_is_free,
    ),
    Rule(
        "6",
        "knowledge sits in few experts",
        "contrast: increase of the domain's own loss without its experts − mean increase of the other domains' losses; "
        "minus the contrast of matched coalitions, > 0; beats ≥ 95 % of 40 of them",
        "localisation",
        knowledge_is_localised,
        has_number=False,
    ),
)


@lru_cache(maxsize=1)  # of all domains
def _contrast(study: StudyResult, level: float) -> pd.DataFrame:
    return contrast(study, level)


def _less(ours: Statistic, theirs: Statistic) -> Statistic:
    return lambda times: ours(times) - theirs(times)


def _need_others(read: Read) -> None:
    if read.plan["model"]["top_k"] == 1:
        raise NotRun("a token has one active expert, and there are no others")


def _ratio(losses: VariantLosses, treatment: str, k: int) -> Statistic:
    """Perplexity of a variant ÷ the whole model's, paired by source."""
    if (treatment, None, k) not in losses.variants:
        raise NotRun(f"{treatment} with k = {k} was not run")
    difference = losses.of(treatment, k).nats - losses.nats[:, 0]
    tokens = losses.tokens.double()
    return lambda times: ((times @ difference) / (times @ tokens)).exp()


def _half(sources: tuple[str, ...], seed: int) -> Int[Tensor, " source"]:
    if len(sources) < 2:
        raise NotRun("all text is of one source, and nothing can be picked on others")
    found = halves(sources, seed)
    return torch.tensor([found[source] for source in sources])


def _picked(result: RoutingResult, seed: int) -> Int[Tensor, " source"]:
    """Of each source the expert, numbered through the layers, that the other half of the sources uses most."""
    half = _half(result.sources, seed)
    picked = torch.zeros(len(half), dtype=torch.long)
    for mine in (0, 1):
        picked[half == mine] = result.assignments[half != mine].sum(0).flatten().argmax()
    return picked


def _assigned(result: RoutingResult, expert: Int[Tensor, " source"]) -> Float[Tensor, " source"]:
    """Tokens of each source that chose its expert."""
    return result.assignments.flatten(1).gather(1, expert[:, None])[:, 0].double()


def _aligned(
    values: Real[Tensor, "source *shape"], sources: tuple[str, ...], wanted: tuple[str, ...]
) -> Real[Tensor, "source *shape"]:
    """In the order of other sources, which are the same."""
    places = {source: i for i, source in enumerate(sources)}
    return values[torch.tensor([places[source] for source in wanted])]
