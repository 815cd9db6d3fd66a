"""The bootstrap on cases with a known answer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.stats import MIN_SOURCES, bootstrap, halves


def mean_of(values: torch.Tensor):
    return lambda times: (times @ values) / times.sum(-1)


def test_interval_of_a_mean_is_the_normal_one():
    values = torch.randn(400, dtype=torch.float64)
    interval = bootstrap(mean_of(values), 400, resamples=20_000)
    assert interval is not None
    half_width = 1.96 * float(values.std(correction=0)) / math.sqrt(400)
    # 20,000 resamples place an end of the interval within about 0.02 of its standard error: 0.05 of the half width is
    # several times the noise of the bootstrap itself.
    assert interval.low == pytest.approx(float(values.mean()) - half_width, abs=0.05 * half_width)
    assert interval.high == pytest.approx(float(values.mean()) + half_width, abs=0.05 * half_width)


def test_every_resample_draws_as_many_sources_as_there_are():
    def check(times):
        assert (times.sum(-1) == 12).all()
        assert (times >= 0).all()
        return times[:, 0]

    bootstrap(check, 12)


def test_level_is_kept_and_wider_is_wider():
    values = torch.arange(20.0, dtype=torch.float64)
    wide, narrow = bootstrap(mean_of(values), 20, level=0.99), bootstrap(mean_of(values), 20, level=0.5)
    assert wide and narrow and wide.low < narrow.low < narrow.high < wide.high
    assert (wide.level, narrow.level) == (0.99, 0.5)


def test_sources_that_agree_leave_no_doubt_and_the_seed_decides():
    same = bootstrap(mean_of(torch.full((10,), 3.0, dtype=torch.float64)), 10)
    assert same and same.low == same.high == 3.0
    values = torch.randn(10, dtype=torch.float64)
    assert bootstrap(mean_of(values), 10) == bootstrap(mean_of(values), 10)
    assert bootstrap(mean_of(values), 10) != bootstrap(mean_of(values), 10, seed=1)


def test_no_interval_below_ten_sources():
    values = torch.randn(MIN_SOURCES, dtype=torch.float64)
    assert bootstrap(mean_of(values[:-1]), MIN_SOURCES - 1) is None
    assert bootstrap(mean_of(values), MIN_SOURCES) is not None


@given(st.lists(st.text(max_size=3), min_size=1, max_size=20), st.integers(0, 5))
def test_halves_are_even_and_do_not_depend_on_order(sources, seed):
    half = halves(sources, seed)
    assert half == halves(reversed(sources), seed)
    assert half.keys() == set(sources)
    assert abs(sum(half.values()) * 2 - len(half)) <= 1
