"""Differences of means of two sides, studentised, beside what they are where the sides do not differ.

Means are ratios, Σ above / Σ below, and sources differ in size. What a source tells of a difference is its `above`
minus what its `below` lets expect with one mean for both sides, as the null hypothesis has it: with a mean of its own
for either side, the difference would be part of what every source tells, and in agreement with itself.
`benchmarks/compared.py` measures how often something is found where there is nothing.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.checked import Positive, Seed, checked
from moe_lens.stats.sign_flip_test import beyond_rounding
from moe_lens.stats.source_permutation import LEAST_EXPECTED
from moe_lens.studies.comparable import Means

_DEPENDENCE = (0.0, *(10 ** (power / 3) for power in range(-12, 1)))
"""How much the tokens of a source may depend on one another, 0 to 1: what is tried."""


class Differences(NamedTuple):
    """Of many values."""

    t: Float[Tensor, " value"]
    """The difference in standard deviations; NaN of what is too rare to be tested."""
    by_chance: Float[Tensor, "draw value"]
    """The same where there is none; 0 of what is not tested."""


@checked
def paired(one: Means, other: Means, draws: Positive, seed: Seed) -> Differences:
    """Differences of sides with the same sources, and what they are where sources swap sides at random.

    If either side of a source could as well be the other, a swap changes the sign of what the source tells and nothing
    else, whatever its size: the test is exact.
    """
    mean = (one.above + other.above).sum(0) / (one.below + other.below).sum(0)
    told = (other.above - mean * other.below) - (one.above - mean * one.below)
    told = beyond_rounding(told, one.above.abs() + other.above.abs() + mean.abs() * (one.below + other.below))
    n = len(told)
    signs = 2.0 * torch.randint(2, (draws, n), generator=torch.Generator().manual_seed(seed)).double() - 1
    mean = torch.cat([torch.ones(1, n, dtype=torch.float64), signs]) @ told / n
    error = ((told.square().mean(0) - mean.square()) / (n - 1)).clamp(min=0).sqrt()
    t = _studentised(mean, error)
    return Differences(t[0], t[1:])


@checked
def unpaired(one: Means, other: Means, draws: Positive, seed: Seed) -> Differences:
    """Differences of sides with sources of their own, and what they are where sources are assigned at random.

    Sums of short sources vary less than those of long ones, so that it is deviations in units of a standard deviation
    that are permuted, and scaled to the size of the source whose place they take, as in `stats.source_permutation`;
    with sources of one size this is the permutation of sources, which is exact.
    """
    above, below = (torch.cat([getattr(of, name).double() for of in (one, other)]) for name in ("above", "below"))
    n, first = len(above), len(one.sources)
    size = torch.stack([below[:first].sum(0), below[first:].sum(0)])
    side = torch.cat([-1 / size[0].expand(first, -1), 1 / size[1].expand(n - first, -1)])
    deviations = _deviations(above, below)
    spread = side * deviations.spread
    difference = beyond_rounding((side * above).sum(0), (side * above).abs().sum(0))
    t = _studentised(difference, spread.square().sum(0).sqrt() * deviations.scale)
    order = torch.rand(draws, n, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    chance = torch.empty(draws, above.shape[1], dtype=torch.float64)
    _, group = spread.unique(dim=1, return_inverse=True)
    for number in range(int(group.max()) + 1):  # values of one spread share a product of matrices
        alike = (group == number).nonzero()[:, 0]
        chance[:, alike] = spread[:, alike[0]][order] @ deviations.standard[:, alike]
    # of means of all permutations: weights that do not sum to 0 vary less, as deviations do
    error = ((spread - spread.mean(0)).square().sum(0) * deviations.standard.square().sum(0) / (n - 1)).sqrt()
    by_chance = _studentised(chance, error)
    if one.times is None or other.times is None:
        return Differences(t, by_chance)
    share = torch.cat([one.times, other.times]).sum(0) / size.sum(0)
    rare = torch.minimum(share, 1 - share) * size.amin(0) < LEAST_EXPECTED
    return Differences(t.masked_fill(rare, torch.nan), by_chance.masked_fill(rare, 0.0))


def _studentised(
    difference: Float[Tensor, "*draw value"], error: Float[Tensor, "*#draw value"]
) -> Float[Tensor, "*draw value"]:
    t = torch.where(difference.abs() > 1e-12 * error, difference / error, 0.0)
    return t.nan_to_num(0.0, torch.inf, -torch.inf)


class _Deviations(NamedTuple):
    """Of sources from one mean."""

    standard: Float[Tensor, "source value"]
    """In standard deviations; their mean is 0."""
    spread: Float[Tensor, "source value"]
    """The standard deviation of a source of this size, up to a factor."""
    scale: Float[Tensor, " value"]
    """This factor."""
    likelihood: Float[Tensor, " value"]
    """Logarithm, restricted to what does not depend on the mean, up to a summand; inf where nothing deviates."""


def _deviations(above: Float[Tensor, "source value"], below: Float[Tensor, "source value"]) -> _Deviations:
    """Deviations with the likeliest dependence: of each value, with the mean of all values as prior."""
    tried = torch.stack([_with(above, below, torch.tensor(rho)).likelihood for rho in _DEPENDENCE])
    tried = tried - tried.amax(0)
    known = tried.isfinite().all(0)
    prior = tried[:, known].mean(1) if known.any() else torch.zeros(len(tried), dtype=torch.float64)
    best = (tried + prior[:, None]).nan_to_num(0.0).argmax(0)
    return _with(above, below, torch.tensor(_DEPENDENCE, dtype=torch.float64)[best])


def _with(
    above: Float[Tensor, "source value"], below: Float[Tensor, "source value"], rho: Float[Tensor, "*value"]
) -> _Deviations:
    """Deviations if a sum over n tokens has a variance in proportion to n (1 + ρ (n − 1))."""
    there = below > 0
    n, variance = there.sum(0), below * (1 + rho * (below - 1).clamp(min=0))
    inverse = torch.where(there, 1 / variance, 0.0)
    weight = below * inverse
    total = (weight * below).sum(0)
    expected = (weight * above).sum(0) / total * below
    residual = beyond_rounding(above - expected, above.abs() + expected.abs())
    scale = ((residual.square() * inverse).sum(0) / (n - 1)).sqrt()
    logarithms = torch.where(there, variance, 1.0).log().sum(0)
    likelihood = -(logarithms / 2 + (n - 1) * scale.log() + total.log() / 2)
    # a source that weighs much has drawn the mean to itself, and seems to deviate less than it does
    leverage = (1 - 1 / n) / (1 - weight * below / total).clamp(min=1e-12)
    standard = (residual * (inverse * leverage).sqrt() / scale).nan_to_num(0.0, 0.0, 0.0)
    return _Deviations(standard - standard.mean(0), variance.sqrt(), scale, likelihood)
