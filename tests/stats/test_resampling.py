"""The bootstrap on cases with a known answer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.errors import InputError
from moe_lens.resampling import tail
from moe_lens.stats import MIN_SOURCES, bootstrap, halves
from moe_lens.stats.parallel_sources import resampled_blocks

EVEN = torch.ones
"""Sources of one size."""


def mean_of(values: torch.Tensor):
    return lambda times: (times @ values) / times.sum(-1)


def test_interval_of_a_mean_is_the_normal_one():
    values = torch.randn(400, dtype=torch.float64)
    interval = bootstrap(mean_of(values), EVEN(400), resamples=20_000)
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

    bootstrap(check, EVEN(12))


def test_level_is_kept_and_wider_is_wider():
    values = torch.arange(20.0, dtype=torch.float64)
    wide, narrow = (bootstrap(mean_of(values), EVEN(20), level=level) for level in (0.99, 0.5))
    assert wide and narrow and wide.low < narrow.low < narrow.high < wide.high
    assert (wide.level, narrow.level) == (0.99, 0.5)


def test_another_level_and_another_number_of_values_are_refused():
    values = torch.arange(20.0, dtype=torch.float64)
    for level in (95, 1.0, 0.0, math.nan):
        with pytest.raises(InputError, match=r"expected a share in \(0, 1\)"):
            bootstrap(mean_of(values), EVEN(20), level=level)
    for statistic in (lambda times: (times @ values).mean(), lambda times: (times @ values).numpy()):
        with pytest.raises(InputError, match="expected a tensor with a value for each of 2000 resamples"):
            bootstrap(statistic, EVEN(20))
    with pytest.raises(InputError, match="bootstrap_all takes many"):
        bootstrap(lambda times: times * values, EVEN(20))


def test_sources_that_agree_leave_no_doubt_and_the_seed_decides():
    same = bootstrap(mean_of(torch.full((10,), 3.0, dtype=torch.float64)), EVEN(10))
    assert same and same.low == same.high == 3.0
    values = torch.randn(10, dtype=torch.float64)
    once = bootstrap(mean_of(values), EVEN(10))
    assert once == bootstrap(mean_of(values), EVEN(10)) != bootstrap(mean_of(values), EVEN(10), seed=1)


def test_no_interval_below_ten_sources():
    values = torch.randn(MIN_SOURCES, dtype=torch.float64)
    assert bootstrap(mean_of(values[:-1]), EVEN(MIN_SOURCES - 1)) is None
    assert bootstrap(mean_of(values), EVEN(MIN_SOURCES)) is not None


def test_tails_make_up_for_few_sources():
    # Φ(−√(n / (n − 1)) t), t of a table of Student's distribution: 2.262 with 9 degrees of freedom, 2.045 with 29
    for n, t in ((10, 2.262), (30, 2.045)):
        expected = 0.5 * math.erfc(math.sqrt(n / (n - 1)) * t / math.sqrt(2))
        assert tail(EVEN(n)) == pytest.approx(expected, rel=2e-3)
        assert tail(7 * EVEN(n)) == tail(EVEN(n)) == tail(torch.cat([EVEN(n), torch.zeros(5)]))  # size is relative
    assert tail(EVEN(10**6)) == pytest.approx(0.025, rel=1e-4)
    assert tail(EVEN(20)) > tail(torch.tensor([1.0] * 19 + [20])) > 0


def test_intervals_hold_the_truth_as_often_as_they_claim():
    generator = torch.Generator().manual_seed(0)
    held = torch.zeros(2)
    for i in range(600):
        values, seen = torch.randn(10, generator=generator, dtype=torch.float64), []
        ends = bootstrap(lambda times: seen.append(mean_of(values)(times)) or seen[0], EVEN(10), seed=i)  # noqa: B023
        plain = seen[0].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        assert ends is not None
        held += torch.tensor([ends.low < 0 < ends.high, bool(plain[0] < 0 < plain[1])])
    # 600 draws of .95 have a standard error of .009; plain percentiles, with ten sources, claim too much
    assert held[0] / 600 >= 0.95 - 2 * 0.009 and held[1] / 600 < 0.92


@given(st.lists(st.text(max_size=3), min_size=1, max_size=20), st.integers(0, 5))
def test_halves_are_even_and_do_not_depend_on_order(sources, seed):
    half = halves(sources, seed)
    assert half == halves(reversed(sources), seed)
    assert half.keys() == set(sources)
    assert abs(sum(half.values()) * 2 - len(half)) <= 1


def test_blocks_are_drawn_whole_and_domains_without_common_ones_each_by_itself():
    twins = {name: {f"{name}{i}": f"chapter {i}" for i in range(12)} for name in ("de", "fr")}
    alone = {"code": {f"m{i}": f"m{i}" for i in range(12)}}
    times = resampled_blocks(twins | alone, resamples=500, seed=3)
    assert torch.equal(times["de"], times["fr"]) and times["code"].sum(1).eq(12).all()
    of_both = torch.corrcoef(torch.stack([times["de"][:, 0], times["code"][:, 0]]))[0, 1]
    assert abs(float(of_both)) < 0.2  # 500 pairs of independent numbers: 0 ± .045
    assert torch.equal(times["de"], resampled_blocks(twins | alone, resamples=500, seed=3)["de"])
