"""Experts are said to cost more than their controls as often as is claimed, and only if they cost anything."""

import math

import pandas as pd
import pytest
import torch

from moe_lens.studies.held_against import LEVEL, against_controls, costs_more

FAMILIES, TESTS, SOURCES = 12, 20, 20
NOT_BY_CHANCE = 3
"""Families with a false star: at .025 each, so many of twelve come about in 3 of 1,000 runs; the draws are fixed."""


def drawn(own: float, control: float, seed: int) -> list[dict]:
    """Families of comparisons: effects of skewed noise, sources that differ in all they lose, and in their sizes."""
    generator = torch.Generator().manual_seed(seed)
    tokens = (torch.rand(SOURCES, generator=generator) * 30 + 10).round()
    shared = torch.randn(SOURCES, 1, generator=generator) * 0.03

    def sums(mean: float, k: int) -> torch.Tensor:
        noise = 0.05 * (-torch.rand(SOURCES, k, generator=generator).log() - 1)
        return tokens[:, None] * (mean + shared + noise)

    return [against_controls(sums(own, 1)[:, 0], sums(control, 4), tokens, TESTS) for _ in range(TESTS)]


@pytest.mark.parametrize(("own", "control"), [(0.1, 0.1), (0.0, -0.2), (-0.1, -0.3)])
def test_no_expert_is_starred_by_chance_nor_because_its_controls_cost_less_than_nothing(own, control):
    families = [drawn(own, control, seed) for seed in range(FAMILIES)]
    assert sum(any(one["starred"] for one in family) for family in families) < NOT_BY_CHANCE
    if own > control:  # negative control: what a star by the difference alone would have said
        assert all(one["beyond_low"] > 0 for family in families for one in family)


def test_a_planted_cost_beyond_the_controls_is_starred():
    found = [one["starred"] for seed in range(3) for one in drawn(0.1, 0.0, seed)]
    assert sum(found) >= 0.95 * len(found)


def test_the_numbers_are_those_made_by_hand():
    found = drawn(0.3, 0.1, 0)[0]
    one = drawn(0.3, 0.1, 0)[0]
    assert found == one and found["controls"] == 4
    own, controls = torch.tensor([[2.0, 8.0], [1.0, 3.0]]).repeat(6, 1).split(1, 1)
    made = against_controls(own[:, 0], torch.cat([controls, controls + 2], 1), torch.full((12,), 10.0), 1)
    assert made["control_added"] == pytest.approx(6.5 / 10) and made["beyond"] == pytest.approx((1.5 - 6.5) / 10)
    assert made["all_low"] < 0.15 < made["all_high"] and made["starred"] is False
    wider = against_controls(own[:, 0], controls, torch.full((12,), 10.0), 50)
    assert wider["all_low"] < made["all_low"] and 0 < LEVEL < 1


def test_what_cannot_be_told_is_missing():
    few = against_controls(torch.ones(9), torch.zeros(9, 2), torch.ones(9), 1)
    assert few["starred"] is None and math.isnan(few["beyond_low"]) and few["beyond"] == 1
    assert against_controls(torch.ones(12), torch.zeros(12, 0), torch.ones(12), 1) == {"controls": 0}
    assert costs_more(0.1, 0.2) is True and costs_more(-0.1, 0.2) is False and costs_more(math.nan, 0.2) is None
    own, beyond = pd.Series([0.1, -0.1, None]), pd.Series([0.1, 0.1, 0.1])
    assert costs_more(own, beyond).tolist() == [True, False, pd.NA]
