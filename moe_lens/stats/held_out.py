"""Linear prediction of rows from features, held out by source: ridge regression, one feature after another.

A feature is a set of categories (a token, a domain) or a few columns of numbers (activations). Each is fitted to what
those before it leave, then all once more in turn (block coordinate descent). Penalties are chosen for each column that
is predicted, on sources apart from those that are fitted and from those that are predicted; one of the choices is to
leave the feature out, so that a feature that says nothing changes nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from moe_lens.checked import Natural, Seed

SWEEPS = 2
"""Times that features are fitted in turn; a single one is fitted once."""

Rows = Int[Tensor, " some"]


@runtime_checkable
class Solver(Protocol):
    """A feature at the rows that are fitted."""

    def moments(self, residual: Float[Tensor, "some column"]) -> Float[Tensor, "term column"]:
        """What a solution depends on."""
        ...

    def solution(
        self, moments: Float[Tensor, "term column"], penalty: Float[Tensor, " column"]
    ) -> Float[Tensor, "weight column"]:
        """Weights that minimise squared error + penalty · squared weights; an infinite penalty gives none."""
        ...

    def predict(self, rows: Rows, weights: Float[Tensor, "weight column"]) -> Float[Tensor, "some column"]:
        """What weights say of any rows."""
        ...


class Feature(ABC):
    """Something known of every row."""

    penalties: ClassVar[tuple[float, ...]]

    @abstractmethod
    def at(self, rows: Rows) -> Solver:
        """Ready to be fitted at some rows."""

    @abstractmethod
    def moved(self, order: Int[Tensor, " row"]) -> "Feature":
        """The same values, given to other rows."""

    @abstractmethod
    def values(self) -> Shaped[Tensor, "row ..."]:
        """A row's values."""

    def shuffled(self, source: Int[Tensor, " row"], seed: Seed) -> "Feature":
        """Values shuffled over sources where every row of a source has the same value, else over rows.

        A source takes the value of another source, so that what a source shares stays shared.
        """
        generator = torch.Generator().manual_seed(seed)
        values, n = self.values(), int(source.max()) + 1
        first = torch.full((n,), len(source)).scatter_reduce(0, source, torch.arange(len(source)), "amin")
        if bool((values == values[first[source]]).all()):
            return self.moved(first[torch.randperm(n, generator=generator)][source])
        return self.moved(torch.randperm(len(source), generator=generator))


@dataclass(frozen=True, eq=False)
class Categories(Feature):
    """One of some categories."""

    codes: Int[Tensor, " row"]
    n: Natural

    penalties = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, float("inf"))

    @classmethod
    def of(cls, values: Shaped[Tensor, " row"]) -> "Categories":
        """From any values."""
        kinds, codes = values.unique(return_inverse=True)
        return cls(codes, len(kinds))

    def values(self) -> Int[Tensor, " row"]:
        """The categories."""
        return self.codes

    def moved(self, order: Int[Tensor, " row"]) -> "Categories":
        """See `Feature`."""
        return Categories(self.codes[order], self.n)

    def at(self, rows: Rows) -> Solver:
        """See `Feature`."""
        return _OfCategories(self.codes, self.codes[rows], self.n)


class _OfCategories:
    def __init__(self, codes: Tensor, fitted: Tensor, n: int):
        self.codes, self.fitted, self.n = codes, fitted, n
        self.counts = torch.bincount(fitted, minlength=n).float()[:, None]

    def moments(self, residual: Float[Tensor, "some column"]) -> Float[Tensor, "term column"]:
        return residual.new_zeros(self.n, residual.shape[1]).index_add_(0, self.fitted, residual)

    def solution(
        self, moments: Float[Tensor, "term column"], penalty: Float[Tensor, " column"]
    ) -> Float[Tensor, "weight column"]:
        return moments / (self.counts + penalty)

    def predict(self, rows: Rows, weights: Float[Tensor, "weight column"]) -> Float[Tensor, "some column"]:
        return weights[self.codes[rows]]


@dataclass(frozen=True, eq=False)
class Numbers(Feature):
    """Columns of numbers."""

    columns: Float[Tensor, "row number"]

    penalties = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5, float("inf"))

    def values(self) -> Float[Tensor, "row number"]:
        """The numbers."""
        return self.columns

    def moved(self, order: Int[Tensor, " row"]) -> "Numbers":
        """See `Feature`."""
        return Numbers(self.columns[order])

    def at(self, rows: Rows) -> Solver:
        """See `Feature`."""
        return _OfNumbers(self.columns, rows)


class _OfNumbers:
    def __init__(self, columns: Tensor, rows: Rows):
        here = columns[rows].float()
        self.columns, self.mean = columns, here.mean(0)
        spread = (here - self.mean).square().mean(0).sqrt()
        self.scale = torch.where(spread > 0, spread, torch.inf)  # a column that never changes says nothing
        self.x = (here - self.mean) / self.scale
        self.spectrum, self.basis = torch.linalg.eigh(self.x.T @ self.x)

    def moments(self, residual: Float[Tensor, "some column"]) -> Float[Tensor, "term column"]:
        return self.basis.T @ (self.x.T @ residual)

    def solution(
        self, moments: Float[Tensor, "term column"], penalty: Float[Tensor, " column"]
    ) -> Float[Tensor, "weight column"]:
        return self.basis @ (moments / (self.spectrum.clamp(min=0)[:, None] + penalty))

    def predict(self, rows: Rows, weights: Float[Tensor, "weight column"]) -> Float[Tensor, "some column"]:
        return (self.columns[rows].float() - self.mean) / self.scale @ weights


class Held:
    """Fits on the sources of all folds but one, and predicts those of that one.

    Args:
        features: By name.
        fold: Of each row; three or more folds.
        held: The fold that is predicted.
    """

    def __init__(self, features: Mapping[str, Feature], fold: Int[Tensor, " row"], held: Natural):
        n = int(fold.max()) + 1
        self.features = features
        self.rows = (fold == held).nonzero()[:, 0]
        self.train = (fold != held).nonzero()[:, 0]
        apart = fold == (held + 1) % n
        self.validate = apart.nonzero()[:, 0]
        self.fit = ((fold != held) & ~apart).nonzero()[:, 0]
        self._tried = {name: feature.at(self.fit) for name, feature in features.items()}
        self._fitted = {name: feature.at(self.train) for name, feature in features.items()}

    def predictions(
        self, target: Float[Tensor, "row column"], subsets: Sequence[tuple[str, ...]]
    ) -> tuple[Float[Tensor, " column"], list[Float[Tensor, "held column"]]]:
        """Of the rows held out: the mean of those that are trained on, and from each subset of the features."""
        fit, apart = target[self.fit], target[self.validate]
        base = fit.mean(0)
        left: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {(): (fit - base, apart - base)}
        penalty: dict[tuple[str, ...], Tensor] = {}
        mean = target[self.train].mean(0)
        found = []
        for subset in subsets:
            for end in range(1, len(subset) + 1):
                if subset[:end] not in penalty:
                    penalty[subset[:end]], left[subset[:end]] = self._choose(subset[end - 1], left[subset[: end - 1]])
            chosen = [penalty[subset[:end]] for end in range(1, len(subset) + 1)]
            found.append(mean + self._train(subset, chosen, target[self.train] - mean))
        return mean, found

    def _choose(self, name: str, left: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The penalty of each column that predicts sources apart best, and what it leaves."""
        solver, (fit, apart) = self._tried[name], left
        moments = solver.moments(fit)
        tries = self.features[name].penalties
        ones = torch.ones(fit.shape[1])
        errors = torch.stack(
            [
                (apart - solver.predict(self.validate, solver.solution(moments, each * ones))).square().sum(0)
                for each in tries
            ]
        )
        penalty = torch.tensor(tries)[errors.argmin(0)]
        weights = solver.solution(moments, penalty)
        fit, apart = fit - solver.predict(self.fit, weights), apart - solver.predict(self.validate, weights)
        shift = fit.mean(0)  # of what penalties leave: or the next feature would gain by saying the same of all rows
        return penalty, (fit - shift, apart - shift)

    def _train(self, subset: Sequence[str], penalties: Sequence[Tensor], residual: Tensor) -> Tensor:
        weights: dict[str, Tensor] = {}
        shift = torch.zeros(residual.shape[1])
        for _ in range(SWEEPS if len(subset) > 1 else 1):
            for name, penalty in zip(subset, penalties, strict=True):
                solver = self._fitted[name]
                if name in weights:
                    residual = residual + solver.predict(self.train, weights[name])
                weights[name] = solver.solution(solver.moments(residual), penalty)
                residual = residual - solver.predict(self.train, weights[name])
                shift, residual = shift + residual.mean(0), residual - residual.mean(0)
        return shift + torch.stack([self._fitted[name].predict(self.rows, weights[name]) for name in subset]).sum(0)


LEVELS = 2**10
"""Steps between the smallest and the greatest score: scores nearer to one another than that count as equal."""


def placements(scores: Float[Tensor, "row column"], chosen: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    """Of each chosen row the share of the others that score lower, of each other the share of chosen that score higher.

    Equal scores count half. The mean over chosen rows, and that over the others, is the area under the ROC curve; sums
    by source give its interval (Obuchowski 1997, Biometrics 53). NaN where there is none to compare with.
    """
    low, high = scores.amin(0), scores.amax(0)
    level = ((scores - low) / (high - low).clamp(min=1e-12) * (LEVELS - 1)).round().long()
    counts = []
    for weight in (chosen, 1 - chosen):
        histogram = scores.new_zeros(LEVELS, scores.shape[1], dtype=torch.float64)
        counts.append(histogram.scatter_add_(0, level, weight.double()))
    positive, negative = counts
    lower = (negative.cumsum(0) - negative / 2) / negative.sum(0)
    higher = (positive.sum(0) - positive.cumsum(0) + positive / 2) / positive.sum(0)
    return torch.where(chosen > 0, lower.gather(0, level), higher.gather(0, level)).to(scores.dtype)
