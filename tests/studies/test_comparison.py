"""Two studies, or two domains, side by side: what stands when all differences are counted, and how it is said."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_ind, ttest_rel

from moe_lens.errors import InputError
from moe_lens.stats import RoutingResult
from moe_lens.stats.multiple_tests import max_t
from moe_lens.stats.parallel_sources import LANGUAGE
from moe_lens.studies import NULLS, StudyResult, compare
from moe_lens.studies.chance_differences import paired, unpaired
from moe_lens.studies.comparable import COMPARED, Means
from moe_lens.studies.variant_losses import WHOLE, VariantLosses

F64 = 1e-12
"""Both sides are float64 and of size 1: sums of up to some thousand terms in another order, each rounded by 1e-16."""

EXPERTS = 40
BY_SOURCE = ("tokens", "assignments", "top1", "weights", "sums", "measured")


def counted(generator: torch.Generator, sources: int, taste: torch.Tensor, name: str = "s") -> RoutingResult:
    """Sources of unequal sizes whose tokens choose four experts, each source with a taste of its own."""
    tokens = (40 * (0.5 * torch.randn(sources, generator=generator)).exp()).long().clamp(min=10)
    counts = torch.zeros(sources, 1, EXPERTS, dtype=torch.long)
    for i, n in enumerate(tokens.tolist()):
        logits = taste + 0.4 * torch.randn(EXPERTS, generator=generator)
        noise = -torch.rand(n, EXPERTS, generator=generator).log().neg().log()
        counts[i, 0] = (logits + noise).topk(4).indices.flatten().bincount(minlength=EXPERTS)
    names, nothing = tuple(f"{name}{i:02d}" for i in range(sources)), torch.zeros(sources, 1, 2)
    return RoutingResult(
        (3,), 4, names, tokens, counts, torch.zeros_like(counts), counts.double(), nothing, nothing.long()
    )


def study(model: str = "m", **domains: RoutingResult) -> StudyResult:
    manifest = {"plan": {"study": "routing", "model": {"name": model, "fingerprint": model}}}
    return StudyResult(manifest, {}, {name: {"model routing": result} for name, result in domains.items()})


def means(above: Any, below: Any, times: Any = None) -> Means:
    return Means(pd.RangeIndex(above.shape[1]), tuple(map(str, range(len(above)))), above, below, times=times)


def test_what_is_the_same_in_every_source_differs_nowhere_whatever_is_rounded():
    """Sources of sizes whose shares do not sum to 1 in floating point: a difference of 1e-17 has an error of 0."""
    generator = torch.Generator().manual_seed(0)
    sizes = [torch.randint(7, 900, (11, 40), generator=generator).double() for _ in range(2)]
    noise = 3 * torch.randn(11, 1, generator=generator).double().expand(11, 40)
    for value in (1.0, 0.3, 1e-6):
        a, b = (means(value * size, size) for size in sizes)
        for found in (unpaired(a, b, 200, 0), paired(a, b, 200, 0)):
            assert not found.t.any() and not found.by_chance.any()
        differing = unpaired(means(value * sizes[0] + value * noise, sizes[0]), b, 200, 0)
        assert differing.t.all() and differing.by_chance.any()


@pytest.mark.typed
def test_with_sources_of_one_size_differences_are_those_of_students_tests():
    """Paired ones, and those of two samples with one variance; permuted, the latter are those of permuted sources."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(11, 3, generator=generator).double(), torch.randn(14, 3, generator=generator).double() + 1
    same = paired(means(one, torch.ones(11, 3)), means(other[:11], torch.ones(11, 3)), 500, 0)
    assert same.t.numpy() == pytest.approx(ttest_rel(other[:11], one)[0], abs=F64)
    found = unpaired(means(one, torch.ones(11, 3)), means(other, torch.ones(14, 3)), 500, 0)
    students: Any = ttest_ind(other, one, equal_var=True)[0]
    of_all = students * np.sqrt(24 / (23 + students**2))  # the variance is that of both, about one mean
    assert found.t.numpy() == pytest.approx(of_all, abs=F64)
    order = torch.rand(500, 25, generator=torch.Generator().manual_seed(0)).argsort(-1)
    values, place = torch.cat([one, other]), torch.tensor([-1 / 11] * 11 + [1 / 14] * 14).double()
    permuted = place[order] @ values / (values.std(0) * (1 / 11 + 1 / 14) ** 0.5)
    assert found.by_chance.numpy() == pytest.approx(permuted.numpy(), abs=1e-6)
    nothing = paired(means(one, torch.ones(11, 3)), means(one, torch.ones(11, 3)), 9, 0)
    assert nothing.t.eq(0).all() and nothing.by_chance.eq(0).all()


SIZES = {
    "one long source": ([1000, *[20] * 9], [1000, *[20] * 9], True),
    "a step": ([20, 30, 40, 60, 90, 150, 200, 300, 500, 800],) * 2 + (True,),
    "short and long": ([20] * 10, [200] * 30, False),
    "one long of one side": ([1000, *[20] * 9], [60] * 12, False),
}


@pytest.mark.parametrize("name", SIZES)
def test_sources_of_unequal_sizes_that_do_not_differ_are_seldom_found_to(name):
    """At 5 %, 7 of 30 draws or more come in one of a thousand; with a mean for either side there were 16 to 30."""
    one, other, same = SIZES[name]
    generator = torch.Generator().manual_seed(0)
    found, test = 0, paired if same else unpaired
    for seed in range(30):
        taste, tasted = torch.randn(16, generator=generator), []
        for sizes in (one, other):
            shifted = (taste + 0.3 * torch.randn(len(sizes), 16, generator=generator)).softmax(-1).double()
            n = torch.tensor(sizes).double()[:, None].expand(-1, 16)
            counts = torch.binomial(n, shifted, generator)
            tasted.append(means(counts, n, counts))
        t, by_chance = test(tasted[0], tasted[1], 199, seed)
        found += bool((max_t(t, by_chance.abs().amax(1)) <= 0.05).any())
        if seed < 5:  # a difference of .4 that all sources have
            one_side, more = (
                means(of.above + add * of.below, of.below) for of, add in zip(tasted, (0, 0.4), strict=True)
            )
            t, by_chance = test(one_side, more, 199, seed)
            assert bool((max_t(t, by_chance.abs().amax(1)) <= 0.05).any())
    assert found <= 6


def test_what_is_too_rare_on_one_side_is_not_tested_where_sources_are_not_paired():
    n = torch.tensor([[20.0]] * 10).double().expand(-1, 2)
    one = torch.tensor([[1.0, 10.0]] * 5 + [[0.0, 11.0]] * 5).double()
    few, many = means(one, n, one), means(one, n)
    assert unpaired(few, few, 9, 0).t.isnan().tolist() == [True, False]
    assert unpaired(few, few, 9, 0).by_chance[:, 0].eq(0).all()
    assert not unpaired(many, many, 9, 0).t.isnan().any() and not paired(few, few, 9, 0).t.isnan().any()


@pytest.mark.parametrize("experts", [EXPERTS, EXPERTS // 2])
def test_experts_that_have_other_numbers_are_not_compared(experts):
    """As after pruning, which numbers those that stay anew."""
    generator = torch.Generator().manual_seed(1)
    one, other = (study(name, d=counted(generator, 14, torch.randn(EXPERTS, generator=generator))) for name in "ab")
    for side, count in ((one, EXPERTS), (other, experts)):
        side.manifest["plan"]["model"]["experts"] = count
    if experts != EXPERTS:
        with pytest.raises(InputError, match=rf"without single experts \({EXPERTS} in a and {experts} in b"):
            compare(one, other)
    names, two = tuple(f"s{i:02d}" for i in range(14)), torch.full((14,), 2)
    for side in (one, other):
        nats = torch.rand(14, 1, generator=generator).double()
        results: Any = side.results["d"]
        results["loss"] = VariantLosses(((WHOLE, None, EXPERTS),), names, nats, two, nats, two)
    found = compare(one, other)
    single = found.table["of"].str.contains("expert [0-9]")
    assert single.any() == (experts == EXPERTS) and not single.all()
    said = f"single experts ({EXPERTS} in a and {experts} in b, with other numbers)"
    assert found.left_out == ((said,) if experts != EXPERTS else ())


@pytest.mark.parametrize(("digests", "parallel", "paired"), [
    (("x", "x"), None, True), (("x", "y"), None, False), (("x", "y"), r"^", True)
])  # fmt: skip
def test_sources_of_other_texts_are_not_paired_by_their_names(digests, parallel, paired):
    """Numbers, for example, are the names of many sources."""
    generator = torch.Generator().manual_seed(1)
    taste = torch.randn(EXPERTS, generator=generator)
    both = study(a=counted(generator, 14, taste), b=counted(generator, 14, taste))
    both.manifest["plan"]["domains"] = [{"name": name, "digest": of} for name, of in zip("ab", digests, strict=True)]
    table = compare(both, domains=("a", "b"), parallel=parallel).table
    assert set(table["paired"]) == {paired}


@pytest.mark.parametrize("paired", [True, False])
def test_what_chance_gives_does_not_stand_and_what_was_planted_does(paired):
    generator = torch.Generator().manual_seed(1)
    taste = torch.randn(EXPERTS, generator=generator)
    outside = stand = 0
    for i in range(8):
        one = counted(generator, 14, taste)
        other = counted(generator, 14, taste, "s" if paired else "t")
        table: Any = compare(study("base", d=one), study("chat", d=other), seed=i).table.query("quantity == 'share'")
        outside += int(((table["low"] > 0) | (table["high"] < 0)).sum())
        stand += bool((table["p_adjusted"] <= 0.05).any())
    assert outside > 6 and stand <= 2  # of 320 differences, 16 expected by chance; of 8 comparisons, .4
    planted = taste.index_add(0, torch.tensor([7]), torch.tensor([2.5]))
    found = compare(
        study("base", d=counted(generator, 14, taste)),
        study("chat", d=counted(generator, 14, planted, "s" if paired else "t")),
    )
    shares: Any = found.table.query("quantity == 'share'").sort_values("p_adjusted")
    assert shares.iloc[0]["of"] == "layer 3, expert 7" and shares.iloc[0]["p_adjusted"] < 0.03
    assert shares.iloc[0]["difference"] == pytest.approx(shares.iloc[0]["chat"] - shares.iloc[0]["base"])
    assert set(found.table["paired"]) == {paired} and found.names == ("base", "chat")
    said = found.found()
    assert "differences, chat minus base; " in said and "intervals leave out 0, where chance alone would give" in said


@pytest.mark.typed
def test_two_domains_of_one_study(tmp_path):
    generator = torch.Generator().manual_seed(2)
    taste = torch.randn(EXPERTS, generator=generator)
    made = study(prose=counted(generator, 12, taste, "p"), code=counted(generator, 15, taste.flip(0), "c"))
    found = compare(made, domains=("prose", "code"))
    assert found.same_model
    found.save(tmp_path / "differences.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "differences.parquet"), found.table)
    table: Any = found.table
    assert set(table["domain"]) == {"code minus prose"} and set(table["paired"]) == {False}
    row = table.query("quantity == 'share' and of == 'layer 3, expert 5'").iloc[0]
    results: Any = made.results
    shares = [of["model routing"].specialisation[0, 5] for of in results.values()]
    assert (row["prose"], row["code"]) == (pytest.approx(float(shares[0])), pytest.approx(float(shares[1])))
    assert (table["p_adjusted"] <= 0.05).sum() > 3
    with pytest.raises(InputError, match=r"no domain 'maths' in the study; there are \['prose', 'code'\]"):
        compare(made, domains=("prose", "maths"))
    with pytest.raises(InputError, match=r"name two of its domains to compare, of \['prose', 'code'\]"):
        compare(made)
    with pytest.raises(InputError, match="expected two different ones"):
        compare(made, domains=("prose", "code"), names=("low", "x"))


def test_nulls_measured_beside_the_model_change_nothing():
    """Each difference is told once and counted once, and whether there are nulls is no difference."""
    generator = torch.Generator().manual_seed(5)
    taste = torch.randn(EXPERTS, generator=generator)
    plain = study(prose=counted(generator, 12, taste), code=counted(generator, 12, taste.roll(3)))
    beside: dict[str, Any] = {
        name: {**of, **{f"{null} routing": counted(generator, 12, 0 * taste) for null in NULLS}}
        for name, of in plain.results.items()
    }
    both = replace(plain, results=beside)
    alone, found = (compare(of, domains=("prose", "code")) for of in (plain, both))
    pd.testing.assert_frame_equal(found.table, alone.table)
    assert min(alone.table["p_adjusted"]) <= 0.05, "the control: the model's own are found"
    assert compare(plain, both, domains=("prose", "code")).left_out == ()


@pytest.mark.typed
def test_parallel_sources_of_two_domains_are_paired():
    """As sources of equal names are; intervals are narrower where both sides share what their documents do."""
    generator = torch.Generator().manual_seed(4)
    taste, documents = torch.randn(EXPERTS, generator=generator), 1.6 * torch.randn(16, EXPERTS, generator=generator)

    def translated(language: str, n: int, extra: tuple[str, ...] = ()) -> RoutingResult:
        of = [counted(generator, 1, taste + documents[i], "x") for i in range(n)]
        names = tuple(f"book/{language}/{i}" for i in range(n))
        stacked = {field: torch.cat([getattr(one, field) for one in of]) for field in BY_SOURCE}
        return replace(of[0], sources=names, **stacked)

    made = study(de=translated("de", 14), fr=translated("fr", 16))
    apart, paired = (compare(made, domains=("de", "fr"), parallel=key) for key in (None, LANGUAGE))
    shares: list[Any] = [of.table.query("quantity == 'share'") for of in (apart, paired)]
    assert not shares[0]["paired"].any() and shares[1]["paired"].all()
    assert set(shares[0]["dropped"]) == {0} and set(shares[1]["dropped"]) == {2} and set(shares[1]["sources"]) == {14}
    widths = [float((of["high"] - of["low"]).mean()) for of in shares]
    assert widths[1] < 0.7 * widths[0]
    assert "2 sources have no parallel one and were left out" in paired.found() and "parallel" not in apart.found()
    # the same as sources of the same names
    alike = {}
    for name, of in made.results.items():
        result: Any = of["model routing"]
        first = {field: getattr(result, field)[:14] for field in ("sources", *BY_SOURCE)}
        first["sources"] = tuple(source.replace(f"/{name}/", "/*/") for source in first["sources"])
        alike[name] = replace(result, **first)
    named: Any = compare(study(**alike), domains=("de", "fr")).table
    assert named["difference"].tolist() == pytest.approx(paired.table["difference"].tolist(), abs=F64)
    # in whichever order either has them
    sides: dict[str, Any] = {name: of["model routing"] for name, of in made.results.items()}
    last = sides["fr"]
    order = torch.randperm(16, generator=generator)
    fields: dict[str, Any] = {field: getattr(last, field)[order] for field in BY_SOURCE}
    fields["sources"] = tuple(last.sources[i] for i in order)
    turned = study(de=sides["de"], fr=replace(last, **fields))
    again: Any = compare(turned, domains=("de", "fr"), parallel=LANGUAGE).table
    assert again["low"].tolist() == pytest.approx(paired.table["low"].tolist(), abs=F64)
    # nothing is parallel: as without
    assert compare(made, domains=("de", "fr"), parallel="nothing").table["low"].equals(apart.table["low"])
    with pytest.raises(InputError, match="parallel sources are those of two domains"):
        compare(made, made, parallel=LANGUAGE)


def test_few_sources_have_no_intervals_and_that_is_said():
    generator = torch.Generator().manual_seed(3)
    taste = torch.randn(EXPERTS, generator=generator)
    two = [study("m", d=counted(generator, 4, taste), e=counted(generator, 12, taste)) for _ in range(2)]
    found = compare(*two)
    assert found.names == ("first", "second")
    assert "; no intervals: fewer than ten sources in d (4); " in found.found()
    few = found.table.query("domain == 'd'")
    assert np.isnan(few[["low", "high", "p_adjusted"]].to_numpy()).all()
    only = [study("m", d=counted(generator, 4, taste)) for _ in range(2)]
    assert compare(*only).found().endswith("no intervals: fewer than ten sources in d (4)")


@pytest.mark.parametrize("held", [9, 10])
def test_what_few_of_many_sources_hold_has_no_interval(held):
    """Router entropies are known in some sources; shares in all."""
    generator = torch.Generator().manual_seed(3)
    of = counted(generator, 20, torch.randn(EXPERTS, generator=generator))
    known = (torch.arange(20) < held)[:, None, None] * of.tokens[:, None, None].expand(-1, 1, 2)
    two = [
        replace(of, measured=known, sums=known * torch.rand(20, 1, 2, generator=generator).double()) for _ in range(2)
    ]
    table = compare(*(study(name, d=of) for name, of in zip("mn", two, strict=True))).table.set_index("quantity")
    ends: Any = table[["low", "high", "p_adjusted"]].notna().all(axis=1)
    assert ends["share"].all() and (ends[["router_entropy", "margin"]] == (held == 10)).all()
    layers: Any = two[0].per_layer().set_index("measure")[["low", "high"]].notna().all(axis=1)
    assert layers["gini"] and (layers[["router_entropy", "margin"]] == (held == 10)).all()


def test_texts_that_were_opened_otherwise_are_said():
    def opened(name: str, *tokens: str, known: bool = True) -> StudyResult:
        one = study(name, fr=counted(torch.Generator().manual_seed(0), 10, torch.zeros(EXPERTS)))
        one.manifest["plan"]["model"] |= {"texts_open_with": list(tokens)} if known else {}
        return one

    both = compare(opened("a", "<s>"), opened("b", "<s>"))
    assert not both.same_model
    assert both.opened_otherwise is None and "open" not in both.found()
    found = compare(opened("a", "<s>"), opened("b"))
    assert found.opened_otherwise == "texts open with <s> in a and with nothing in b"
    assert found.found().endswith("; texts open with <s> in a and with nothing in b, which is part of every difference")
    earlier = compare(opened("a", known=False), opened("b"))
    assert earlier.opened_otherwise == "texts open with as an earlier moe_lens did in a and with nothing in b"


@pytest.mark.typed
def test_what_one_side_alone_has_is_said_and_what_they_were_asked_otherwise():
    def some(layers: int, reading: dict[str, Any], *domains: str) -> StudyResult:
        one = counted(torch.Generator().manual_seed(0), 10, torch.zeros(EXPERTS))
        wide = {
            name: getattr(one, name).expand(-1, layers, *([-1] * (getattr(one, name).ndim - 2)))
            for name in BY_SOURCE[1:]
        }
        of = replace(one, layers=tuple(range(3, 3 + layers)), **wide)
        made = study("m", **dict.fromkeys(domains, of))
        plan = {**made.manifest["plan"], "reading": reading, "settings": {"nulls": False}}
        return replace(made, manifest={"plan": plan})

    plain = {"context": 24, "seed": 0, "shard_tokens": 5}
    same = compare(some(1, plain, "de", "fr"), some(1, plain | {"shard_tokens": 9}, "de", "fr"))
    assert same.left_out == () and same.asked_otherwise is None and "left out:" not in same.found()
    one, other = some(2, plain, "de", "fr", "en", "it", "es"), some(1, plain | {"context": 48}, "fr", "code")
    found = compare(one, other, names=("a", "b"))
    assert found.asked_otherwise == "context 24 in a and 48 in b" and set(found.table["domain"]) == {"fr"}
    assert found.left_out == (
        "domains of a alone (de; en; it and 1 more)",
        "domains of b alone (code)",
        "values of a alone (share of layer 4, expert 0; share of layer 4, expert 1; share of layer 4, expert 2 "
        "and 79 more)",
    )
    assert found.found().endswith(
        f"; context 24 in a and 48 in b, which may be part of every difference; left out: {', '.join(found.left_out)}"
    )
    named = compare(one, other, domains=("de", "code"), names=("a", "b"))
    assert [said.split(" ")[0] for said in named.left_out] == ["values"], "those that were not named are not missed"
    assert named.asked_otherwise == found.asked_otherwise
    with pytest.raises(InputError, match="'de' is compared with itself"):
        compare(one, domains=("de", "de"))
    with pytest.raises(InputError, match="there is no domain 'xx'"):
        compare(one, domains=("de", "xx"))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model", {"dtype": "bfloat16"}, "dtype float32 in a and bfloat16 in b"),
        ("model", {"quantised": "nf4"}, "quantised no in a and nf4 in b"),
        ("model", {"hooks": ["x"]}, "hooks None in a and 1 in b"),
        ("reading", {"seed": 1}, "seed 0 in a and 1 in b"),
        ("settings", {"seed": 1}, None),  # of controls
        ("settings", {"nulls": True}, None),
        ("domains", [{"name": "de", "digest": "1"}, {"name": "fr", "digest": "9"}], "other texts as fr"),
        ("domains", [{"name": "de", "digest": "1"}, {"name": "fr", "digest": "2"}], None),
    ],
)
def test_other_precision_hooks_and_texts_are_said(key, value, said):
    one = counted(torch.Generator().manual_seed(0), 10, torch.zeros(EXPERTS))
    made = study("m", de=one, fr=one)
    plan = made.manifest["plan"] | {"domains": [{"name": "de", "digest": "1"}, {"name": "fr", "digest": "2"}]}
    plan["model"] |= {"dtype": "float32", "quantised": "no"}
    plan |= {of: {**plan.get(of, {}), "seed": 0} for of in ("reading", "settings")}
    changed = {**plan, key: value if isinstance(value, list) else {**plan[key], **value}}
    found = compare(replace(made, manifest={"plan": plan}), replace(made, manifest={"plan": changed}), names=("a", "b"))
    assert found.asked_otherwise == said and ("may be part" in found.found()) == (said is not None)


def test_losses_of_coalitions_that_were_drawn_for_one_study_are_not_compared() -> None:
    n, sources = 4, ("a", "b")
    variants = ((WHOLE, None, 0), ("forbid picked", None, 0), ("forbid matched", None, 2), ("push matched", None, 3))
    nats, tokens = torch.arange(2.0 * n).view(2, n).double(), torch.tensor([3, 4])
    losses = VariantLosses(variants, sources, nats, tokens, nats, tokens)
    (means,) = (of for kind, of in COMPARED if kind is VariantLosses)
    for found in means(losses):
        assert list(found.index.get_level_values("of")) == [WHOLE, "forbid picked"]
    assert torch.equal(means(losses)[0].above, nats[:, :2])
