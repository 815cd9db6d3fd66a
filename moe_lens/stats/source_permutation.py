"""`Deviations`: how sources deviate from what all domains together do, permuted as if the domain did not matter.

Labels of whole sources can be permuted as they are only where sources are of like size in all domains: a short text's
shares vary more, so that a domain of short texts differs by chance more than a random set of sources does. What is
permuted is therefore each source's deviation in units of its standard deviation, and is scaled to
the size of the source whose place it takes (Freedman and Lane 1983; Winkler et al. 2014, NeuroImage 92: residuals made
exchangeable before they are permuted). Where all sources have one size this is, to the last count, the permutation of
labels, and the test is exact. `benchmarks/domain_tests.py` shows how well it does where they have not.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import factorial, prod
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

STEPS = 4
"""How often shares and dependence are estimated, each time with the weights that the last ones give."""

LEAST_EXPECTED = 10
"""Tokens that an expert must expect in every domain, or it is not tested: lower counts are too skewed. With the five of
Cochran (1954, Biometrics 10), tests of domains of 200 and 6,000 tokens at .05 found something in .077 of the draws."""

LEAST_SOURCES = 1.5
"""The effective number of a domain's sources (Kish 1965) below which no expert is tested. Where one source holds nearly
all of the text of both domains, others, too small to tell it well, have to tell how much sources differ: tests at .05
found something in .19 of the draws. There was little to find, too: one expert that really was preferred, in .22."""


@dataclass(frozen=True, eq=False)
class Deviations:
    """Counts of sources, taken apart into what is expected of them and what they deviate by.

    The variance of a source's count is p (1 − p) n (1 + ρ (n − 1)), p the expert's share, n the source's tokens, ρ how
    much its tokens depend on one another. By weighted moments (Kleinman 1973, JASA 68) ρ is estimated for each expert
    by itself, and for a layer as s p (1 − p) (as if sources shifted its experts' logits: Williams 1982, Applied
    Statistics 31); with few sources each is uncertain, and their mean is used (so Robinson and Smyth 2007,
    Bioinformatics 23).
    """

    share: Float[Tensor, "layer n_experts"]
    """Expected of every source, whatever its domain."""
    standard: Float[Tensor, "source layer n_experts"]
    """Deviation of the count, in standard deviations; mean 0."""
    spread: Float[Tensor, "source layer n_experts"]
    """Standard deviation of the count of a source of this size."""
    counts: Float[Tensor, "source layer n_experts"]
    """As observed."""
    member: Float[Tensor, "domain source"]
    """1 / (tokens of the domain) where the source is of the domain, else 0."""
    sources: Float[Tensor, " domain"]
    """How many of one size would tell as much: its effective number of sources."""

    @classmethod
    def of(
        cls,
        counts: Float[Tensor, "source layer n_experts"],
        tokens: Float[Tensor, " source"],
        labels: Int[Tensor, " source"],
    ) -> Self:
        """Take counts apart.

        Args:
            counts: How many tokens of each source chose an expert.
            tokens: Of each source.
            labels: Domain of each source, 0 … D − 1, each at least once.
        """
        n = tokens[:, None, None]
        rho = torch.zeros_like(counts[0])
        share, leverage = _weighted(counts, n, rho)
        for _ in range(STEPS):
            binomial = share * (1 - share)
            weight = 1 / (1 + rho * (n - 1))
            # the sum of squares, less what independent tokens would give, is ρ times what dependent ones add
            squares = (weight / n * (counts - share * n).square()).sum(0)
            more = squares - (weight * binomial * (1 - leverage)).sum(0)
            unit = (weight * binomial * (1 - leverage) * (n - 1)).sum(0)
            own = (more / unit).nan_to_num(0, 0, 0)
            alike = binomial * more.sum(-1, keepdim=True) / (unit * binomial).sum(-1, keepdim=True)
            rho = ((own + alike.nan_to_num(0, 0, 0)) / 2).clamp(0, 1)
            share, leverage = _weighted(counts, n, rho)
        spread = ((share * (1 - share)).clamp(min=0) * n * (1 + rho * (n - 1))).sqrt()
        # a source that weighs much has drawn the share to itself, and seems to deviate less than it does
        relative = ((1 - 1 / len(n)) / (1 - leverage).clamp(min=1e-12)).sqrt()
        standard = ((counts - share * n) / spread).nan_to_num(0, 0, 0) * relative
        member = one_hot(labels).double().mT
        member = member / (member @ tokens)[:, None]
        sources = 1 / (member * tokens).square().sum(-1)
        return cls(share, standard - standard.mean(0), spread, counts, member, sources)

    @property
    def errors(self) -> Float[Tensor, "domain layer n_experts"]:
        """Standard deviation of each domain's share."""
        return _summed(self.member.square(), self.spread.square()).sqrt()

    @property
    def tested(self) -> Bool[Tensor, "layer n_experts"]:
        """Whether even the smallest domain is large enough for `LEAST_EXPECTED`, and all have `LEAST_SOURCES`."""
        enough = self.sources >= LEAST_SOURCES
        return (self.share >= LEAST_EXPECTED * self.member.amax()) & enough.all()

    def shares(self) -> Float[Tensor, "domain layer n_experts"]:
        """Of each domain, as observed."""
        return _summed(self.member, self.counts)

    def reassigned(self, order: Int[Tensor, "some source"]) -> Float[Tensor, "some domain layer n_experts"]:
        """Shares if each source deviated as much as the one that `order` puts in its place; may be a little below 0.

        Those observed where domains keep their sources, or only change names: with few sources, such orders are many.
        """
        deviations = self.standard.index_select(0, order.flatten()).view(*order.shape, *self.spread.shape[1:])
        found = self.share + _summed(self.member, deviations.mul_(self.spread))
        labels, first = self.member.argmax(0), (self.member > 0).int().argmax(1)
        given = labels[order]
        found[(given == given[:, first[labels]]).all(-1)] = self.shares()
        return found


def divisions(sizes: Sequence[int]) -> int:
    """How many ways there are of dividing sources into sets of these sizes, whatever the sets are called."""
    named = factorial(sum(sizes)) // prod(map(factorial, sizes))
    return named // prod(map(factorial, Counter(sizes).values()))


def _summed(
    member: Float[Tensor, "domain source"], values: Float[Tensor, "*some source layer n_experts"]
) -> Float[Tensor, "*some domain layer n_experts"]:
    return (member @ values.flatten(-2)).unflatten(-1, values.shape[-2:])


def _weighted(
    counts: Float[Tensor, "source layer n_experts"],
    n: Float[Tensor, "source 1 1"],
    rho: Float[Tensor, "layer n_experts"],
) -> tuple[Float[Tensor, "layer n_experts"], Float[Tensor, "source layer n_experts"]]:
    """The share of all sources, weighted by how much each tells, and how much of it each source decides."""
    weight = 1 / (1 + rho * (n - 1))
    total = (weight * n).sum(0)
    return (weight * counts).sum(0) / total, weight * n / total
