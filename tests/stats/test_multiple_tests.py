"""Corrections for many tests: against their definitions, one by one."""

import torch

from moe_lens.stats.multiple_tests import enough_draws, holm, max_t


def test_max_t_counts_draws_that_reach_a_statistic_and_the_data_themselves():
    generator = torch.Generator().manual_seed(0)
    greatest = torch.rand(199, generator=generator).double() * 3
    statistics = torch.tensor([[0.0, -1.0, 2.5], [9.0, float("nan"), 0.1]]).double()
    statistics[0, 2] = greatest[7]  # a draw that gives the observed data again
    p_values = max_t(statistics, greatest)
    for at in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2)]:
        reached = sum(float(draw) >= abs(float(statistics[at])) for draw in greatest)
        assert float(p_values[at]) == (1 + reached) / 200
    assert p_values[1, 1].isnan() and float(p_values[1, 0]) == 1 / 200
    lost_bits = statistics[0, 2] * (1 + 1e-12)  # and does so but for the last bits
    assert float(max_t(lost_bits[None], greatest)[0]) == float(p_values[0, 2])


def test_draws_are_enough_for_holm_to_find_something():
    for n_tests in (1, 50, 270, 499):  # the last of which even the most draws can serve
        least = 1 / (enough_draws(n_tests) + 1)
        assert float(holm(torch.full((n_tests,), least)).max()) <= 0.05
    assert enough_draws(1) == enough_draws(50) == 1999 and enough_draws(10**6) == 9999
    assert float(holm(torch.full((270,), 1 / 2000)).min()) > 0.05  # ten pairs and 27 layers: fewer find nothing
