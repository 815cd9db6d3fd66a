"""Verdicts: true of planted truths, false of shuffled ones, undecided of what was not measured."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import HookedMoE, PartialSum
from moe_lens.data import Reading
from moe_lens.errors import InputError
from moe_lens.report.verdict_words import shown
from moe_lens.stats import MEASURES, Result, RoutingResult, SimilarityResult, bootstrap, load_evenness
from moe_lens.studies import (
    LensStudy,
    Localisation,
    PruningStudy,
    RoutingStudy,
    SingleExpertStudy,
    StudyResult,
    Verdicts,
    judge,
    run,
)
from moe_lens.studies.frames import where
from moe_lens.studies.lens import QUANTITIES, LensTotals
from moe_lens.studies.localisation_effects import CoalitionEffects
from moe_lens.studies.variant_losses import VariantLosses
from moe_lens.studies.verdict_answers import Bound, OfDomain, Threshold, over_domains, together
from tests.planted import LAYER, PLANTED, planted_domains, planted_model

EXPERTS, TOP_K, SOURCES = 16, 2, 12
ROUNDING = 1e-6  # relative, of divergences of 1e-4 nats, in float64; in float32 it is up to 5 %, by processor
LAYERS = (1, 2)
DOMAINS = ("a", "b")
NAMES = tuple(f"s{i:02d}" for i in range(SOURCES))


def counts(generator: torch.Generator, served: Tensor | None, tokens: Tensor) -> RoutingResult:
    """Two experts of each token; `served` are those that the domain's tokens go to in nine of ten cases."""
    table = torch.zeros(SOURCES, len(LAYERS), EXPERTS, dtype=torch.long)
    for i, n in enumerate(tokens.tolist()):
        logits = torch.randn(len(LAYERS), n, EXPERTS, generator=generator)
        if served is not None:
            logits[torch.rand(len(LAYERS), n, generator=generator) < 0.9] += 9 * served
        chosen = logits.topk(TOP_K).indices
        table[i] = torch.nn.functional.one_hot(chosen, EXPERTS).sum((1, 2))
    nothing = torch.zeros(SOURCES, len(LAYERS), 2)
    return RoutingResult(LAYERS, TOP_K, NAMES, tokens, table, table, table.double(), nothing, nothing.long())


def made(truth: bool, **changes: Any) -> dict[str, StudyResult]:
    """Studies of a model in which expert 3 serves domain a, expert 5 domain b, and the first expert does all the work.

    Shuffled, not `truth`: the domain decides nothing, and the first expert is one of two that do as much.
    """
    generator = torch.Generator().manual_seed(0)
    results: dict[str, dict[str, dict[str, Result]]] = {"routing": {}, "single_expert": {}, "lens": {}}
    sums = (*PartialSum.figure2(TOP_K), *PartialSum.controls(TOP_K))
    labels = tuple(dict.fromkeys(which.label for which in sums))
    for domain, expert in zip(DOMAINS, (3, 5), strict=True):
        tokens = torch.randint(60, 100, (SOURCES,), generator=generator)
        served = torch.zeros(EXPERTS).index_fill_(0, torch.tensor([expert, 8 + expert]), 1.0)
        both = torch.zeros(EXPERTS).index_fill_(0, torch.tensor([3, 5]), 0.05)  # a token alone does not know the domain
        results["routing"][domain] = {
            "model routing": counts(generator, served if truth else None, tokens),
            "token_unigram routing": counts(generator, both if truth else None, tokens),
            "random_router routing": counts(generator, None, tokens),
        }

        def scattered(mean: float, by: float = 0.004, n: int = 1, tokens: Tensor = tokens) -> Tensor:
            """Sums over tokens, of sources whose means scatter."""
            return (mean + by * torch.randn(SOURCES, n, generator=generator).double()) * tokens[:, None]

        cosines = dict.fromkeys(MEASURES, 0.5) | (
            {"top": 0.99, "none": 0.6, "rest_top": 0.2} if truth else {"top": 0.97, "none": 0.965, "rest_top": 0.0}
        )
        table = torch.stack([scattered(value, n=len(LAYERS)) for value in cosines.values()], -1)
        of_layer = tokens[:, None].expand(SOURCES, len(LAYERS))
        kept = (0.02, 0.6) if truth else (0.4, 0.4)
        variants = (("whole", None, TOP_K), ("dropped", None, 1), ("random", None, 1))
        whole = scattered(2.0, 0.1)
        nats = torch.cat([whole, *(whole + scattered(more) for more in kept)], 1)
        results["single_expert"][domain] = {
            "similarity": SimilarityResult(LAYERS, NAMES, of_layer, table, torch.zeros(len(LAYERS))),
            "losses": VariantLosses(variants, NAMES, nats, tokens, nats / tokens[:, None], torch.ones_like(tokens)),
        }
        totals = torch.zeros(SOURCES, 3, len(labels), len(QUANTITIES)).double()
        top, none, active = (which.label for which in (sums[2], *PartialSum.controls(TOP_K)[:2]))
        read = {top: (0.05, 0.98, 0.97), none: (1.0, 0.4, 0.0), active: (0.6, 0.7, 0.4)}
        if not truth:
            read[top] = read[active]
        for label, values in read.items():
            for name, value in zip(("kl_ensemble", "agrees_ensemble", "agrees_where_it_matters"), values, strict=True):
                totals[:, :, labels.index(label), list(QUANTITIES).index(name)] = scattered(value, 0.002, n=3)
        n = tokens[:, None, None, None].expand(totals.shape)
        results["lens"][domain] = {"lens": LensTotals((0, *LAYERS), labels, NAMES, totals, n)}
    model = {"name": "planted", "moe_layers": list(LAYERS), "top_k": TOP_K}
    domains = [{"name": name, "sha256": name * 4} for name in DOMAINS]
    read = [{"name": name, "sources": SOURCES} for name in DOMAINS]
    found = {}
    for study, of in results.items():
        plan = {"study": study, "settings": {"seed": 0}, "reading": {}, "model": model, "domains": domains}
        manifest = {"plan": plan, "versions": {"moe_lens": "0"}, "read": read, **changes}
        found[study] = StudyResult(manifest, {}, of)
    return found


@pytest.fixture(scope="module")
def planted() -> dict[str, StudyResult]:
    return made(truth=True)


@pytest.fixture(scope="module")
def of_a_model() -> dict[bool, tuple[Verdicts, StudyResult, StudyResult]]:
    """By whether domains mean nothing: of a model in which experts 2, 5 and 7 of one layer serve a domain each."""
    model, found = planted_model(), {}
    studies = RoutingStudy(nulls=True), PruningStudy(random=20), Localisation(experts=1, matched=10, how=("reroute",))
    for shuffled in (False, True):
        texts, reading = planted_domains(shuffled=shuffled, words=12), Reading(tokens=None, context=24)
        results = {study.name: run(study, model, texts, reading=reading) for study in studies}
        found[shuffled] = judge(results), results["routing"], results["pruning"]
    return found


@pytest.fixture(scope="module")
def of_outputs() -> dict[bool, tuple[HookedMoE, Verdicts]]:
    """By whether its numbers are shuffled: of a model whose experts all say the same, the first loudest."""
    found, texts, reading = {}, planted_domains(words=12), Reading(tokens=None, context=24)
    for shuffled in (False, True):
        model = planted_model(echo=True, shuffled=shuffled).double()
        studies = LensStudy(), SingleExpertStudy(treatments=("dropped", "random"), k=(1,))
        found[shuffled] = model, judge({study.name: run(study, model, texts, reading=reading) for study in studies})
    return found


def test_a_planted_first_expert_does_all_the_work_and_in_a_shuffled_model_it_does_not(of_outputs):
    planted, shuffled = (answers(of_outputs[which][1]) for which in (False, True))
    assert {key: planted[key] for key in "234"} == dict.fromkeys("234", ("holds", "holds"))
    assert shuffled["2"][1] == shuffled["3"][1] == "contradicted"
    # the traps of the paper: high cosines, agreement and perplexities where no expert says anything
    assert shuffled["3"][0] == "holds" and shuffled["4"][1] != "holds"


def test_bounds_of_outputs_are_those_of_the_model_run_text_by_text(of_outputs):
    """With KL(ensemble ‖ lens), not the other direction, which is another number here."""
    model, found = of_outputs[False]
    layers = model.moe_layers
    kl, reverse, cosines = (torch.zeros(2, len(layers)).double() for _ in range(3))
    nats, agree, tokens = torch.zeros(2).double(), torch.zeros(len(layers)).double(), 0
    for passage in planted_domains(words=12)[0].passages:
        ids = model.to_tokens(passage.text)
        assert ids.shape[1] < 24  # a window of its own
        logits, cache = model.run_with_cache(ids)
        with model.keep_top(1):
            one = model(ids)
        for at, of in enumerate((logits, one)):
            nats[at] -= of.double().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).sum()
        u = torch.stack([cache["resid_mid", layer][0, 1:] for layer in layers])
        parts = torch.stack([cache["expert_weighted", layer][0, 1:] for layer in layers])
        whole, top = u + parts.sum(-2), u + parts[..., 0, :]
        p, q, none = (model.unembed(model.ln_final(x)).double().log_softmax(-1) for x in (whole, top, u))
        for at, (of, sums) in enumerate(((q, top), (none, u))):
            kl[at] += (p.exp() * (p - of)).sum((1, 2))
            reverse[at] += (of.exp() * (of - p)).sum((1, 2))
            cosines[at] += torch.cosine_similarity(sums, whole, dim=-1).sum(1).double()
        agree += (p.argmax(-1) == q.argmax(-1)).sum(1).double()
        tokens += ids.shape[1] - 1
    right, wrong = (float((of[0] / of[1]).mean()) for of in (kl, reverse))
    (value, *_) = values(found, "2", "KL ratio: KL(ensemble ‖ u + g₀E₀) / KL(ensemble ‖ u)")
    assert value == pytest.approx(right, rel=ROUNDING) and abs(wrong / right - 1) > 5 * ROUNDING
    assert values(found, "2", "agreement with the ensemble")[0] == pytest.approx(float(agree.mean()) / tokens)
    best = cosines[0].argmax()
    gained = (cosines[0] - cosines[1])[best] / (tokens - cosines[1][best])
    assert values(found, "3", "cos(u + a₀, u + S)")[0] == pytest.approx(float(cosines[0, best]) / tokens)
    assert values(found, "3", "(cos − cos_u) / (1 − cos_u)")[0] == pytest.approx(float(gained), rel=ROUNDING)
    ratio = float(((nats[1] - nats[0]) / tokens).exp())
    assert values(found, "4", "perplexity ratio, k = 1 ÷ all")[0] == pytest.approx(ratio, rel=1e-5)


def values(found: Verdicts, claim: str, what: str) -> list[float]:
    return [
        row["value"] for row in found.per_domain().to_dict("records") if (row["claim"], row["what"]) == (claim, what)
    ]


def test_experts_planted_in_a_model_are_found_and_what_explains_them_is_too(of_a_model):
    found, routing, pruned = of_a_model[False]
    said = answers(found)
    # every token of a domain goes to the domain's expert; but then the token says it all, and the domain adds nothing
    assert said["1a"] == ("holds", "contradicted")
    assert min(values(found, "1a", "greatest share")) > 0.9
    assert max(values(found, "1a", "greatest share − its share by the token alone")) < 0.01
    assert said["6"] == ("–", "holds")
    best = where(routing.tables["domain_experts"], routing="model").query("difference > 0 and p_value <= 0.05")
    first = best.sort_values("difference").groupby("domain").last()
    found_there = {domain: (row["layer"], row["expert"]) for domain, row in first.to_dict("index").items()}
    assert found_there == {domain: (LAYER, expert) for domain, expert in PLANTED.items()}
    # no token is in two domains
    assert set(where(routing.tables["given_token_pairs"], routing="model")["finding"]) == {"cannot be told"}
    # three quarters of the experts are enough, the planted one among them: so they are for most random plans
    assert said["5"] == ("holds", "undecided")
    assert max(values(found, "5", "perplexity, pruned ÷ whole")) < 1.02
    assert all(0.1 < share < 0.6 for share in values(found, "5", "share of 20 random plans beaten"))
    # and an eighth and a half gone, the planted expert among those that stay: by plans of their own
    table = pruned.tables["pruning"].query("plan == domain and kind != 'random'")
    assert table["kind"].tolist() == ["picked", "half", "double"] * 3 and table["gone"].tolist() == [4, 2, 8] * 3
    assert table["ratio"].max() < 1.02
    # random plans of the table are those of the verdict, each at its number
    for name, of in pruned.results.items():
        effects: Any = of["pruned"]
        added, tokens = (values[:, list(PLANTED).index(name)].double().sum(0) for values in effects.of("prune"))
        ratios = [
            float(ratio) for ratio, kind in zip((added / tokens).exp(), effects.kinds, strict=True) if kind == "random"
        ]
        shown = pruned.tables["pruning"].query("domain == @name and kind == 'random'")
        assert shown["ratio"].tolist() == pytest.approx(ratios) and len(set(ratios)) > 1
    (row,) = (row for row in found.rows if row.key == "5")
    others = [bound.others for of in row.domains for bound in of.bounds if bound.others]
    ratios = [[other.value for other in pair] for pair in others]
    assert ratios == [
        pytest.approx(where(table, domain=name).query("kind != 'picked'")["ratio"].tolist()) for name in PLANTED
    ]
    # of few experts half is one at least, and twice as many leave enough to choose from
    sizes = [
        PruningStudy(share=0.25).gone(n, top_k, kind) for n, top_k in ((2, 1), (8, 5)) for kind in ("half", "double")
    ]
    assert sizes == [1, 1, 1, 3]
    assert row.elsewhere(0.5).startswith("holds") and row.elsewhere(2.0).startswith("holds")
    # what a plan costs the other domains stands in the file, too
    stated = judge({"pruning": pruned}).to_json()["other_domains"]
    shown = pruned.tables["pruning"].query("plan != domain and kind == 'picked'")
    assert [(of["plan"], of["domain"], of["ratio"]) for of in stated] == list(
        zip(shown["plan"], shown["domain"], shown["ratio"], strict=True)
    )
    assert len(stated) == 6
    # of earlier versions there are none: the verdicts are those of the threshold alone
    before = {}
    for name, of in pruned.results.items():
        effects: Any = of["pruned"]
        kinds = tuple(kind if kind in ("picked", "random") else "none" for kind in effects.kinds)
        before[name] = {"pruned": replace(effects, kinds=kinds)}
    (row,) = (row for row in judge({"pruning": replace(pruned, results=before)}).rows if row.key == "5")
    assert not any(bound.others for of in row.domains for bound in of.bounds) and row.number() == "holds"


def test_where_domains_mean_nothing_nothing_is_found(of_a_model):
    found, routing, _ = of_a_model[True]
    said = answers(found)
    assert said["1a"] == ("contradicted", "contradicted")  # a third of the tokens of every domain are an expert's
    assert (
        said["6"] != ("–", "holds") and min(values(found, "6", "contrast (Δ own − Δ others), picked − matched")) < 0.2
    )
    assert said["5"][1] != "holds"
    assert min(where(routing.tables["domain_experts"], routing="model")["p_value"]) > 0.05
    assert set(where(routing.tables["given_token_pairs"], routing="model")["finding"]) == {"not rejected"}


def answers(found: Any) -> dict[str, tuple[str, str]]:
    return {row.key: (row.number(), row.inference()) for row in found.rows}


def test_the_planted_truth_is_found(planted):
    assert answers(judge(planted)) == {
        **{key: ("holds", "holds") for key in ("1a", "1b", "2", "3", "4")},
        "5": ("undecided", "undecided"),
        "6": ("–", "undecided"),
    }


def test_what_was_shuffled_is_not():
    found = answers(judge(made(truth=False)))
    assert found["1a"] == ("contradicted", "contradicted")  # no expert is above half
    assert found["1b"][0] == "contradicted" and found["2"] == ("contradicted", "contradicted")
    # the trap of the paper: the cosine is as high, and says nothing, as it is without any expert
    assert found["3"] == ("holds", "contradicted")
    assert found["4"] == ("contradicted", "contradicted")


def test_domains_that_disagree_are_mixed(planted):
    shuffled = made(truth=False)
    mixed = {
        name: replace(study, results={"a": study.results["a"], "b": shuffled[name].results["b"]})
        for name, study in planted.items()
    }
    found = judge(mixed)
    half = "mixed (1 of 2 hold, 1 contradicted)"
    assert answers(found)["4"] == (half, half)
    assert answers(found)["3"] == ("holds", half)
    (row,) = (row for row in found.rows if row.key == "4")
    assert found.sentence(row) == f"4, of planted on a, b: the number is {half}, the inference is {half}."


def test_what_was_not_run_is_undecided_and_says_so(planted):
    found = judge({"single_expert": planted["single_expert"]})
    frame: Any = found.to_frame().set_index("claim")
    assert list(frame.iloc[:3]["number"]) == ["undecided"] * 3
    assert frame.iloc[0]["inference"] == "undecided: the study routing was not run"
    assert frame.iloc[-1]["inference"] == "undecided: the study localisation was not run"
    # without nulls there is the number, and no control
    own = {name: {"model routing": of["model routing"]} for name, of in planted["routing"].results.items()}
    alone = judge({"routing": replace(planted["routing"], results=own)})
    assert answers(alone)["1a"] == answers(alone)["1b"] == ("holds", "undecided")
    assert alone.rows[0].domains[0].missing == "token_unigram routing was not run"


def test_few_sources_decide_nothing(planted):
    losses = planted["single_expert"].results["a"]["losses"]
    assert isinstance(losses, VariantLosses)
    parts = {n: getattr(losses, n)[:9] for n in ("sources", "nats", "tokens", "row_losses", "rows")}
    few = {"similarity": planted["single_expert"].results["a"]["similarity"], "losses": replace(losses, **parts)}
    found = judge({"single_expert": replace(planted["single_expert"], results={"a": few})})
    assert answers(found)["4"] == ("undecided", "undecided")
    assert found.per_domain().query("claim == '4'")["low"].isna().to_list() == [True, True]


def of_loads(generator: torch.Generator, by_source: float) -> RoutingResult:
    """15 sources of 137 tokens, 27 layers of 64 experts, six for each token; loads that sources shift by so much."""
    shape, shift = (15, 27, 64), torch.randn(15, 27, 64, generator=generator, dtype=torch.float64)
    logits = 0.3 * torch.randn(27, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    shares = (6 * (logits + by_source * shift).softmax(-1)).clamp(max=1)
    counts = torch.binomial(torch.full(shape, 137.0).double(), shares, generator=generator).long()
    nothing, sources = torch.zeros(15, 27, 2), tuple(f"s{i:02d}" for i in range(15))
    tokens = torch.full((15,), 137)
    return RoutingResult(tuple(range(27)), 6, sources, tokens, counts, counts, counts.double(), nothing, nothing.long())


@pytest.mark.typed
def test_experts_for_half_are_told_without_what_chance_adds(planted):
    """It makes loads uneven, and each resample does so once more: the bootstrap's interval is all below the truth."""
    generator, held, resampled = torch.Generator().manual_seed(1), 0, 0
    logits = 0.3 * torch.randn(27, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    many = logits + 0.3 * torch.randn(20_000, 27, 64, generator=generator, dtype=torch.float64)
    load = (6 * many.softmax(-1)).clamp(max=1).mean(0)
    truth = float(load_evenness.experts_covering_in_part(load, 0.5).mean()) / 64
    for _ in range(20):
        own = of_loads(generator, 0.3)
        study = replace(planted["routing"], results={"a": {"model routing": own, "random_router routing": own}})
        half, less = next(row for row in judge({"routing": study}).rows if row.key == "1b").domains[0].bounds
        assert half.low is not None and half.high is not None and half.low < half.value < half.high
        assert (less.value, less.low, less.high) == (0, 0, 0), "of a router and itself"
        held += half.low <= truth <= half.high
        counts = own.assignments.double()
        ends = bootstrap(lambda times, of=counts: covering(torch.einsum("rs,sle->rle", times, of)), own.tokens)
        assert ends is not None
        resampled += ends.low <= truth <= ends.high
    assert held >= 16, "of 20, at .95: at the true .90 fewer come once in 25 times"
    assert resampled == 0, "a control"


def covering(load: Tensor) -> Tensor:
    """Mean over layers, as a share of all experts."""
    return load_evenness.experts_covering_in_part(load, 0.5).mean(-1) / load.shape[-1]


def test_experts_that_count_in_part_are_whole_ones_rounded_up():
    load = torch.randint(1, 50, (200, 16), generator=torch.Generator().manual_seed(0))
    for share in (0.3, 0.5, 1.0):
        part = load_evenness.experts_covering_in_part(load, share)
        assert torch.equal((part - 1e-9).ceil().long(), load_evenness.experts_covering(load, share).long())
    even = load_evenness.experts_covering_in_part(torch.ones(8), 0.3)
    assert float(even) == pytest.approx(2.4) and load_evenness.experts_covering(torch.ones(8), 0.3) == 3
    assert float(load_evenness.experts_covering_in_part(torch.tensor([5.0, 0, 0, 0]), 0.5)) == 0.5


def test_nothing_is_picked_on_other_sources_where_there_are_none(planted):
    def cut(result: Any) -> Any:
        """All text from the first source."""
        by_source = ("sources", "tokens", "assignments", "top1", "weights", "sums", "measured")
        return replace(result, **{name: getattr(result, name)[:1] for name in by_source if hasattr(result, name)})

    studies = {"routing": planted["routing"], "single_expert": planted["single_expert"]}
    mixed, alone = dict[str, StudyResult](), dict[str, StudyResult]()
    for study, of in studies.items():
        one = {name: value if name == "losses" else cut(value) for name, value in of.results["a"].items()}
        mixed[study] = replace(of, results={"a": one, "b": of.results["b"]})
        alone[study] = replace(of, results={"a": one})
    rows = {row.key: row for row in judge(alone).rows}
    assert all(rows[key].missing.startswith("all text is of one source") for key in ("1a", "3"))
    assert set(judge(alone).per_domain()["claim"]) == {"1b", "4"}  # which pick nothing
    frame, whole = (judge(of).per_domain().set_index("domain") for of in (mixed, studies))
    assert set(frame.loc["a", "claim"]) == {"1b", "4"} and frame.loc["b"].equals(whole.loc["b"])  # control: b
    (row,) = (row for row in judge(mixed).rows if row.key == "3")
    assert row.number() == "mixed (1 of 2 hold, 0 contradicted)" and shown(row).matrix[0][1][0] is None


@pytest.mark.parametrize(("sources", "answer"), [(9, "undecided"), (10, "contradicted")])
def test_a_share_of_controls_decides_nothing_below_ten_sources(planted, sources, answer):
    """All 20 random plans are better than what was picked."""
    nats, tokens = torch.full((sources,), 60.0), torch.full((sources,), 20)
    added = torch.tensor([0.5, *[0.1] * 20]).expand(sources, 1, 1, -1)
    kinds, names = ("picked", *["random"] * 20), tuple(map(str, range(sources)))
    read_without = tokens[:, None, None, None].expand(-1, 1, 1, 21)
    effects = CoalitionEffects(("prune",), kinds, names, nats, tokens, added, read_without)
    study = StudyResult(planted["routing"].manifest, {}, {"a": {"pruned": effects}})
    (row,) = (row for row in judge({"pruning": study}).rows if row.key == "5")
    of = {bound.what: (bound.value, bound.answer()) for bound in row.domains[0].bounds}
    assert of["share of 20 random plans beaten"] == (0.0, answer) and row.inference() == answer


def test_what_needs_other_active_experts_is_undecided_where_there_is_one(planted):
    def alone(study: StudyResult) -> StudyResult:
        plan = study.manifest["plan"]
        return replace(study, manifest={**study.manifest, "plan": {**plan, "model": {**plan["model"], "top_k": 1}}})

    studies = {name: planted[name] for name in ("lens", "single_expert")}
    rows = {row.key: row for row in judge({name: alone(study) for name, study in studies.items()}).rows}
    said = "a token has one active expert, and there are no others"
    assert {of.missing for key in ("2", "3") for of in rows[key].domains} == {rows["4"].missing} == {said}
    for key, control in (("2", "KL ratio − a random active expert's"), ("3", "cos(a₀, S − a₀)")):
        assert (rows[key].number(), rows[key].inference()) == ("holds", "undecided")
        (whole,) = (row for row in judge(studies).rows if row.key == key)
        there, missing = ({bound.what for of in row.domains for bound in of.bounds} for row in (whole, rows[key]))
        assert there - missing == {control} and whole.inference() == "holds"  # negative control: two


def test_a_changed_threshold_is_flagged_and_ours_are_shown_at_other_distances(planted, tmp_path):
    usual = judge(planted)
    assert usual.changed() == ()
    frame: Any = usual.to_frame().set_index(usual.to_frame()["claim"].str.split().str[0])
    # agreement .98: ≥ .95, and at half the distance from 1 ≥ .975; KL .05 is exactly at half of .10
    assert frame.loc["2", "at_double"] == "holds / holds" and frame.loc["2", "at_half"].startswith("holds / ")
    # thresholds of the paper stay: of a row, or of its number, there is nothing to show
    assert frame.loc[["1a", "4"], ["at_half", "at_double"]].to_numpy().tolist() == [["no †"] * 2] * 2
    assert frame.loc["3", "at_half"].startswith("no † / ") and frame.loc["1b", "at_double"] == "holds / holds"
    assert frame.loc["5", "at_half"] == "undecided / undecided"  # not run: no thresholds
    strict = judge(planted, {"agreement": 0.99, "perplexity": 1.001})
    assert strict.changed() == ("agreement", "perplexity")
    assert answers(strict)["2"][0] == "contradicted" and answers(strict)["4"][0] == "contradicted"
    strict.save(tmp_path / "verdicts.json")
    saved = json.loads((tmp_path / "verdicts.json").read_text())
    assert saved["thresholds"]["agreement"] == {"value": 0.99, "ours": True, "usual": 0.95, "changed": True}
    assert not saved["thresholds"]["share"]["changed"]
    assert saved["domains"][0]["sha256"] == "aaaa" and saved["studies"]["lens"]["versions"] == {"moe_lens": "0"}
    assert all("of planted on a, b" in of["sentence"] for of in saved["verdicts"])
    with pytest.raises(InputError, match="there is no threshold 'x'; there are share, experts for half"):
        judge(planted, {"x": 1.0})
    with pytest.raises(InputError, match="got no study"):
        judge({})
    other = made(truth=True)
    other["lens"].manifest["plan"]["model"]["fingerprint"] = "another"
    with pytest.raises(InputError, match="different models or texts"):
        judge({"routing": planted["routing"], "lens": other["lens"]})


def test_sides_and_thresholds():
    at = Threshold(0.95, 1.0, ours=True)
    assert [at.at(factor) for factor in (0.5, 1.0, 2.0)] == pytest.approx([0.975, 0.95, 0.9])
    assert replace(at, ours=False).at(2.0) == 0.95  # the paper's own stay
    bound = Bound("x", 0.97, 0.95, 0.99, True, at)
    assert [bound.answer(factor) for factor in (0.5, 1.0, 2.0)] == ["undecided", "holds", "holds"]
    assert (
        replace(bound, above=False).answer() == "undecided"
        and replace(bound, above=False, low=0.96).answer() == "contradicted"
    )
    zero = Threshold(0.0, 0.0, strict=True)
    assert (
        Bound("x", 0.0, 0.0, 0.0, True, zero).answer()
        == Bound("x", 0.0, 0.0, 0.0, False, zero).answer()
        == "contradicted"
    )
    assert replace(bound, low=None, high=None).answer() == "undecided"
    # a share of controls has no interval: nearly all are beaten, nearly none, or it decides nothing
    share = replace(bound, low=None, high=None, counted=True, threshold=replace(at, ours=False))
    beaten = {n: replace(share, value=n / 40).answer() for n in (40, 38, 37, 20, 3, 2, 0)}
    assert list(beaten.values()) == ["holds", "holds", *["undecided"] * 3, "contradicted", "contradicted"]
    assert replace(share, value=0.1, threshold=Threshold(0.9, 1.0)).answer() == "contradicted"  # to the last bit
    # where a † is part of the measurement, something else was measured at other distances
    lower = replace(bound, value=0.8, low=0.78, high=0.82)
    both = replace(bound, others=(replace(bound, low=0.98, high=1.0), lower))
    assert [both.answer(factor) for factor in (0.5, 1.0, 2.0)] == ["holds", "holds", "contradicted"]
    assert OfDomain("d", 12, (bound, replace(bound, low=None, high=None, control=True))).inference() == "undecided"
    assert together(["holds", "undecided", "contradicted"]) == "contradicted" and together([]) == "undecided"
    assert over_domains(["undecided", "undecided"]) == "undecided"
    assert over_domains(["contradicted", "undecided", "holds"]) == "mixed (1 of 3 hold, 1 contradicted)"
    # none holds, and it is no contradiction either: both counts are said
    assert (
        over_domains(["undecided", "contradicted", "contradicted", "contradicted", "contradicted"])
        == "mixed (0 of 5 hold, 4 contradicted)"
    )
