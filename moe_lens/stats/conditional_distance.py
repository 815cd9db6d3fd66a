"""The distance of two domains' routing of the same tokens, from products of different sources: the sums behind it.

Of a token x, C_a and C_b are the domains' counts by expert, c_s those of a source, n_s how often it holds the token,
N_a and N_b the domains' sums, and p the mean of c_s / n_s over the S sources that hold it: were it that of all tokens,
a long source would draw it to itself, and all others would seem to differ from it alike. With r_s = c_s − n_s p,

    ‖p_a − p_b‖² ≈ Σ_{s≠t in a} ⟨r_s, r_t⟩ / (N_a² − Σ n²) + the same of b − 2 ⟨Σ_a r, Σ_b r⟩ / (N_a N_b).

As p is made of the sources, ⟨r_s, r_t⟩ is too small by n_t V_s / (S n_s) + n_s V_t / (S n_t) − n_s n_t Var p, V_s the
variance of c_s, which ‖r_s‖² tells; to this products are corrected. Then the sum is 0 on average where the domains are
alike, whatever the sizes of sources and however much they differ.

Everything is made of products of counts, which are sparse: residuals, which are not, are never stored.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from moe_lens.stats.vocabulary_specialisation import VocabularyResult

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Units:
    """What each source (a group of them) did with each token: the same units in all layers."""

    n_experts: int
    top_k: int
    token: Array
    """Of each unit, ascending."""
    source: Array
    """Of each unit; numbered through all domains."""
    size: Array
    """Of each unit: how often the source holds the token."""
    domain_of: Int[Tensor, " source"]
    cells: tuple[tuple[Array, Array, Array], ...]
    """Of each layer: unit, expert and count of what is not 0."""

    @classmethod
    def of(cls, results: list[VocabularyResult]) -> Self:
        """Units of all domains."""
        first, keys, places, experts, counts, first_choices = results[0], [], [], [], [], []
        for d, result in enumerate(results):
            group, token, place, expert = result.cells()
            keys.append((token * len(results) + d) * result.groups + group)
            places.append(place)
            experts.append(expert)
            counts.append(result.assigned)
            first_choices.append(result.top1)
        found, unit = torch.cat(keys).unique(return_inverse=True)
        place, expert, count = torch.cat(places), torch.cat(experts), torch.cat(counts).double()
        size = torch.zeros(len(found), dtype=torch.float64)
        here = place == 0  # each token is sent somewhere in each layer
        size.index_add_(0, unit[here], torch.cat(first_choices)[here].double())
        names, source = (found % (first.groups * len(results))).unique(return_inverse=True)
        cells = []
        for layer in range(len(first.layers)):
            here = place == layer
            cells.append((unit[here].numpy(), expert[here].numpy(), count[here].numpy()))
        return cls(
            n_experts=first.n_experts,
            top_k=first.top_k,
            token=(found // (first.groups * len(results))).numpy(),
            source=source.numpy(),
            size=size.numpy(),
            domain_of=names // first.groups,
            cells=tuple(cells),
        )

    @property
    def n_sources(self) -> int:
        """Of all domains."""
        return len(self.domain_of)

    def counts(self, layer: int) -> Any:
        """Sparse counts, [unit, expert], of the layer in this place."""
        from scipy.sparse import csr_array

        unit, expert, count = self.cells[layer]
        return csr_array((count, (unit, expert)), shape=(len(self.token), self.n_experts))


@dataclass(frozen=True, eq=False)
class PairOfDomains:
    """The tokens that two domains share, and the units that hold them."""

    units: Units
    kept: Array
    """Units of the two domains whose token can be tested."""
    token: Array
    """Of each kept unit, counted from 0."""
    source: Array
    """Of each kept unit."""
    second: Array
    """Of each kept unit: 0 in the first domain, 1 in the second."""
    size: Array
    sums: Array
    """N of both domains, [2, token]."""
    squares: Array
    """Σ n² of both domains, [2, token]."""
    shared: float
    """Share of the two domains' text that is kept."""

    @classmethod
    def of(cls, units: Units, a: int, b: int) -> Self:
        """Find what two domains share."""
        domain = units.domain_of.numpy()[units.source]
        of_pair = np.flatnonzero((domain == a) | (domain == b))
        tokens, token = np.unique(units.token[of_pair], return_inverse=True)
        second, size = (domain[of_pair] == b).astype(int), units.size[of_pair]
        sums, squares = (
            np.stack([np.bincount(token, weights * (second == d), len(tokens)) for d in (0, 1)])
            for weights in (size, size**2)
        )
        enough = np.all(sums**2 > squares, axis=0)  # a second source in both
        keep = enough[token]
        return cls(
            units=units,
            kept=of_pair[keep],
            token=(np.cumsum(enough) - 1)[token[keep]],
            source=units.source[of_pair[keep]],
            second=second[keep],
            size=size[keep],
            sums=sums[:, enough],
            squares=squares[:, enough],
            shared=float(size[keep].sum() / size.sum()) if len(size) else 0.0,
        )

    @property
    def testable(self) -> bool:
        """Whether there is any token to test."""
        return self.sums.shape[1] > 0

    @cached_property
    def weights(self) -> Array:
        """Of tokens: harmonic means of their counts."""
        return 2 * self.sums[0] * self.sums[1] / self.sums.sum(0)

    @cached_property
    def holders(self) -> Array:
        """Of tokens: how many sources hold it."""
        return np.bincount(self.token, minlength=self.sums.shape[1])

    @property
    def tokens(self) -> Float[Tensor, " source"]:
        """Kept, of each source."""
        return torch.from_numpy(np.bincount(self.source, self.size, self.units.n_sources)).double()  # int64 of nothing

    def measure(self, counts: Any, signs: Array) -> tuple[float, Array, Array]:
        """The distance; what it is without each source; and what it is under each row of signs.

        Args:
            counts: Of all units of a layer, sparse, [unit, expert].
            signs: Of all sources of all domains, [draw, source].
        """
        own = counts[self.kept].tocoo()
        row, column, value = own.row, own.col, own.data
        n_tokens, token, size, second = self.sums.shape[1], self.token, self.size, self.second
        of = np.zeros((2, n_tokens, self.units.n_experts))
        np.add.at(of, (second[row], token[row], column), value)
        # of each unit: ⟨c_s, C_a⟩, ⟨c_s, C_b⟩, ‖c_s‖² and ⟨c_s, p⟩, less V_s / (S n_s)
        with_domain = np.stack([np.bincount(row, value * of[d, token[row], column], len(token)) for d in (0, 1)])
        square = np.bincount(row, value**2, len(token))
        share = np.zeros(of.shape[1:])
        each, others = self.holders[token], self.holders - 1
        np.add.at(share, (token[row], column), value / (size * each)[row])
        mean_square = np.square(share).sum(1)
        with_mean = np.bincount(row, value * share[token[row], column], len(token))
        residual = square - 2 * size * with_mean + size**2 * mean_square[token]
        of_mean = np.bincount(token, residual / size**2, n_tokens) / (self.holders * others)  # its variance
        with_mean -= (residual - size**2 * of_mean[token]) / (size * (each - 2))
        inner = np.einsum("ate,bte->abt", of, of)  # ⟨C_a, C_b⟩, [2, 2, token]
        mean = np.stack([np.bincount(token, with_mean * (second == d), n_tokens) for d in (0, 1)])  # ⟨C_a, p⟩
        within = np.stack(
            [
                inner[d, d]
                - np.bincount(token, square * (second == d), n_tokens)
                - 2 * (self.sums[d] * mean[d] - np.bincount(token, size * with_mean * (second == d), n_tokens))
                for d in (0, 1)
            ]
        )
        between = inner[0, 1] - self.sums[1] * mean[0] - self.sums[0] * mean[1]
        distance = _distance(within, between, self.sums, self.squares)
        weighted, weight = (self.weights * distance).sum(), self.weights.sum()

        # without one unit: N, Σ n², and the products that it took part in
        at, mine, other = np.arange(len(token)), second, 1 - second
        sums, squares = self.sums[:, token].copy(), self.squares[:, token].copy()
        sums[mine, at] -= size
        squares[mine, at] -= size**2
        lost_within = (with_domain[mine, at] - square) - (
            sums[mine, at] * with_mean + size * (mean[mine, token] - with_mean)
        )
        lost_between = with_domain[other, at] - sums[other, at] * with_mean - size * mean[other, token]
        left_within, left_between = within[:, token].copy(), between[token] - lost_between
        left_within[mine, at] -= 2 * lost_within
        still = (sums**2 - squares > 0.5).all(0)
        new_weight = np.where(still, 2 * sums[0] * sums[1] / np.maximum(sums.sum(0), 1), 0)
        new = np.where(still, _distance(left_within, left_between, sums, squares), 0)
        change = np.bincount(self.source, new_weight * new - (self.weights * distance)[token], self.units.n_sources)
        lighter = np.bincount(self.source, new_weight - self.weights[token], self.units.n_sources)
        with np.errstate(divide="ignore", invalid="ignore"):
            without = (weighted + change) / (weight + lighter)
        null = self._null(row, column, value, with_mean, mean_square - of_mean, signs)
        return weighted / weight, without, null

    def _null(self, row: Array, column: Array, value: Array, with_mean: Array, constant: Array, signs: Array) -> Array:
        """The distance with signs: Σ_{s≠t} ε_s ε_t K_st, K_st = Σ_x w_x ⟨r_s, r_t⟩ / ±… of corrected products.

        Residuals are too short by √(1 − 1 / S), as p is made of them.
        """
        from scipy.sparse import csr_array, hstack

        n_sources, n_tokens = self.units.n_sources, self.sums.shape[1]
        leverage = 1 / np.sqrt(1 - 1 / self.holders[self.token])

        def by_source(values: Array, columns: Array, width: int, rows: Array) -> Any:
            return csr_array((values, (self.source[rows], columns)), shape=(n_sources, width))

        units = np.arange(len(self.token))
        share = self.weights / self.weights.sum()
        kernel = np.zeros((n_sources, n_sources))
        scales = 1 / (self.sums[0] ** 2 - self.squares[0]), 1 / (self.sums[1] ** 2 - self.squares[1])
        for first, second, scale in ((0, 0, scales[0]), (1, 1, scales[1]), (0, 1, -1 / (self.sums[0] * self.sums[1]))):
            sides = []
            for d, scaled in ((first, np.ones(n_tokens)), (second, share * scale)):
                cells, mine = self.second[row] == d, self.second == d
                token = self.token[mine]
                weight = leverage[mine] * scaled[token]
                width = n_tokens * self.units.n_experts
                place = self.token[row[cells]] * self.units.n_experts + column[cells]
                scaled_cells = value[cells] * leverage[row[cells]] * scaled[self.token[row[cells]]]
                counts = by_source(scaled_cells, place, width, row[cells])
                means = by_source(with_mean[mine] * weight, token, n_tokens, units[mine])
                sizes = by_source(self.size[mine] * weight, token, n_tokens, units[mine])
                sides.append((counts, means, sizes))
            (counts, means, sizes), (counts_, means_, sizes_) = sides
            constants = sizes_.multiply(constant[None]).tocsr()
            left, right = hstack([counts, means, sizes]).tocsr(), hstack([counts_, -sizes_, constants - means_]).tocsr()
            product = (left @ right.T).toarray()
            kernel += product if first == second else product + product.T
        np.fill_diagonal(kernel, 0)
        return ((signs @ kernel) * signs).sum(1)


def _distance(within: Array, between: Array, sums: Array, squares: Array) -> Array:
    """‖p_a − p_b‖² of tokens, from the sums of products within the domains and between them."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (within / (sums**2 - squares)).sum(0) - 2 * between / (sums[0] * sums[1])
