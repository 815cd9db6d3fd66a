"""Uncertainty by resampling sources, because tokens and passages of one source are not independent."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

MIN_SOURCES = 10
"""Below this many sources no interval is given: a bootstrap over so few is too narrow by far."""


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval."""

    low: float
    high: float
    level: float = 0.95


def bootstrap(
    statistic: Callable[[Float[Tensor, "resample source"]], Float[Tensor, " resample"]],
    n_sources: int,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Percentile interval of a statistic, resampling whole sources with replacement.

    Args:
        statistic: From how often each source was drawn (a row of whole numbers that sum to `n_sources`) to the value.
            Sums over sources weighted by these numbers make any ratio of sums, paired where both sides use one row.
        n_sources: How many sources there are.
        level: Of confidence, in (0, 1).
        resamples: How many times all sources are drawn.
        seed: Of the draws.

    Returns:
        The interval, or None below `MIN_SOURCES` sources. Resamples in which the value is not finite are left out; None
        if it never is.
    """
    ends = bootstrap_all(statistic, n_sources, level=level, resamples=resamples, seed=seed)
    if ends is None or not bool(ends.isfinite().all()):
        return None
    return Interval(float(ends[0]), float(ends[1]), level)


def bootstrap_all(
    statistic: Callable[[Float[Tensor, "resample source"]], Float[Tensor, "resample *shape"]],
    n_sources: int,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Float[Tensor, "2 *shape"] | None:
    """`bootstrap` of many values at once, all from the same draws: lower and upper ends, NaN if never finite."""
    if n_sources < MIN_SOURCES:
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n_sources, (resamples, n_sources), generator=generator)
    times = torch.zeros(resamples, n_sources, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones(1, dtype=torch.float64).expand(resamples, n_sources))
    values = statistic(times).double()
    values = values.masked_fill(~values.isfinite(), torch.nan)
    tail = (1 - level) / 2
    at = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    # torch refuses quantiles of more than 2²⁴ numbers at a time
    columns = values.flatten(1).split(2**23 // resamples, 1) if values.ndim > 1 else (values[:, None],)
    return torch.cat([column.nanquantile(at, dim=0) for column in columns], 1).view(2, *values.shape[1:])


def halves(sources: Iterable[str], seed: int = 0) -> dict[str, int]:
    """Deal sources into two halves, 0 and 1, at random; the same sources and seed give the same halves."""
    order = sorted(set(sources))
    random.Random(seed).shuffle(order)
    return {source: i % 2 for i, source in enumerate(order)}
