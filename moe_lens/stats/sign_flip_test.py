"""Paired differences of many quantities: one random sign for each unit, and the greatest statistic of all."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.checked import Positive, Seed
from moe_lens.errors import InputError
from moe_lens.resampling import MIN_SOURCES
from moe_lens.stats.multiple_tests import max_t


class SignTest(NamedTuple):
    """Result of `sign_test` for each quantity; p-values are corrected for the number of quantities."""

    mean: Float[Tensor, "*shape"]
    t: Float[Tensor, "*shape"]
    """Mean over units / its standard error; 0 where every unit is 0."""
    p_values: Float[Tensor, "*shape"]
    """Share of draws in which the greatest |t| of all quantities is as large; NaN below ten units."""
    smallest_p: float
    """The smallest p-value that so many draws of so few units can give."""


def sign_test(differences: Float[Tensor, "unit *shape"], draws: Positive = 1000, seed: Seed = 0) -> SignTest:
    """Is any mean of paired differences other than 0?

    Null hypothesis: the two sides of a unit are exchangeable. A draw multiplies all that a unit shows with one random
    sign, so that quantities keep their dependence; the greatest |t| of all quantities is compared (Westfall and Young
    1993), so that p-values are corrected for their number.

    Args:
        differences: of each unit, in each quantity.
        draws: random signs of all units.
        seed: of the draws.

    Raises:
        InputError: no units or quantities, a difference that is not finite, or fewer than one draw.
    """
    if draws < 1 or not len(differences) or not differences.isfinite().all():
        raise InputError(f"got {len(differences)} units and {draws} draws; expected some of each, and finite numbers")
    n, shape = len(differences), differences.shape[1:]
    if not shape.numel():
        raise InputError(f"differences have shape {tuple(differences.shape)}; expected a quantity to test")
    flat = differences.double().reshape(n, -1)
    squares = flat.square().sum(0)
    mean = flat.mean(0)
    t = _studentised(mean, squares, n)
    if n < MIN_SOURCES:
        nothing = torch.full_like(t, torch.nan)
        return SignTest(mean.view(shape), t.view(shape), nothing.view(shape), float("nan"))
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (draws, n), generator=generator).double() * 2 - 1
    greatest = torch.cat([_studentised(some @ flat / n, squares, n).abs().amax(1) for some in signs.split(64)])
    p_values = max_t(t, greatest)
    smallest = max(1 / (1 + draws), 2.0 ** (1 - n))
    return SignTest(mean.view(shape), t.view(shape), p_values.view(shape), smallest)


def beyond_rounding(
    value: Float[Tensor, "*axes"], summed: Float[Tensor, "*#axes"] | Int[Tensor, "*#axes"]
) -> Float[Tensor, "*axes"]:
    """0 for what is only the rounding of what was summed up: where no unit differs, that has no error beside it."""
    return torch.where(value.abs() > 1e-12 * summed, value, 0.0)


def _studentised(
    mean: Float[Tensor, "*some quantity"], squares: Float[Tensor, " quantity"], n: int
) -> Float[Tensor, "*some quantity"]:
    """T of means of numbers whose sum of squares is known, which signs do not change."""
    deviation = (squares - n * mean.square()).clamp(min=0) / max(1, n - 1)
    error = (deviation / n).sqrt()
    return torch.where(mean == 0, 0.0, mean / error)
