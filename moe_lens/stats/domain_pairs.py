"""Two domains at a time: how far their loads are apart, tested and bounded by their own sources alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.errors import InputError
from moe_lens.stats.routing_stats import RoutingResult
from moe_lens.stats.source_permutation import Deviations, divisions

CHUNK = 2**20
"""Numbers that are held at a time while labels are permuted."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Counts of all domains: a row for each source, or for all sources of a domain that share a key."""

    counts: Float[Tensor, "row layer n_experts"]
    tokens: Float[Tensor, " row"]
    domain: Int[Tensor, " row"]
    """Ascending."""
    unit: Int[Tensor, " row"]
    """What is left out, or swapped, together: the source; with a key, all sources of all domains that share it."""

    @classmethod
    def of(cls, results: Mapping[str, RoutingResult], key: Callable[[str], str] | None) -> Self:
        """Stack domains."""
        if len(results) < 2:
            raise InputError(f"got the domains {list(results)}; expected at least two to compare")
        sizes = {(result.layers, result.n_experts, result.top_k) for result in results.values()}
        if len(sizes) > 1:
            raise InputError(f"the domains were counted with different models: {sorted(sizes)}")
        counts = torch.cat([result.assignments.double() for result in results.values()])
        tokens = torch.cat([result.tokens.double() for result in results.values()])
        domain = torch.cat([torch.full((len(r.sources),), i) for i, r in enumerate(results.values())])
        if key is None:
            return cls(counts, tokens, domain, torch.arange(len(domain)))
        names = [key(source) for result in results.values() for source in result.sources]
        places = {name: i for i, name in enumerate(dict.fromkeys(names))}
        rows, row = (domain * len(places) + torch.tensor([places[n] for n in names])).unique(return_inverse=True)
        return cls(
            torch.zeros(len(rows), *counts.shape[1:], dtype=torch.float64).index_add_(0, row, counts),
            torch.zeros(len(rows), dtype=torch.float64).index_add_(0, row, tokens),
            rows // len(places),
            rows % len(places),
        )

    @property
    def n_units(self) -> int:
        """Of all domains."""
        return int(self.unit.max()) + 1

    def domains_of_units(self) -> Bool[Tensor, "unit domain"]:
        """Which domains a unit has text in."""
        found = torch.zeros(self.n_units, int(self.domain.max()) + 1, dtype=torch.bool)
        found[self.unit, self.domain] = True
        return found

    def tokens_of_units(self) -> Float[Tensor, "unit domain"]:
        """How much text a unit has in each domain."""
        found = torch.zeros(self.n_units, int(self.domain.max()) + 1, dtype=torch.float64)
        found[self.unit, self.domain] = self.tokens
        return found

    def without_units(self) -> Float[Tensor, "unit domain layer n_experts"]:
        """Loads of all domains without each unit."""
        sums, tokens = self._sums(self.counts), self._sums(self.tokens)
        gone = torch.zeros(self.n_units, len(sums), *sums.shape[1:], dtype=torch.float64)
        gone[self.unit, self.domain] = self.counts
        return normalised((sums - gone) / (tokens - self.tokens_of_units())[..., None, None])

    def _sums(self, values: Float[Tensor, "row *shape"]) -> Float[Tensor, "domain *shape"]:
        total = torch.zeros(int(self.domain.max()) + 1, *values.shape[1:], dtype=torch.float64)
        return total.index_add_(0, self.domain, values)

    def pair(self, a: int, b: int, parallel: bool) -> "Rows":
        """Of two domains, 0 and 1; with `parallel`, of the units that both have, if they have any in common."""
        kept = (self.domain == a) | (self.domain == b)
        if parallel:
            found = self.domains_of_units()
            both = found[:, a] & found[:, b]
            kept &= both[self.unit] if bool(both.any()) else True
        unit = self.unit[kept].unique(return_inverse=True)[1]
        return Rows(self.counts[kept], self.tokens[kept], (self.domain[kept] == b).long(), unit)


@dataclass(frozen=True, eq=False)
class PairTest:
    """The divergence of two domains' loads, beside what it is where sources' domains are permuted."""

    jsd: Float[Tensor, " layer"]
    null: Float[Tensor, " layer"]
    p_values: Float[Tensor, " layer"]
    without: Float[Tensor, "unit layer"]
    """Without each unit of the pair, in ascending order."""
    sources: tuple[int, int]
    smallest_p: float

    @classmethod
    def of(cls, rows: Rows, permutations: int, generator: torch.Generator) -> Self:
        """Test the two domains of these rows.

        Args:
            rows: Of the domains 0 and 1; paired where all units have a row in both.
            permutations: How often labels are permuted, or swapped within units.
            generator: Of the permutations.
        """
        n = [int((rows.domain == d).sum()) for d in (0, 1)]
        paired = rows.n_units < len(rows.unit)
        if paired:
            swapped = torch.randint(2, (permutations, n[0]), generator=generator)
            first = torch.arange(n[0]) + n[0] * swapped  # rows of both domains are in the order of their units
            order = torch.cat([first, (first + n[0]) % (2 * n[0])], 1)
            distinct = 2 ** (n[0] - 1)
        else:
            order = torch.rand(permutations, sum(n), generator=generator).argsort(-1)
            distinct = divisions(n)
        deviations = Deviations.of(rows.counts, rows.tokens, rows.domain)
        parts = order.split(max(1, CHUNK // rows.counts.numel()))
        shares = (deviations.shares()[None], *map(deviations.reassigned, parts))
        jsd = torch.cat([information(normalised(part)) for part in shares])
        smallest = 1 / min(permutations + 1, distinct)
        return cls(
            jsd=jsd[0],
            null=jsd[1:].mean(0),
            p_values=(jsd >= jsd[0] - 1e-12).double().mean(0).clamp(min=smallest),
            without=information(rows.without_units()),
            sources=(n[0], n[1]),
            smallest_p=smallest,
        )


def information(load: Float[Tensor, "*some domain layer n_experts"]) -> Float[Tensor, "*some layer"]:
    """I(E; D) with domains of equal weight: the entropy of the mean minus the mean entropy, nats.

    Of two domains this is the Jensen–Shannon divergence of their loads, in [0, ln 2].
    """
    return torch.special.entr(load.mean(-3)).sum(-1) - torch.special.entr(load).sum(-1).mean(-2)


def normalised(shares: Float[Tensor, "*some layer n_experts"]) -> Float[Tensor, "*some layer n_experts"]:
    """Shares made to sum to 1; those of permuted deviations may be a little below 0."""
    positive = shares.clamp(min=0)
    return positive / positive.sum(-1, keepdim=True)
