"""Many tests at once: what is still found when all of them are counted."""

from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor


def holm(p_values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Holm's adjusted p-values (1979, Scandinavian Journal of Statistics 6), in [0, 1].

    Those at or below the level are a set that holds even one false finding with at most that chance, however the tests
    depend on one another. All of `p_values` are one family; NaN is no test.
    """
    flat = p_values.double().flatten()
    order = flat.argsort()  # NaN comes last
    n = int((~flat.isnan()).sum())
    steps = (n - torch.arange(n, dtype=torch.float64)) * flat[order[:n]]
    adjusted = torch.full_like(flat, torch.nan)
    adjusted[order[:n]] = steps.cummax(0).values.clamp(max=1) if n else steps
    return adjusted.view(p_values.shape)


def smallest_holm(tests: Any) -> float | None:
    """The smallest p-value after Holm's correction that tests, a row each, can reach; None if `smallest_p` is missing.

    Tables that an earlier version saved may lack it.
    """
    return min(1.0, float(tests["smallest_p"].min()) * len(tests)) if "smallest_p" in tests else None


def enough_draws(n_tests: int) -> int:
    """Draws of a null after which Holm's correction over so many tests can reach .025; from 1,999 to 9,999.

    The smallest p-value is 1 / (draws + 1), and Holm multiplies it by the number of tests.
    """
    return min(max(1999, 40 * n_tests - 1), 9999)


def benjamini_hochberg(p_values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Adjusted p-values of Benjamini and Hochberg (1995, JRSS B 57), in [0, 1].

    Of those at or below q, a share of q at most is expected to be false, where tests do not depend on one another or
    depend positively. All of `p_values` are one family; NaN is no test.
    """
    flat = p_values.double().flatten()
    order = flat.argsort()
    n = int((~flat.isnan()).sum())
    steps = flat[order[:n]] * n / torch.arange(1, n + 1, dtype=torch.float64)
    adjusted = torch.full_like(flat, torch.nan)
    adjusted[order[:n]] = steps.flip(0).cummin(0).values.flip(0) if n else steps
    return adjusted.view(p_values.shape)


def max_t(statistics: Float[Tensor, "*shape"], greatest: Float[Tensor, " draw"]) -> Float[Tensor, "*shape"]:
    """P-values of Westfall and Young's maxT (1993), in (0, 1]: corrected for all quantities, however they depend.

    Share of the draws, with the observed data as one of them, whose greatest statistic is as large as the observed one.
    Draws that give the observed data again count as reaching it, whatever the last bit; NaN is no test.

    Args:
        statistics: Of each quantity, as observed; their sizes are compared.
        greatest: Of each draw under the null hypothesis, the greatest size of all quantities.
    """
    sizes = statistics.abs().to(greatest.dtype).contiguous()
    below = torch.searchsorted(greatest.sort().values, sizes * (1 - 1e-9))
    p_values = (1 + len(greatest) - below).double() / (1 + len(greatest))
    return p_values.masked_fill(statistics.isnan(), torch.nan)


def most_significant(frame: pd.DataFrame, effect: str, p_value: str = "p_value") -> pd.DataFrame:
    """Rows by p-value; those with the same one, as all have that no draw reaches, by the size of their effect."""
    return (
        frame.assign(_size=-frame[effect].abs())
        .sort_values([p_value, "_size"], kind="stable")
        .drop(columns="_size")
        .reset_index(drop=True)
    )
