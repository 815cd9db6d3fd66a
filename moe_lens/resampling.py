"""Uncertainty by resampling sources, because tokens and passages of one source are not independent.

How often the intervals hold the true value, with few sources of unequal sizes, is what `benchmarks/intervals.py`
measures; docs/statistics.md has the numbers.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from moe_lens.checked import Positive, Seed
from moe_lens.errors import InputError, a_kind, several

MIN_SOURCES = 10
"""Below this many sources no interval is given: so few say too little of how much sources differ. Those count that have
any text; of a ratio, any of its denominator."""


@dataclass(frozen=True)
class Interval:
    """An expanded percentile bootstrap interval: see `tail`."""

    low: float
    high: float
    level: float = 0.95


def bootstrap(
    statistic: Callable[[Float[Tensor, "resample source"]], Float[Tensor, " resample"]],
    sizes: Real[Tensor, " source"],
    *,
    level: float = 0.95,
    resamples: Positive = 2000,
    seed: Seed = 0,
) -> Interval | None:
    """Interval of a statistic, resampling whole sources with replacement.

    Args:
        statistic: From how often each source was drawn (a row of whole numbers that sum to how many there are) to its
            value. Sums over sources weighted by these numbers make any ratio of sums, paired where both sides use one
            row.
        sizes: Of each source, in tokens or whatever its weight in the statistic is; 0 where it has none.
        level: Of confidence, in (0, 1).
        resamples: How many times all sources are drawn.
        seed: Of the draws.

    Returns:
        The interval, or None where fewer than `MIN_SOURCES` sources have any size. Resamples in which the value is not
        finite are left out; None if it never is.

    Raises:
        InputError: The level is not in (0, 1), or the statistic does not give one value for each resample.
    """
    ends = bootstrap_all(statistic, sizes, level=level, resamples=resamples, seed=seed)
    if ends is None or not bool(ends.isfinite().all()):
        return None
    if ends.ndim > 1:
        raise InputError(f"the statistic gave {tuple(ends.shape[1:])} values a resample; bootstrap_all takes many")
    return Interval(float(ends[0]), float(ends[1]), level)


def bootstrap_all(
    statistic: Callable[[Float[Tensor, "resample source"]], Float[Tensor, "resample *shape"]],
    *sizes: Real[Tensor, "source *#shape"],
    level: float = 0.95,
    resamples: Positive = 2000,
    seed: Seed = 0,
) -> Float[Tensor, "2 *shape"] | None:
    """`bootstrap` of many values at once, all from the same draws: lower and upper ends, NaN where there are none.

    Sizes of one dimension are those of all values. Where values are ratios with denominators of their own, such as the
    tokens that have a label, these are the sizes: few sources may hold most of them. Where a value is made of several
    ratios, it has several denominators; the one that fewest sources hold decides.
    """
    if not 0 < level < 1:
        raise InputError(f"level is {level}; expected a share in (0, 1), such as 0.95")
    known = torch.stack([enough(of) for of in sizes]).all(0)
    if not bool(known.any()):
        return None
    values: object = statistic(times_drawn(len(sizes[0]), resamples, seed))
    if not isinstance(values, Tensor) or values.shape[:1] != (resamples,):
        came = f"a tensor {list(values.shape)}" if isinstance(values, Tensor) else a_kind(values)
        raise InputError(f"the statistic gave {came}; expected a tensor with a value for each of {resamples} resamples")
    return ends_of(values, torch.stack([tail(of, level) for of in sizes]).amin(0)).masked_fill(~known, torch.nan)


def enough(sizes: Real[Tensor, "source *value"]) -> Bool[Tensor, "*value"]:
    """Whether at least `MIN_SOURCES` sources have any size."""
    return (sizes > 0).sum(0) >= MIN_SOURCES


def ends_of(values: Float[Tensor, "resample *shape"], beyond: Float[Tensor, "*#shape"]) -> Float[Tensor, "2 *shape"]:
    """Lower and upper ends that leave out a share of resamples at either side; what is not finite does not count."""
    values = values.double()
    values = values.masked_fill(~values.isfinite(), torch.nan)
    columns, share = values.reshape(len(values), -1), beyond.expand(values.shape[1:]).reshape(-1)
    parts = []
    for some, left in zip(columns.split(2**22 // len(values), 1), share.split(2**22 // len(values)), strict=True):
        ordered, last = some.sort(0).values, (some.isfinite().sum(0) - 1).clamp(min=0)  # NaN comes last
        at = torch.stack([left, 1 - left]) * last
        below, above = at.floor(), at.ceil()
        parts.append(torch.lerp(ordered.gather(0, below.long()), ordered.gather(0, above.long()), at - below))
    return torch.cat(parts, 1).view(2, *values.shape[1:])


def times_drawn(n_sources: int, resamples: int, seed: int | torch.Generator) -> Float[Tensor, "resample source"]:
    """How often each source is drawn when as many as there are are drawn with replacement; rows sum to `n_sources`."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    drawn = torch.randint(n_sources, (resamples, n_sources), generator=generator)
    times = torch.zeros(resamples, n_sources, dtype=torch.float64)
    return times.scatter_add_(1, drawn, torch.ones(1, dtype=torch.float64).expand(resamples, n_sources))


def tail(sizes: Real[Tensor, "source *value"], level: float = 0.95) -> Float[Tensor, "*value"]:
    """Share of resamples beyond either end of an interval of this level: less than (1 − level) / 2.

    Percentiles of few resampled sources are too narrow, as a normal interval is with the variance divided by n; the
    share that makes up for both is Φ(−√(n / (n − 1)) t), t the quantile of Student's distribution with n − 1 degrees of
    freedom (Hesterberg 2015, The American Statistician 69), n the `effective` number of sources.
    """
    return tail_of(effective(sizes), level)


def tail_of(n: Float[Tensor, "*value"], level: float = 0.95) -> Float[Tensor, "*value"]:
    """`tail` of so many sources of one size; of a statistic of several domains, 1 + its degrees of freedom."""
    from scipy.special import stdtrit

    t = torch.as_tensor(stdtrit((n - 1).numpy(), (1 + level) / 2))
    return torch.special.ndtr(-(n / (n - 1)).sqrt() * t)


def effective(sizes: Real[Tensor, "source *value"]) -> Float[Tensor, "*value"]:
    """How many sources of one size tell as much as these: (Σ size)² / Σ size² (Kish 1965), at least 2."""
    size = sizes.double()
    n = size.sum(0).square() / size.square().sum(0)
    return n.nan_to_num(len(size)).clamp(min=2)  # no text at all: nothing to tell


def jackknife_interval(
    values: Float[Tensor, "*value"],
    without: Float[Tensor, "source *value"],
    strata: Int[Tensor, " source"],
    sizes: Real[Tensor, "source *domain"],
    *,
    corrected: bool = False,
    level: float = 0.95,
) -> tuple[Float[Tensor, "*value"], Float[Tensor, "*value"]]:
    """Intervals of statistics that resampling would bias, as it pairs sources with themselves; NaN if there are none.

    Variance and degrees of freedom, of Student's t, are those of `jackknife_variance`. Where few sources hold most of
    the text, the variance is too large rather than too small.

    Args:
        values: Of all sources.
        without: Of all but one.
        strata: Such as the source's domain; below `MIN_SOURCES` with text in any of them, or in a domain, there is no
            interval.
        sizes: Of each source, in tokens; where a source has text in several domains, in each of them.
        corrected: Whether the interval is that of the value less its bias, as the jackknife of sources of unequal sizes
            estimates it (Busing, Meijer and van der Leeden 1999, Statistics and Computing 9).
        level: Of confidence, in (0, 1).
    """
    from scipy.special import stdtrit

    some = sizes[:, None].flatten(1) > 0
    n = ((strata == strata.unique()[:, None]) & some.any(1)).sum(1)
    # Of domains that share sources, and so are one stratum, one may have fewer by itself.
    in_each = some.sum(0)
    if not len(n) or int(torch.cat([n, in_each[in_each > 0]]).min()) < MIN_SOURCES:
        return torch.full_like(values, torch.nan), torch.full_like(values, torch.nan)
    variance, freedom = jackknife_variance(without, strata, sizes)
    reach = variance.sqrt() * torch.as_tensor(stdtrit(freedom.numpy(), (1 + level) / 2))
    centre = values
    if corrected:
        # so weighted, what is proportional to the deviations of sources from their mean adds nothing
        rest = 1 - _shares(sizes)
        centre = values - (rest.view(-1, *[1] * values.ndim) * (without - values)).sum(0)
    return centre - reach, centre + reach


def jackknife_variance(
    without: Float[Tensor, "source *value"], strata: Int[Tensor, " source"], sizes: Real[Tensor, "source *domain"]
) -> tuple[Float[Tensor, "*value"], Float[Tensor, "*value"]]:
    """Variances of statistics, from the statistic without each source, and their degrees of freedom.

    The variance is the sum over strata of that of each by itself (Arvesen 1969, Annals of Mathematical Statistics 40).
    The degrees of freedom are those of Welch and Satterthwaite, those of a stratum being one less than its `effective`
    number of sources, the least of several domains.

    Args:
        without: Of all sources but one.
        strata: Such as the source's domain.
        sizes: Of each source, in tokens; where a source has text in several domains, in each of them.
    """
    parts, less = [], []
    for name in strata.unique():
        of = without[strata == name]
        parts.append((of - of.mean(0)).square().sum(0) * (len(of) - 1) / len(of))
        less.append(float(effective(sizes[strata == name]).min()) - 1)
    variances = torch.stack(parts)
    variance = variances.sum(0)
    each = torch.tensor(less, dtype=torch.float64).view(-1, *[1] * variance.ndim)
    return variance, (variance.square() / (variances.square() / each).sum(0)).nan_to_num(1)


def _shares(sizes: Real[Tensor, "source *domain"]) -> Float[Tensor, " source"]:
    """Of each source in the text of its domain; in several, the mean."""
    of = (sizes.double() / sizes.sum(0)).reshape(len(sizes), -1)
    return of.nansum(1) / (of > 0).sum(1).clamp(min=1)


def halves(sources: Iterable[str], seed: Seed = 0) -> dict[str, int]:
    """Divide sources into two halves, 0 and 1, at random; the same sources and seed give the same halves."""
    order = sorted(set(several(sources, "sources")))
    random.Random(seed).shuffle(order)
    return {source: i % 2 for i, source in enumerate(order)}


Unit = tuple[str, ...]
"""A domain and a source of it; or what the names of parallel sources have in common, alone."""


def units(sources: Sequence[str], domains: Sequence[str], parallel: Callable[[str], str] | None = None) -> list[Unit]:
    """What stays whole where rows are divided or resampled: a source, with those of other domains parallel to it.

    Args:
        sources: Of each row.
        domains: Of each row.
        parallel: From the name of a source to what it has in common with parallel ones; if not given, sources of
            different domains are different, whatever their names.
    """
    rows = zip(domains, sources, strict=True)
    return [(domain, source) if parallel is None else (parallel(source),) for domain, source in rows]


def folds(of: Sequence[Unit], domains: Sequence[str], n_folds: int, seed: int = 0) -> Int[Tensor, " row"]:
    """Deal rows into folds, each unit whole into one, and each domain's units evenly into all.

    Units of several domains are dealt first; each goes to the fold where its domains have fewest units so far.

    Args:
        of: The unit of each row; see `units`.
        domains: Of each row.
        n_folds: How many folds; fewer where a domain has fewer units.
        seed: Of the random division.
    """
    domains_of: dict[Unit, set[str]] = {}
    for unit, domain in zip(of, domains, strict=True):
        domains_of.setdefault(unit, set()).add(domain)
    every = sorted(set(domains))
    n_folds = min(n_folds, *(sum(domain in some for some in domains_of.values()) for domain in every))
    dealt = {domain: [0] * n_folds for domain in every}
    shuffled = random.Random(seed)
    fold: dict[Unit, int] = {}
    for group in (None, *every):  # those of several domains, then of each one alone
        here = sorted(u for u, some in domains_of.items() if (None if len(some) > 1 else next(iter(some))) == group)
        shuffled.shuffle(here)
        for unit in here:
            counts = [sum(dealt[domain][at] for domain in domains_of[unit]) for at in range(n_folds)]
            fold[unit] = counts.index(min(counts))
            for domain in domains_of[unit]:
                dealt[domain][fold[unit]] += 1
    return torch.tensor([fold[unit] for unit in of])
