"""When experts are said to cost more than others that they are held against: one rule, for tables, stars and sentences.

That experts cost more than their controls says nothing if the controls cost less than nothing; that the loss grows
without them says nothing if it grows as much without others. Both have to be shown.
"""

from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from moe_lens.resampling import jackknife_interval

LEVEL = 0.95
"""Of all intervals of a family together."""


def costs_more(*lower_ends: Any) -> Any:
    """Whether experts cost more than what they are held against: every lower end lies above 0; missing where one is.

    The first is that of what the experts cost by themselves, the second that of what they cost more than their
    controls. Where each pair of ends is of intervals that hold simultaneously for a family at `LEVEL`, the chance that
    any expert is falsely said to cost more is at most (1 − LEVEL) / 2: experts that cost nothing, or no more than
    others, are said to only if the interval that has to leave out 0 does so by chance (an intersection–union test:
    Berger 1982, Technometrics 24).

    Args:
        lower_ends: Numbers, or columns of a table.
    """
    if not any(isinstance(end, pd.Series) for end in lower_ends):
        return None if any(pd.isna(end) for end in lower_ends) else all(end > 0 for end in lower_ends)
    ends = pd.concat(lower_ends, axis=1)
    return (ends > 0).all(axis=1).astype("boolean").mask(ends.isna().any(axis=1))


def against_controls(
    own: Float[Tensor, " source"],
    controls: Float[Tensor, "source control"],
    tokens: Float[Tensor, " source"],
    tests: int,
) -> dict[str, Any]:
    """What experts cost more than each of their controls, with intervals that hold for a family of comparisons.

    Controls are few and drawn at random, and one of them may hold an expert that costs more than all others: their mean
    is a matter of luck. So experts have to cost more than the costliest of them. Intervals are the jackknife's, over
    sources, at 1 − (1 − `LEVEL`) / tests (Bonferroni). What experts cost more than the costliest control is the least
    of what they cost more than any, and so are its ends; the upper one is corrected for all controls.

    Args:
        own: Nats that are added without the experts, summed over each source's tokens.
        controls: The same without each of their controls.
        tokens: Of each source.
        tests: Comparisons of the family.

    Returns:
        controls: how many. If there are any: control_added, control_least and control_most, their mean, least and
        greatest, nats a token; over_most, added − control_most, with over_most_low and over_most_high; all_low and
        all_high, the ends of the interval of added itself; and starred (see `costs_more`): missing below ten sources,
        as the ends are.
    """
    if not (k := controls.shape[1]):
        return {"controls": 0}
    n, each = tokens.double(), controls.double()
    sums = torch.cat([own.double()[:, None], each], 1)
    value = sums.sum(0) / n.sum()
    without = (sums.sum(0) - sums) / (n.sum() - n)[:, None]
    found = over_each(value, without, torch.zeros(len(n), dtype=torch.long), n, tests)
    return {"controls": k, "control_added": float(value[1:].mean()), **found}


def over_each(
    values: Float[Tensor, " coalition"],
    without: Float[Tensor, "source coalition"],
    strata: Int[Tensor, " source"],
    sizes: Real[Tensor, "source *domain"],
    tests: int,
) -> dict[str, Any]:
    """The same of any statistic of experts, which stands first, and of their controls: at least one.

    Args:
        values: Of all sources.
        without: Of all sources but one.
        strata: Such as the source's domain.
        sizes: Of each source, in tokens; where a source has text in several domains, in each of them.
        tests: Comparisons of the family.

    Returns:
        What `against_controls` returns, but for the number and the mean of the controls.
    """
    beyond, chance = values[:1] - values[1:], (1 - LEVEL) / tests
    both = torch.cat([values[:1], beyond]), torch.cat([without[:, :1], without[:, :1] - without[:, 1:]], 1)
    low, high = jackknife_interval(*both, strata, sizes, level=1 - chance)
    upper = jackknife_interval(*both, strata, sizes, level=1 - chance / len(beyond))[1]
    found = {"control_least": float(values[1:].min()), "control_most": float(values[1:].max())}
    found |= {"over_most": float(beyond.min()), "over_most_low": float(low[1:].min())}
    found |= {"over_most_high": float(upper[1:].min()), "all_low": float(low[0]), "all_high": float(high[0])}
    return found | {"starred": costs_more(found["all_low"], found["over_most_low"])}
