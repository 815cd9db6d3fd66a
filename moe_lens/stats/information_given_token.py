"""Does routing depend on the domain once the token is known? A distance without bias, and a test that keeps its level.

A plug-in estimate of I(expert; domain | token) is large wherever tokens are rare, and permuting tokens within a type
takes tokens of one source for independent. Measured here is, of two domains a and b,

    Σ_x w_x ‖p(· | x, a) − p(· | x, b)‖²,

p(e | x, d) the share of the occurrences of token x in domain d that choose expert e, w_x the harmonic mean of the
token's counts in both. Squares are estimated from products of *different* sources only, so that neither the noise of
few occurrences nor what a source's tokens share adds anything: it is 0 on average where nothing depends on the domain,
and may be negative. The null gives each source one random sign, by which all its residuals from the token's share, the
mean over sources, are multiplied (a wild bootstrap: Wu 1986, Annals of Statistics 14; by cluster: Cameron, Gelbach and
Miller 2008, Review of Economics and Statistics 90). See `moe_lens.stats.conditional_distance`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.checked import Natural, Positive, Seed
from moe_lens.errors import InputError
from moe_lens.resampling import jackknife_interval
from moe_lens.stats.accumulator import Result
from moe_lens.stats.conditional_distance import PairOfDomains, Units
from moe_lens.stats.multiple_tests import enough_draws, holm
from moe_lens.stats.vocabulary_specialisation import VocabularyResult

LEAST_SHARED = 0.2
"""Share of the text below which a test says nothing: what it looked at is too little of what there is."""

LEVEL = 0.05


@dataclass(frozen=True, eq=False)
class ConditionalInformation(Result):
    """How far two domains route the same tokens differently; of more than two domains, the mean over pairs.

    Distances are sums over experts of squared differences of shares, in [0, 2 k] but for their error, and 0 on average
    where experts do not depend on the domain given the token.
    """

    domains: tuple[str, ...]
    layers: tuple[Natural, ...]
    permutations: Positive
    """How often signs were drawn."""
    n_sources: tuple[Natural, ...]
    """Of each domain: groups of sources, as `VocabularyStats` counted them."""
    excess: Float[Tensor, " layer"]
    """The distance, mean over pairs of domains; NaN where no token could be tested."""
    low: Float[Tensor, " layer"]
    """End of its 95 % interval over sources; NaN below ten of a domain that hold a token which could be tested."""
    high: Float[Tensor, " layer"]
    p_values: Float[Tensor, " layer"]
    """One-sided, of each layer alone; 1 where no token could be tested."""
    smallest_p: float
    """None of `p_values` can be below it: signs are drawn so often, and few sources have few of them."""
    shared: Float[Tensor, " pair"]
    """Share of the text of the pair, in [0, 1], whose token is in at least two sources of both domains."""
    pair_excess: Float[Tensor, "layer pair"]
    """Of each two domains alone, in the order of `pairs`."""
    pair_low: Float[Tensor, "layer pair"]
    pair_high: Float[Tensor, "layer pair"]
    pair_p_values: Float[Tensor, "layer pair"]
    """One-sided, of each layer and pair alone."""
    pair_smallest_p: Float[Tensor, " pair"]
    """None of `pair_p_values` can be below it."""

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Every two domains once."""
        return tuple(combinations(self.domains, 2))

    def to_frame(self) -> pd.DataFrame:
        """A row per layer: excess, low, high, p_value, p_holm (over layers), shared, smallest_p, finding.

        `finding` is "depends on the domain", "not rejected", or "cannot be told" where less than `LEAST_SHARED` of the
        text could be tested. "Not rejected" does not say that the expert depends on the token alone.
        """
        shared = self.shared.mean().expand(len(self.layers))
        frame = _frame(self.excess, self.low, self.high, self.p_values, shared)
        frame.insert(0, "layer", list(self.layers))
        return frame.assign(smallest_p=self.smallest_p)

    def per_pair(self) -> pd.DataFrame:
        """A row per layer and pair of domains; columns as of `to_frame`, with Holm over pairs and layers."""
        columns = self.pair_excess, self.pair_low, self.pair_high, self.pair_p_values
        frame = _frame(*columns, self.shared.expand(self.pair_excess.shape))
        for place, name in enumerate(("layer", "domain", "other")):
            values = [(layer, *pair)[place] for layer in self.layers for pair in self.pairs]
            frame.insert(place, name, values)
        return frame.assign(smallest_p=self.pair_smallest_p.expand(self.pair_excess.shape).flatten().numpy())


def _frame(
    excess: Float[Tensor, "*cell"],
    low: Float[Tensor, "*cell"],
    high: Float[Tensor, "*cell"],
    p_values: Float[Tensor, "*cell"],
    shared: Float[Tensor, "*cell"],
) -> pd.DataFrame:
    adjusted = holm(p_values)
    columns = {
        "excess": excess,
        "low": low,
        "high": high,
        "p_value": p_values,
        "p_holm": adjusted,
        "shared": shared,
    }
    frame = pd.DataFrame({name: value.flatten().numpy() for name, value in columns.items()})
    found = np.where(frame["p_holm"] <= LEVEL, "depends on the domain", "not rejected")
    return frame.assign(finding=np.where(frame["shared"] < LEAST_SHARED, "cannot be told", found))


def conditional_information(
    results: Mapping[str, VocabularyResult], *, permutations: Positive | None = None, seed: Seed = 0
) -> ConditionalInformation:
    """Test whether experts depend on the domain given the token.

    Everything about a pair comes from its two domains alone. A token is tested where at least two sources of both
    domains hold it. `benchmarks/calibrate_given_token.py` shows how often something is found where there is nothing.

    Args:
        results: Of each domain, counted by `VocabularyStats(…, groups=…)` with the same settings. Groups of sources are
            the units, so that there should be at least as many of them as of sources.
        permutations: How often signs are drawn; if not given, `enough_draws` for all pairs and layers.
        seed: Of the signs.

    Raises:
        InputError: fewer than two domains, counts that do not fit one another, or a single group, with which there is
            nothing to compare.
    """
    domains, first = tuple(results), next(iter(results.values()), None)
    if first is None or len(results) < 2:
        raise InputError(f"got the domains {list(results)}; expected at least two to compare")
    about = {(r.by, r.layers, r.n_experts, r.top_k, r.d_vocab, r.groups) for r in results.values()}
    if len(about) > 1:
        raise InputError(f"the domains were counted in different ways: {sorted(about)}")
    if first.groups == 1:
        raise InputError("all sources were counted in one group; count with VocabularyStats(…, groups=64) or so")
    units = Units.of(list(results.values()))
    couples = list(combinations(range(len(domains)), 2))
    pairs = [PairOfDomains.of(units, *couple) for couple in couples]
    permutations = permutations or enough_draws(len(couples) * len(first.layers))
    draws = torch.randint(2, (permutations, units.n_sources), generator=torch.Generator().manual_seed(seed)).numpy()
    signs = 2.0 * draws - 1
    shape = len(first.layers), len(pairs)
    excess, without = np.full(shape, np.nan), np.full((*shape, units.n_sources), np.nan)
    null = np.zeros((*shape, permutations))
    for i in range(shape[0]):
        counts = units.counts(i)
        for j, pair in enumerate(pairs):
            if pair.testable:
                excess[i, j], without[i, j], null[i, j] = pair.measure(counts, signs)
    tokens = torch.stack([pair.tokens for pair in pairs])
    ends = [_interval(excess[:, j], without[:, j], units.domain_of, tokens[j]) for j in range(len(pairs))]
    low, high = (torch.stack(of, 1) for of in zip(*ends, strict=True))
    tested = [pair.testable for pair in pairs]
    mean, mean_without = _mean(excess, tested), _mean(np.where(np.isnan(without), excess[..., None], without), tested)
    mean_low, mean_high = _interval(mean, mean_without, units.domain_of, tokens.sum(0))
    smallest, pair_smallest = _smallest_p(tokens.sum(0), permutations), _smallest_p(tokens, permutations)
    return ConditionalInformation(
        domains=domains,
        layers=first.layers,
        permutations=permutations,
        n_sources=tuple(torch.bincount(units.domain_of, minlength=len(domains)).tolist()),
        excess=_tensor(mean),
        low=mean_low,
        high=mean_high,
        p_values=_p_values(null[:, tested].sum(1), np.nansum(excess, 1)).maximum(smallest),
        smallest_p=float(smallest),
        shared=_tensor([pair.shared for pair in pairs]),
        pair_excess=_tensor(excess),
        pair_low=low,
        pair_high=high,
        pair_p_values=_p_values(null, excess).maximum(pair_smallest),
        pair_smallest_p=pair_smallest,
    )


def _mean(values: np.ndarray, tested: list[bool]) -> np.ndarray:
    """Over the pairs that could be tested, of all layers."""
    return values[:, tested].mean(1) if any(tested) else np.full((len(values), *values.shape[2:]), np.nan)


def _interval(
    excess: np.ndarray, without: np.ndarray, domain_of: Int[Tensor, " source"], tokens: Float[Tensor, " source"]
) -> tuple[Float[Tensor, " layer"], Float[Tensor, " layer"]]:
    """Over the sources that hold what was tested."""
    held = tokens > 0
    return jackknife_interval(_tensor(excess), _tensor(without).mT[held], domain_of[held], tokens[held])


def _smallest_p(tokens: Float[Tensor, "*pair source"], permutations: int) -> Float[Tensor, "*pair"]:
    """That so many draws can reach, and the signs of sources that hold what was tested, of which all may be turned."""
    turned = (tokens > 0).sum(-1).sub(1).clamp(min=0)
    return (0.5 ** turned.double()).clamp(min=1 / (permutations + 1))


def _p_values(null: np.ndarray, observed: np.ndarray) -> Float[Tensor, "*cell"]:
    """Share of draws, the observed one among them, at least as great; 1 where nothing was observed."""
    above = (null >= np.nan_to_num(observed)[..., None] * (1 - 1e-12)).sum(-1)
    found = (1 + above) / (null.shape[-1] + 1)
    return _tensor(np.where(np.isnan(observed), 1.0, found))


def _tensor(values: object) -> Float[Tensor, "..."]:
    return torch.as_tensor(np.asarray(values, dtype=float))
