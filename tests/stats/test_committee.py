"""Standing committees: planted ones are found, experts of one domain are none, and noise is not picked and measured."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens.errors import InputError
from moe_lens.stats import RoutingResult, standing_committee

DOMAINS, SOURCES, EXPERTS, TOP_K = ("a", "b", "c"), 14, 12, 2
F64 = 1e-12  # sums of a few numbers in float64


def results(shares: dict[str, Tensor], seed: int = 0, tokens: float = 200) -> dict[str, RoutingResult]:
    """Weight of each source: the domain's shares of two layers, and noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for domain in DOMAINS:
        noise = (0.3 * torch.randn(SOURCES, 2, EXPERTS, generator=generator)).exp()
        weights = (tokens * shares[domain] * noise / EXPERTS).double()
        none = torch.zeros(SOURCES, 2, 2)
        n = torch.full((SOURCES,), int(tokens))
        counts = weights.long()
        sources = tuple(f"{domain}{i}" for i in range(SOURCES))
        found[domain] = RoutingResult((1, 4), TOP_K, sources, n, counts, counts, weights, none, none.long())
    return found


def with_experts(experts: list[int], weight: float) -> Tensor:
    """Both layers alike but for the weight of some experts in the second."""
    shares = torch.ones(2, EXPERTS)
    shares[1, experts] = weight
    return shares


def test_a_planted_committee_is_found_in_its_layer_and_beyond_its_control():
    found = standing_committee(results(dict.fromkeys(DOMAINS, with_experts([3, 7], 15.0))))
    control = standing_committee(results(dict.fromkeys(DOMAINS, with_experts([0, 1], 2.0)), seed=1))
    layers: Any = found.per_layer(control).set_index("layer")
    assert layers["finding"][4] == "a standing committee" and layers["members"][4] == "3 7" and layers["half"][4] <= 2
    assert layers["finding"][1].startswith("no standing committee") and layers["half"][1] >= EXPERTS / 2 - 1
    assert layers["jaccard"][4] == 1 and layers["control_least"][4] < 0.5
    frame: Any = found.to_frame(control).query("layer == 4")
    assert (frame["beyond_low"] > 0).all() and (frame["low"] < frame["mass"]).all()
    itself: Any = found.per_layer(found).set_index("layer")
    assert itself["finding"][4].startswith("not beyond the control"), "negative control: nothing is beyond itself"
    assert found.per_layer()["finding"].tolist()[1].endswith("no control was run")


@pytest.mark.typed
def test_experts_of_one_domain_each_are_none_and_own_sets_carry_what_the_shared_one_does_not():
    found = standing_committee(
        results({name: with_experts([2 * i, 2 * i + 1], 15.0) for i, name in enumerate(DOMAINS)})
    )
    frame: Any = found.to_frame().query("layer == 4")
    assert (frame["own"] > 0.6).all() and frame["mass"].min() < 0.2
    assert found.uniform_jaccard == pytest.approx(1 / 11)  # of two and two of twelve, 4/12 are shared on average
    assert found.jaccard[1] == 0 and "no standing committee" in found.per_layer()["finding"].iloc[1]


def test_what_is_picked_is_measured_on_other_sources():
    given = results(dict.fromkeys(DOMAINS, torch.ones(2, EXPERTS)), tokens=5)
    one_each = {}
    for domain, of in given.items():  # every source sends all its weight to one expert, at random
        generator = torch.Generator().manual_seed(len(one_each))
        chosen = torch.randint(EXPERTS, (SOURCES, 2), generator=generator)
        weights = torch.nn.functional.one_hot(chosen, EXPERTS).double()
        one_each[domain] = RoutingResult(
            of.layers, of.top_k, of.sources, of.tokens, weights.long(), weights.long(), weights, of.sums, of.measured
        )
    found = standing_committee(one_each, size=4)
    carried = float(found.own.sum() / found.weight.sum())
    assert carried < 0.45, "picked and measured on the same sources it would be .6"
    assert abs(float(found.weight.sum()) - 3 * SOURCES * 2) < F64


def test_what_cannot_be_told_is_refused():
    given = results(dict.fromkeys(DOMAINS, torch.ones(2, EXPERTS)))
    with pytest.raises(InputError, match="expected at least two"):
        standing_committee({"a": given["a"]})
    with pytest.raises(InputError, match="the layers have 12 experts"):
        standing_committee(given, size=13)
    with pytest.raises(InputError, match="two are needed"):
        standing_committee(given, parallel=lambda name: name[:1])
