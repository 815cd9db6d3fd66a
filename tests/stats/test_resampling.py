"""The bootstrap on cases with a known answer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from moe_lens.errors import InputError
from moe_lens.resampling import effective, jackknife_interval, tail, times_drawn
from moe_lens.stats import MIN_SOURCES, bootstrap, bootstrap_all, halves
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


@pytest.mark.typed
def test_sources_that_hold_nothing_of_a_ratios_denominator_do_not_count():
    generator = torch.Generator().manual_seed(0)
    counts = 40.0 * (torch.arange(20)[:, None] < torch.tensor([1, 4, MIN_SOURCES - 1, MIN_SOURCES, 20])).double()
    hits = torch.binomial(
        counts, torch.rand(20, 1, generator=generator).expand(counts.shape).double(), generator=generator
    )

    def share(times: torch.Tensor) -> torch.Tensor:
        return (times @ hits) / (times @ counts)

    known = torch.tensor([False, False, False, True, True])
    together = bootstrap_all(share, counts)
    assert together is not None and torch.equal(together.isfinite(), known.expand(2, 5))
    # with the size of other text for the denominator, a source alone would decide both ends
    point = bootstrap_all(share, EVEN(20))
    assert point is not None and point[0, 0] == point[1, 0]
    for column, sizes in enumerate(counts.mT):
        alone = bootstrap(lambda times, at=column: share(times)[:, at], sizes)
        assert (alone is not None) == bool(known[column])
    assert bootstrap_all(share, counts[:, 0]) is None
    # of a value's two denominators, the one that fewer sources hold decides
    both = bootstrap_all(share, counts[:, [4, 4, 4, 4, 0]], counts)
    assert both is not None and both.isfinite().all(0).tolist() == [False, False, False, True, False]
    assert torch.equal(both[:, 3], together[:, 3])


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


@pytest.mark.typed
def test_values_with_sizes_of_their_own_have_the_intervals_that_each_has_alone():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20, 2, 3, generator=generator, dtype=torch.float64)
    sizes = torch.rand(20, 1, 3, generator=generator).square()
    values[:15, 1, 2] = torch.nan

    def weighted(times: torch.Tensor) -> torch.Tensor:
        return torch.tensordot(times, values * sizes, 1) / torch.tensordot(times, sizes.double(), 1)

    together = bootstrap_all(weighted, sizes, resamples=100)
    assert together is not None and together[:, 1, 2].isnan().all()  # never finite
    for i, j in ((0, 0), (1, 0), (0, 1), (0, 2)):
        alone = bootstrap_all(lambda times, at=(i, j): weighted(times)[:, *at], sizes[:, 0, j], resamples=100)
        drawn = weighted(times_drawn(20, 100, 0))[:, i, j]
        beyond = float(tail(sizes[:, 0, j]))
        expected = drawn.nanquantile(torch.tensor([beyond, 1 - beyond], dtype=torch.float64))
        assert alone is not None and torch.equal(together[:, i, j], alone) and torch.allclose(alone, expected)


def test_ratios_of_what_few_sources_hold_are_covered_as_often_as_is_claimed():
    generator = torch.Generator().manual_seed(0)
    held = torch.tensor([100.0] * 3 + [2] * 17, dtype=torch.float64)[:, None].expand(20, 40)
    covered = torch.zeros(2)
    for seed in range(25):
        share = torch.rand(20, 40, generator=generator, dtype=torch.float64)
        hits = torch.binomial(held, share, generator=generator)
        for n, sizes in enumerate((held, EVEN(20))):  # negative control: sources have as much text
            ends = bootstrap_all(lambda times: (times @ hits) / (times @ held), sizes, resamples=300, seed=seed)  # noqa: B023
            assert ends is not None
            covered[n] += float(((ends[0] <= 0.5) & (ends[1] >= 0.5)).double().mean()) / 25
    assert covered[0] > 0.95 and covered[1] < 0.93


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


BOOKS = torch.tensor([5000.0] * 2 + [100] * 8, dtype=torch.float64)
"""Two sources hold nearly all of the text."""


def ratios(effects: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over the text, of all sources and without each one; many draws at a time."""
    sums = sizes[:, None] * effects
    return sums.sum(0) / sizes.sum(), (sums.sum(0) - sums) / (sizes.sum() - sizes)[:, None]


@pytest.mark.typed
def test_the_jackknife_of_equal_sources_is_the_interval_of_a_mean_and_unequal_ones_have_fewer_degrees_of_freedom():
    generator, one = torch.Generator().manual_seed(0), torch.zeros(10, dtype=torch.long)
    effects = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    for sizes, freedom in (
        (7 * EVEN(10), 9),
        (torch.tensor([3.0] * 5 + [1.0] * 5), 7),
        (BOOKS, 10_800**2 / 5008e4 - 1),
    ):
        value, without = ratios(effects, sizes)
        error = ((without - without.mean(0)).square().sum(0) * 9 / 10).sqrt()
        low, high = jackknife_interval(value, without, one, sizes)
        assert torch.allclose((high - low) / 2, float(student.ppf(0.975, freedom)) * error) and torch.allclose(
            (high + low) / 2, value
        )
        if sizes.unique().numel() == 1:
            assert torch.allclose(error, effects.std(0) / 10**0.5)
    assert effective(torch.stack([EVEN(10), BOOKS, torch.zeros(10)], 1)).tolist() == [10, float(effective(BOOKS)), 10]
    both = torch.stack([EVEN(10).double(), BOOKS], 1)  # of two domains, the one that fewer sources have
    value, without = ratios(effects, BOOKS)
    ends = jackknife_interval(value, without, one, both), jackknife_interval(value, without, one, BOOKS)
    assert torch.equal(torch.stack(ends[0]), torch.stack(ends[1]))
    shared = torch.stack([EVEN(12), torch.cat([EVEN(8), torch.zeros(4)])], 1)
    of, but_one = ratios(torch.randn(12, 3, generator=generator, dtype=torch.float64), EVEN(12))
    few = shared[:, 1]  # of a domain of twelve sources, eight have text
    for sizes, known in ((shared, False), (few, False), (shared[:, 0], True), (shared * torch.tensor([1, 0]), True)):
        low, high = jackknife_interval(of, but_one, torch.zeros(12, dtype=torch.long), sizes)
        assert (low < high).all() if known else low.isnan().all()  # one of two domains that share sources has eight


def test_jackknife_intervals_hold_the_truth_though_two_sources_hold_the_text_and_parallel_ones_are_in_two_domains():
    generator, draws = torch.Generator().manual_seed(1), 4000
    strata, other = torch.zeros(10, dtype=torch.long), torch.arange(20) // 10
    effects = torch.randn(2, 10, draws, generator=generator, dtype=torch.float64)
    (value, without), (against, left) = ratios(effects[0], BOOKS), ratios(effects[1], BOOKS.flip(0))
    apart = torch.cat([without - against, value - left])
    cases = [
        (value, without, strata, BOOKS),
        (value - against, without - left, strata, torch.stack([BOOKS, BOOKS.flip(0)], 1)),
        (value - against, apart, other, torch.cat([BOOKS, BOOKS.flip(0)])),
    ]
    for of, left_out, at, sizes in cases:
        low, high = jackknife_interval(of, left_out, at, sizes)
        near, far = jackknife_interval(of, left_out, at, torch.ones_like(sizes))
        assert ((low <= 0) & (high >= 0)).double().mean() > 0.94  # a standard error is .003
        # negative control: nine degrees of freedom, or eighteen, as if sources were of one size
        assert ((near <= 0) & (far >= 0)).double().mean() < 0.92


@pytest.mark.typed
def test_a_mean_has_no_bias_to_correct_and_a_square_of_one_has_its_variance():
    generator, one = torch.Generator().manual_seed(2), torch.zeros(10, dtype=torch.long)
    effects = torch.randn(10, 2000, generator=generator, dtype=torch.float64)
    book = torch.tensor([5000.0] + [50] * 9, dtype=torch.float64)
    for sizes in (EVEN(10).double(), book, torch.stack([BOOKS, 3 * BOOKS], 1)):
        value, without = ratios(effects, sizes.view(10, -1)[:, 0])
        low, high = jackknife_interval(value, without, one, sizes, corrected=True)
        rounded = 1e-14  # float64: the value with a reach of up to about 30 added and taken away, each rounded by 4e-15
        assert float(((low + high) / 2 - value).abs().max()) <= rounded
        if sizes is not book:
            continue
        equal = torch.stack(jackknife_interval(value, without, one, torch.ones(10), corrected=True)).mean(0)
        assert (equal - value).std() > 0.5 * value.std()  # negative control: as if they were of one size
    sizes = EVEN(10).double()
    value, without = ratios(effects, sizes)
    low, high = jackknife_interval(value.square(), without.square(), one, sizes, corrected=True)
    expected = value.square() - effects.var(0) / 10
    assert torch.allclose((low + high) / 2, expected)
