"""Domain tests: calibrated where domains are alike, finding what was planted, and right in every number."""

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.domain_tests import SCENARIOS, rates
from moe_lens.errors import InputError
from moe_lens.stats import DomainComparison, RoutingResult, RoutingStats, compare_domains
from moe_lens.stats.domain_tests import npmi
from moe_lens.stats.source_permutation import Deviations
from tests.stats.routed import routed

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


def test_planted_specialisation_is_found_and_nothing_else():
    generator = torch.Generator().manual_seed(1)
    bias = torch.zeros(LAYERS, EXPERTS)
    bias[1, 5] = 3.0
    results = {"a": domain(generator, 20), "b": domain(generator, 20, bias), "c": domain(generator, 20)}
    found = compare_domains(results, permutations=499)
    assert float(found.p_values[1, 1, 5]) == 1 / 500
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
        assert float(found.mi[layer]) == pytest.approx(terms.sum(), abs=1e-12)
        assert found.npmi[:, layer].numpy() == pytest.approx(pmi, abs=1e-12)
        for i, (a, b) in enumerate([(0, 1), (0, 2), (1, 2)]):
            middle = (q[a, layer] + q[b, layer]) / 2
            with np.errstate(divide="ignore", invalid="ignore"):
                kl = [np.where(q[d, layer] > 0, q[d, layer] * np.log(q[d, layer] / middle), 0).sum() for d in (a, b)]
            assert float(found.jsd[layer, i]) == pytest.approx(sum(kl) / 2, abs=1e-12)
    others = (found.shares[1] + found.shares[2]) / 2
    assert torch.allclose(found.differences[0], found.shares[0] - others)


def test_permutations_keep_sources_together():
    # Two sources in all: there are two labellings, and no difference however great can be told from chance.
    one, two = torch.tensor([0, 1]), torch.tensor([2, 3])
    results = {}
    for name, chosen in (("a", one), ("b", two)):
        stats = RoutingStats([0], 4, 2)
        results[name] = stats.update(routed(chosen.expand(1, 1, 500, 2), sources=["s"], n_experts=4)).result()
    found = compare_domains(results, permutations=200)
    assert float(found.p_values.min()) > 0.9
    assert found.mi.tolist() == pytest.approx([np.log(2)], abs=1e-12)
    assert (found.mi - found.mi_null).tolist() == pytest.approx([0], abs=1e-12)
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
