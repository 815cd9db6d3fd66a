"""Domain tests: calibrated where domains are alike, finding what was planted, and right in every number."""

from dataclasses import replace
from math import log
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import false_discovery_control

from benchmarks.domain_tests import SCENARIOS, draw, rates
from moe_lens.errors import InputError
from moe_lens.stats import DomainComparison, RoutingResult, RoutingStats, compare_domains
from moe_lens.stats.domain_pairs import information
from moe_lens.stats.domain_tests import npmi
from moe_lens.stats.multiple_tests import benjamini_hochberg, holm, most_significant
from moe_lens.stats.source_permutation import Deviations, divisions
from tests.stats.routed import routed

F64 = 1e-12
"""Both sides are float64 and of size 1: sums of up to some thousand terms in another order, each rounded by 1e-16."""

EXPERTS, TOP_K, LAYERS = 8, 2, 2


def domain(
    generator: torch.Generator, sources: int, bias: torch.Tensor | None = None, spread: float = 1.0
) -> RoutingResult:
    """Sources that each prefer experts of their own: tokens of a source depend on one another."""
    stats = RoutingStats(range(LAYERS), EXPERTS, TOP_K)
    for i in range(sources):
        taste = spread * torch.randn(LAYERS, 1, 1, EXPERTS, generator=generator)
        taste = taste if bias is None else taste + bias[:, None, None]
        noise = -torch.rand(LAYERS, 1, 30, EXPERTS, generator=generator).log().neg().log()
        stats.update(routed((taste + noise).topk(TOP_K).indices, sources=[f"s{i}"], n_experts=EXPERTS))
    return stats.result()


def test_p_values_are_calibrated_where_domains_are_alike():
    generator = torch.Generator().manual_seed(0)
    smallest, mi, naive = [], [], []
    for _ in range(60):
        results = {name: domain(generator, 12) for name in "ab"}
        found = compare_domains(results, permutations=99)
        smallest.append(float(found.p_values.min()))
        mi.append(float(found.mi_p_values[0]))
        # what a test of tokens would say of the same differences: z of two binomial shares
        p = found.shares.mean(0)
        z = found.differences[0] / (p * (1 - p) * 2 / 360).sqrt()
        naive.append(float(z.abs().max()))
    for p_values in (np.array(smallest), np.array(mi)):
        # 60 draws of a uniform share: a tenth is 6 ± 2.3, a half 30 ± 3.9
        assert 1 <= (p_values <= 0.1).sum() <= 13
        assert 18 <= (p_values <= 0.5).sum() <= 42
    assert np.mean(np.array(naive) > 3) > 0.9  # tokens are not independent: resampling them finds what is not there


@pytest.mark.typed
def test_planted_specialisation_is_found_and_nothing_else():
    generator = torch.Generator().manual_seed(1)
    bias = torch.zeros(LAYERS, EXPERTS)
    bias[1, 5] = 3.0
    results = {"a": domain(generator, 20), "b": domain(generator, 20, bias), "c": domain(generator, 20)}
    found = compare_domains(results, permutations=499)
    assert float(found.p_values[1, 1, 5]) == found.smallest_p == 1 / 500
    assert set(found.to_frame()["smallest_p"]) == set(found.per_layer()["smallest_p"]) == {found.smallest_p}
    assert found.strongest(1)[["domain", "layer", "expert"]].values.tolist() == [["b", 1, 5]]
    assert int(found.statistics.abs().argmax()) == 1 * LAYERS * EXPERTS + 1 * EXPERTS + 5
    assert float(found.npmi[1, 1, 5]) > 0.05
    assert (found.p_values[:, 0] > 0.05).all()
    assert found.mi_p_values.tolist()[1] == 1 / 500 and float(found.mi_p_values[0]) > 0.05
    assert found.pairs == (("a", "b"), ("a", "c"), ("b", "c"))
    pairs: Any = found.per_pair()
    layer: Any = pairs[pairs["layer"] == 1].set_index(["domain", "other"])
    assert layer.loc[("a", "b"), "p_value"] < 0.01 and layer.loc[("b", "c"), "p_value"] < 0.01
    assert layer.loc[("a", "c"), "p_value"] > 0.05


def test_with_sources_of_one_size_labels_are_permuted():
    generator = torch.Generator().manual_seed(5)
    results = [domain(generator, 12, spread=2), domain(generator, 7)]
    counts = torch.cat([result.assignments.double() for result in results])
    labels = torch.tensor([0] * 12 + [1] * 7)
    order = torch.rand(50, 19, generator=generator).argsort(-1)
    expected = torch.stack([counts[order][:, labels == d].sum(1) / (labels == d).sum() / 30 for d in (0, 1)], 1)
    alike = Deviations.of(counts, torch.full((19,), 30.0).double(), labels)
    assert torch.allclose(alike.reassigned(order), expected, rtol=0, atol=1e-12)
    tokens = torch.full((19,), 30.0).double()
    # A control: with one of another size something else is dealt, which differs by more than rounding.
    tokens[0], counts[0] = 3000, 100 * counts[0]
    assert not torch.allclose(Deviations.of(counts, tokens, labels).reassigned(order), expected, rtol=0, atol=1e-3)


def test_a_division_is_one_however_its_sources_are_ordered_and_its_domains_called():
    generator = torch.Generator().manual_seed(8)
    results, labels = [domain(generator, 3), domain(generator, 3)], torch.tensor([0, 0, 0, 1, 1, 1])
    size = torch.tensor([1, 2, 3, 9, 8, 7]).double()
    counts = torch.cat([result.assignments.double() for result in results]) * size[:, None, None]
    found = Deviations.of(counts, 30 * size, labels)
    same, other = torch.tensor([[0, 1, 2, 3, 4, 5], [2, 0, 1, 3, 5, 4], [4, 3, 5, 2, 1, 0]]), torch.arange(6).roll(1)
    assert torch.equal(found.reassigned(same), found.shares().expand(3, -1, -1, -1))
    assert float((found.reassigned(other[None])[0] - found.shares()).abs().max()) > 0.01, "a control"
    assert divisions([3, 3]) == 10 and divisions([2, 3]) == 10 and divisions([2, 2, 2, 1]) == 630 // 6


def test_few_sources_of_unlike_sizes_find_nothing_where_nothing_can_be_found():
    """Two sources against two can be divided in three ways; found were differences in .3 of such draws, p = .01."""
    generator, sizes = torch.Generator().manual_seed(0), [[200] * 2, [300] * 2]
    drawn = [compare_domains(draw(generator, lambda g: sizes), permutations=99) for _ in range(12)]  # noqa: ARG005
    for found in drawn:
        p_values = [found.p_values.min(), found.mi_p_values.min(), found.jsd_p_values.min()]
        assert min(p_values) >= found.smallest_p == found.jsd_smallest_p == pytest.approx(1 / 3)
    frames = drawn[0].to_frame(), drawn[0].per_layer(), drawn[0].per_pair()
    assert all(set(frame["smallest_p"]) == {drawn[0].smallest_p} for frame in frames)


def test_errors_are_those_of_shares():
    """The spread that sources of unequal sizes are given is the one that they have."""
    generator = torch.Generator().manual_seed(6)
    sizes, labels = torch.tensor([20] * 40 + [300] * 40).double(), torch.tensor([0] * 40 + [1] * 40)
    p, rho = 0.2, 0.1
    shape = torch.distributions.Beta(torch.tensor(p * (1 / rho - 1)), torch.tensor((1 - p) * (1 / rho - 1)))
    with torch.random.fork_rng():
        torch.manual_seed(6)
        taste = shape.sample(torch.Size([2000, 80])).double()
    counts = torch.binomial(sizes.expand(2000, 80), taste, generator=generator)[..., None, None]
    real = torch.stack([(counts[:, labels == d].sum(1) / sizes[labels == d].sum()).std() for d in (0, 1)])
    given = torch.stack([Deviations.of(c, sizes, labels).errors[:, 0, 0] for c in counts[:50]]).mean(0)
    # Standard errors: 1.6 % of the spread of 2,000 draws, about as much of the mean of 50 estimates from 40 sources.
    assert torch.allclose(given, real.double(), rtol=0.05)
    independent = (p * (1 - p) / torch.tensor([800.0, 12000])).sqrt()  # what tokens that do not depend would give
    assert (real > 1.5 * independent).all()


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["10 × 20 | 30 × 200", "10 of ~30 | 15 of ~60 | 30 of ~150"])
def test_domains_of_small_and_large_sources_are_alike_if_routed_alike(scenario):
    draws = 200
    found = rates(SCENARIOS[scenario], draws=draws, permutations=99, seed=1)
    most = 0.05 + 2 * (0.05 * 0.95 / draws) ** 0.5
    assert found["experts"] <= most and found["mi"] <= most
    assert abs(found["mi, excess"]) < 0.15
    assert found["power"] > 0.5
    assert found["experts, plain"] > most and found["mi, plain"] > most  # labels alone, as if sizes did not matter


def test_experts_that_hardly_occur_are_not_tested():
    few, many = torch.tensor([[0, 1]] * 9 + [[2, 3]]), torch.tensor([[0, 1]] * 30)
    results = {}
    for name, chosen in (("a", few), ("b", many)):
        stats = RoutingStats([0], 4, 2)
        for i in range(3):
            stats.update(routed(chosen[None, None], sources=[f"s{i}"], n_experts=4))
        results[name] = stats.result()
    found = compare_domains(results, permutations=99)  # 3 of 120 tokens: less than one is expected of the 30 of "a"
    assert found.statistics[:, 0, 2:].eq(0).all() and found.p_values[:, 0, 2:].eq(1).all()
    assert found.differences[0, 0, 2] == pytest.approx(0.1) and found.statistics[0, 0, 0] != 0


@pytest.mark.parametrize(("largest", "tested"), [(1000, False), (400, True)])
def test_nothing_is_tested_where_one_source_is_nearly_all_of_a_domain(largest: int, tested: bool):
    """Beside nine others of 20 tokens."""
    sizes = [[largest, *[20] * 9], [60] * 12]
    found = compare_domains(draw(torch.Generator().manual_seed(1), lambda _: sizes, 1.5), permutations=99)
    assert bool(found.statistics.any()) is tested and bool((found.p_values < 1).any()) is tested
    assert found.differences.any() and found.mi_p_values.isfinite().all()


def test_null_is_what_mutual_information_is_where_there_is_none():
    generator = torch.Generator().manual_seed(2)
    found = [compare_domains({n: domain(generator, 12) for n in "abc"}, permutations=60) for _ in range(20)]
    excess = torch.stack([one.mi - one.mi_null for one in found]).flatten()
    raw = torch.stack([one.mi for one in found])
    assert abs(float(excess.mean())) < 3 * float(excess.std()) / len(excess) ** 0.5
    assert float(raw.mean()) > 20 * abs(float(excess.mean()))  # uncorrected, it is anything but 0


def test_every_number_by_its_definition():
    generator = torch.Generator().manual_seed(3)
    results = {name: domain(generator, 3 + i, spread=3) for i, name in enumerate("abc")}
    found = compare_domains(results, permutations=30)
    q = np.stack([result.specialisation.numpy() / TOP_K for result in results.values()])
    for layer in range(LAYERS):
        joint = q[:, layer] / 3
        independent = joint.sum(0) * (1 / 3)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(joint > 0, joint * np.log(joint / independent), 0)
            pmi = np.where(joint > 0, np.log(joint / independent) / -np.log(joint), -1)
        assert float(found.mi[layer]) == pytest.approx(terms.sum(), abs=F64)
        assert found.npmi[:, layer].numpy() == pytest.approx(pmi, abs=F64)
        for i, (a, b) in enumerate([(0, 1), (0, 2), (1, 2)]):
            middle = (q[a, layer] + q[b, layer]) / 2
            with np.errstate(divide="ignore", invalid="ignore"):
                kl = [np.where(q[d, layer] > 0, q[d, layer] * np.log(q[d, layer] / middle), 0).sum() for d in (a, b)]
            assert float(found.jsd[layer, i]) == pytest.approx(sum(kl) / 2, abs=F64)
    others = (found.shares[1] + found.shares[2]) / 2
    assert torch.allclose(found.differences[0], found.shares[0] - others)


def test_a_pair_comes_from_its_two_domains_alone():
    generator = torch.Generator().manual_seed(7)
    bias = torch.zeros(LAYERS, EXPERTS)
    bias[:, 3] = 2.5
    two = {"a": domain(generator, 12), "b": domain(generator, 11, bias)}
    alone = compare_domains(two, permutations=99)
    # a third that is far from both: pooled with it, the first two differed less than chance
    far = compare_domains({**two, "c": domain(generator, 10, 2 * bias.flip(-1))}, permutations=99)
    assert far.pairs[0] == ("a", "b") and far.pair_sources == ((12, 11), (12, 10), (11, 10))
    assert far.pair_dropped == (0, 0, 0)
    for name in ("jsd", "jsd_null", "jsd_p_values"):
        assert torch.equal(getattr(far, name)[:, 0], getattr(alone, name)[:, 0])
    one: Any
    three: Any
    one, three = (
        found.per_pair().query("domain == 'a' and other == 'b'").reset_index(drop=True) for found in (alone, far)
    )
    assert torch.equal(*(torch.tensor(t[["low", "high", "smallest_p"]].to_numpy()) for t in (one, three)))
    assert (one["p_value"] <= 0.05).all() and (one["excess"] > 0).all()
    assert (three["p_holm"] >= three["p_value"]).all() and (three["p_holm"] >= one["p_holm"]).all()
    # what can be reached: 3 against 3 sources have 10 labellings that differ, 12 against 11 more than were drawn
    few = {name: domain(generator, 3) for name in "ab"}
    assert compare_domains(few, permutations=99).per_pair()["smallest_p"].tolist() == [0.1] * LAYERS
    assert set(one["smallest_p"]) == {0.01}


def test_parallel_sources_are_swapped_in_their_block():
    """The same documents in two domains: what a document is about is no difference between the domains."""
    generator = torch.Generator().manual_seed(8)
    small = torch.zeros(LAYERS, EXPERTS)
    small[0, 2] = 0.7

    def translations(bias: torch.Tensor | None, extra: int) -> dict[str, RoutingResult]:
        stats = {name: RoutingStats(range(LAYERS), EXPERTS, TOP_K) for name in ("en", "de")}
        for i in range(12 + extra):
            about = 1.5 * torch.randn(LAYERS, 1, 1, EXPERTS, generator=generator)
            for name in stats if i < 12 else ["en"]:
                shift = bias[:, None, None] if bias is not None and name == "de" else 0
                noise = -torch.rand(LAYERS, 1, 60, EXPERTS, generator=generator).log().neg().log()
                chosen = (about + shift + noise).topk(TOP_K).indices
                stats[name].update(routed(chosen, sources=[f"{name}/{i:02d}"], n_experts=EXPERTS))
        return {name: of.result() for name, of in stats.items()}

    def key(source: str) -> str:
        return source.split("/")[-1]

    differ = translations(small, extra=2)
    paired, free = compare_domains(differ, permutations=199, parallel=key), compare_domains(differ, permutations=199)
    assert paired.pair_sources == ((12, 12),) and paired.pair_dropped == (2,) and free.pair_dropped == (0,)
    assert float(paired.jsd_p_values[0, 0]) <= 0.01 and float(free.jsd_p_values[0, 0]) > 0.05
    table: Any = paired.per_pair()
    other: Any = free.per_pair()
    assert (table["high"] - table["low"])[0] < (other["high"] - other["low"])[0] / 2
    # left out is left out: the divergence is that of the twelve
    twelve = {name: keep(result, 12) for name, result in differ.items()}
    assert torch.equal(paired.jsd, compare_domains(twelve, permutations=9).jsd)
    alike = [compare_domains(translations(None, 0), permutations=39, parallel=key).jsd_p_values for _ in range(20)]
    p_values = torch.stack(alike).flatten()  # 40 draws of a uniform share: a tenth is 4 ± 1.9, a half 20 ± 3.2
    assert int((p_values <= 0.1).sum()) <= 10 and 10 <= int((p_values <= 0.5).sum()) <= 30
    # domains without a common key are compared as if there were none
    apart = compare_domains(differ, permutations=99, parallel=lambda source: source)
    assert torch.equal(apart.jsd, free.jsd) and apart.pair_dropped == (0,)


def keep(result: RoutingResult, n: int) -> RoutingResult:
    return replace(
        result,
        sources=result.sources[:n],
        **{
            name: getattr(result, name)[:n] for name in ("tokens", "assignments", "top1", "weights", "sums", "measured")
        },
    )


def test_intervals_of_divergences_cover_the_truth():
    """Sources whose shares scatter about known ones, of unequal sizes; the first domain is nearer to the second."""
    generator = torch.Generator().manual_seed(9)
    base = torch.randn(EXPERTS, generator=generator)
    tilt = torch.randn(EXPERTS, generator=generator)
    loads = torch.stack([(base + by * tilt).softmax(0) for by in (0.0, 0.4, 1.2)]).double()
    pairs = [(0, 1), (0, 2), (1, 2)]
    truth = torch.stack([information(loads[list(pair)][:, None])[0] for pair in pairs])
    covered, nearer, plain = [], [], []
    draws = [{n: scattered(generator, p) for n, p in zip("abc", loads, strict=True)} for _ in range(40)]
    found = compare_domains(draws[0], permutations=1)
    for each in draws:
        found = compare_domains(each, permutations=1)
        table = found.per_pair()
        covered += [low <= value <= high for low, high, value in zip(table["low"], table["high"], truth, strict=True)]
        plain.append(found.jsd[0] - truth)
        last: Any = found.nearer("a", "b", "c").iloc[-1]
        nearer.append((last["low"] <= truth[0] - truth[1] <= last["high"], last["high"] < 0))
    assert sum(covered) >= 0.87 * len(covered) and sum(hit for hit, _ in nearer) >= 34  # of 120 and 40; .95 expected
    assert sum(found for _, found in nearer) >= 30  # and say which is nearer
    # a control: as they are, divergences of few sources are too large
    bias = torch.stack(plain)
    assert (bias.mean(0)[:1] > 4 * bias.std(0)[:1] / 40**0.5).all()
    other = found.nearer("a", "c", "b")
    assert torch.allclose(torch.tensor(other["difference"]), -torch.tensor(found.nearer("a", "b", "c")["difference"]))
    with pytest.raises(InputError, match=r"got \['a', 'b', 'b'\]; expected three different ones of \['a', 'b', 'c'\]"):
        found.nearer("a", "b", "b")
    with pytest.raises(InputError, match="nearer to one than to another takes three"):
        compare_domains({name: draws[0][name] for name in "ab"}, permutations=1).nearest()


def test_intervals_of_divergences_cover_the_truth_where_one_source_holds_nearly_all_of_the_text():
    generator = torch.Generator().manual_seed(9)
    loads = torch.tensor([[1.0, 1, 1, 1, 2, 2, 4, 4], [4, 4, 2, 2, 1, 1, 1, 1]]).double() / 16
    truth, sizes = float(information(loads[:, None])[0]), torch.tensor([4000] + [60] * 11)
    for parallel in (None, str):
        held = equal = 0
        for _ in range(30):
            draw = {name: scattered(generator, load, sizes) for name, load in zip("ab", loads, strict=True)}
            found = compare_domains(draw, permutations=1, parallel=parallel)
            alike = replace(found, unit_tokens=found.unit_domains.double())  # negative control: as if of one size
            for n, table in enumerate((found.per_pair(), alike.per_pair())):
                hit = bool(table["low"][0] <= truth <= table["high"][0])
                held, equal = (held + hit, equal) if n == 0 else (held, equal + hit)
        assert held >= 27 and equal <= 25


def test_intervals_of_divergences_stay_within_what_they_can_be():
    """Two domains with hardly an expert in common, one source of which has some."""
    counts = torch.tensor([[[20, 0]]] * 11 + [[[4, 16]]])
    nothing, names = torch.zeros(12, 1, 2), tuple(map(str, range(12)))
    a, b = (
        RoutingResult((0,), 1, names, of.sum((1, 2)), of, of, of.double(), nothing, nothing.long())
        for of in (counts, counts.flip(2))
    )
    found = compare_domains({"a": a, "b": b}, permutations=1)
    table: Any
    for table in (found.per_pair(), found.per_layer()):
        assert table["low"][0] < table["high"][0] == pytest.approx(log(2), abs=F64)
    alike: Any = compare_domains({"a": a, "b": a}, permutations=1).per_pair()
    assert alike["low"][0] == 0 <= alike["high"][0]


def scattered(generator: torch.Generator, load: torch.Tensor, sizes: torch.Tensor | None = None) -> RoutingResult:
    """Counts of 12 sources, of one layer, whose shares are Dirichlet draws about `load`."""
    if sizes is None:
        sizes = (40 * (0.7 * torch.randn(12, generator=generator)).exp()).long().clamp(min=8)
    shares = torch._sample_dirichlet((40 * load).expand(12, EXPERTS).contiguous(), generator=generator)
    chosen = [
        share.multinomial(int(n) * TOP_K, True, generator=generator) for share, n in zip(shares, sizes, strict=True)
    ]
    counts = torch.stack([one.bincount(minlength=EXPERTS) for one in chosen])[:, None]
    nothing = torch.zeros(12, 1, 2)
    names = tuple(f"s{i:02d}" for i in range(12))
    weights = torch.zeros(12, 1, EXPERTS)
    return RoutingResult((0,), TOP_K, names, sizes, counts, torch.zeros_like(counts), weights, nothing, nothing.long())


@pytest.mark.typed
def test_many_tests_are_one_family():
    p = torch.tensor([[0.01, 0.04, torch.nan], [0.03, 0.005, 0.5]], dtype=torch.float64)
    assert holm(p).nan_to_num(-1).tolist() == [[0.04, 0.09, -1], [0.09, 0.025, 0.5]]
    known = p[~p.isnan()]
    # p m / rank: two roundings of numbers below 1 on either side
    assert benjamini_hochberg(p)[~p.isnan()].numpy() == pytest.approx(false_discovery_control(known.numpy()), abs=1e-15)
    assert not len(holm(torch.tensor([]))) and benjamini_hochberg(torch.tensor([0.75])).tolist() == [0.75]
    frame = pd.DataFrame(
        {"expert": [0, 1, 2, 3], "p_value": [0.2, 0.01, 0.01, 0.01], "statistic": [9.0, 1.0, -3.0, 2.0]}
    )
    assert most_significant(frame, "statistic")["expert"].tolist() == [2, 3, 1, 0]


def test_many_pairs_and_layers_are_permuted_often_enough_to_be_found():
    """Ten pairs and as many layers as DeepSeekMoE 16B has: 1,999 permutations could find none of them."""
    generator, layers = torch.Generator().manual_seed(5), 27
    results = {}
    for i, name in enumerate("abcde"):
        bias = 2.0 * torch.nn.functional.one_hot(torch.tensor(i), EXPERTS)
        stats = RoutingStats(range(layers), EXPERTS, TOP_K)
        for s in range(10):
            noise = -torch.rand(layers, 1, 40, EXPERTS, generator=generator).log().neg().log()
            stats.update(routed((bias + noise).topk(TOP_K).indices, sources=[f"s{s}"], n_experts=EXPERTS))
        results[name] = stats.result()
    found: Any = compare_domains(results).per_pair()
    assert len(found) == 270 and (found["p_holm"] <= 0.05).all()
    few: Any = compare_domains(results, permutations=1999).per_pair()
    assert (few["p_holm"] > 0.05).all()


def test_permutations_keep_sources_together():
    # Two sources in all: there are two labellings, and no difference however great can be told from chance.
    one, two = torch.tensor([0, 1]), torch.tensor([2, 3])
    results = {}
    for name, chosen in (("a", one), ("b", two)):
        stats = RoutingStats([0], 4, 2)
        results[name] = stats.update(routed(chosen.expand(1, 1, 500, 2), sources=["s"], n_experts=4)).result()
    found = compare_domains(results, permutations=200)
    assert float(found.p_values.min()) > 0.9
    assert found.mi.tolist() == pytest.approx([np.log(2)], abs=F64)
    assert (found.mi - found.mi_null).tolist() == pytest.approx([0], abs=F64)
    assert npmi(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])).tolist() == [[1, -1, 0], [-1, 1, 0]]


def test_what_cannot_be_compared_is_refused(tmp_path):
    generator = torch.Generator().manual_seed(4)
    result = domain(generator, 3)
    with pytest.raises(InputError, match=r"got the domains \['a'\]; expected at least two"):
        compare_domains({"a": result})
    other = RoutingStats([0], 4, 2).update(routed(torch.tensor([[[[0, 1]]]]), n_experts=4)).result()
    with pytest.raises(InputError, match="different models"):
        compare_domains({"a": result, "b": other})
    found = compare_domains({"a": result, "b": domain(generator, 4)}, permutations=20)
    assert len(found.to_frame()) == 2 * LAYERS * EXPERTS and len(found.per_layer()) == LAYERS
    found.save(tmp_path / "domains.safetensors")
    assert DomainComparison.load(tmp_path / "domains.safetensors").to_frame().equals(found.to_frame())
