"""k-sparse probes: how well a few experts, or a few of their neurons, tell a label (arXiv 2305.01610, 2604.02178).

Components are picked and weighed on one half of the sources and scored on the other, and the other way round. Sums are
all that is kept: a probe is a linear discriminant, which class means and covariances give, with its threshold half way
between the means. Its score is balanced accuracy: .5 says nothing, however rare the label is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from moe_lens.checked import Natural
from moe_lens.errors import InputError
from moe_lens.resampling import bootstrap_all
from moe_lens.stats.accumulator import Accumulator, Result
from moe_lens.stats.sums import BySource, Maximum, Total

EXPERTS, NEURONS = "experts", "neurons"
KINDS = (EXPERTS, NEURONS)
"""Routing weights of experts; activations of neurons of the experts that were chosen, 0 for all others."""
RIDGE = 1e-3
"""Added to variances, as a share of their mean."""
NOTHING = 1e-9
"""Deviation below which a component is said never to change."""


@dataclass(frozen=True, eq=False)
class SumsResult(Result):
    """Sums by name, for what comes next; not to be read by themselves."""

    names: tuple[str, ...]
    values: Float[Tensor, " name"]

    def to_frame(self) -> pd.DataFrame:
        """A row per name: the sum of all numbers."""
        return pd.DataFrame({"name": list(self.names), "value": self.values.numpy()})


class Sums(Accumulator[SumsResult]):
    """Adds up tensors by name."""

    def __init__(self, names: Sequence[str]):
        self.parts = {name: Total() for name in names}
        super().__init__({"names": tuple(names)}, self.parts)

    def update(self, name: str, value: Shaped[Tensor, "*shape"]) -> Self:
        """Add a tensor."""
        self.parts[name].add(value)
        return self

    def result(self) -> SumsResult:
        """The sum of each."""
        values = [
            part.value.double().sum() if part.seen else torch.tensor(0.0).double() for part in self.parts.values()
        ]
        return SumsResult(tuple(self.parts), torch.stack(values))


def component_sums(
    values: Float[Tensor, "token top_k width"],
    indices: Int[Tensor, "token top_k"],
    labels: Bool[Tensor, "token label"],
    n_experts: int,
) -> tuple[Float[Tensor, "moment n_experts width"], Float[Tensor, "label n_experts width"]]:
    """Of every component the sum and the sum of squares; and its sum over the tokens with each label.

    Slots that a token does not use, as with a number of experts of its own, have the index -1 and are left out.
    """

    def total(values: Tensor, indices: Tensor) -> Tensor:
        empty, used = values.new_zeros(n_experts, values.shape[-1]), indices >= 0
        return empty.index_add_(0, indices[used], values[used])

    moments = torch.stack([total(values, indices), total(values.square(), indices)])
    return moments, torch.stack([total(values[label], indices[label]) for label in labels.T])


def pick_components(
    moments: Float[Tensor, "moment n_experts width"],
    labelled: Float[Tensor, "label n_experts width"],
    n: float,
    n_labelled: Float[Tensor, " label"],
    k: int,
) -> Int[Tensor, "label k"]:
    """The components whose means differ most between tokens with and without each label, in standard deviations.

    They are counted expert by expert: component / width is the expert.
    """
    mean = moments[0] / n
    deviation = (moments[1] / n - mean.square()).clamp(min=0).sqrt()
    with_, without = labelled / n_labelled[:, None, None], (moments[0] - labelled) / (n - n_labelled)[:, None, None]
    effect = torch.where(deviation > NOTHING, (with_ - without).abs() / deviation, 0)
    return effect.flatten(1).topk(k, dim=1).indices


def at_components(
    values: Float[Tensor, "token top_k width"], indices: Int[Tensor, "token top_k"], picked: Int[Tensor, "*some"]
) -> Float[Tensor, "token *some"]:
    """Values of some components; 0 where their expert was not chosen."""
    flat, width = picked.flatten(), values.shape[-1]
    found = (values[..., flat % width] * (indices[..., None] == flat // width)).sum(1)
    return found.unflatten(1, picked.shape)


def discriminant(
    squares: Float[Tensor, "*batch k k"],
    sums: Float[Tensor, "*batch 2 k"],
    n: Float[Tensor, "*batch 2"],
) -> tuple[Float[Tensor, "*batch k"], Float[Tensor, "*batch"]]:
    """Weights and threshold of the linear discriminant.

    Args:
        squares: Σ x xᵀ over all tokens.
        sums: Σ x over those without and with the label.
        n: How many these are.
    """
    means = sums / n[..., None]
    between = (n[..., None, None] * means[..., :, None] * means[..., None, :]).sum(-3)
    within = (squares - between) / n.sum(-1)[..., None, None]
    variance = within.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=NOTHING**2)
    ridge = RIDGE * variance[..., None, None] * torch.eye(within.shape[-1], dtype=within.dtype)
    weights = torch.linalg.solve(within + ridge, means[..., 1, :] - means[..., 0, :])
    return weights, (weights * means.sum(-2) / 2).sum(-1)


@dataclass(frozen=True, eq=False)
class ProbeResult(Result):
    """How often probes were right, in sources on which they were neither picked nor fitted."""

    layers: tuple[Natural, ...]
    labels: tuple[str, ...]
    k: tuple[Natural, ...]
    sources: tuple[str, ...]
    tokens: Int[Tensor, "source label 2 2"]
    """Tokens without and with the label; then of the label as it is, and shuffled."""
    said: Int[Tensor, "source layer kind label 2 k 2"]
    """Of these, those that the probe says have the label."""
    picked: Int[Tensor, "half layer kind label most"]
    """Components that are picked on either half, the best first; counted expert by expert."""
    widths: tuple[int, int]
    """Components of an expert: of either kind."""

    def to_frame(self) -> pd.DataFrame:
        """A row per label, layer, kind of component and k.

        Columns: accuracy (balanced: mean of the shares of tokens with and without the label that are told right; .5 is
        chance), low, high (95 % over sources), recall, precision, shuffled (accuracy of a probe of labels shuffled
        within each window), beyond (accuracy minus that), beyond_low, beyond_high (paired by source), labelled, tokens,
        sources (parallel ones are one).
        """
        n, said = self.tokens.double(), self.said.double()

        def accuracy(times: Tensor) -> Tensor:
            share = torch.tensordot(times, said, 1) / torch.tensordot(times, n, 1)[:, None, None, :, :, None, :]
            return (share[..., 1] + 1 - share[..., 0]) / 2

        def beyond(times: Tensor) -> Tensor:
            value = accuracy(times)
            return value[..., 0, :] - value[..., 1, :]

        once = torch.ones(1, len(n), dtype=torch.float64)
        sizes = n[:, None, None, :, 0, None].unbind(-1)
        value, more = accuracy(once)[0], beyond(once)[0]
        ends = [
            torch.full((2, *of.shape), torch.nan) if (found := bootstrap_all(statistic, *sizes)) is None else found
            for statistic, of in ((lambda times: accuracy(times)[..., 0, :], more), (beyond, more))
        ]
        own = said[..., 0, :, :].sum(0)
        columns = {"accuracy": value[..., 0, :], "low": ends[0][0], "high": ends[0][1]}
        columns["recall"] = own[..., 1] / n[:, :, 0, 1].sum(0)[:, None]
        columns |= {"precision": own[..., 1] / own.sum(-1), "shuffled": value[..., 1, :], "beyond": more}
        columns |= {"beyond_low": ends[1][0], "beyond_high": ends[1][1]}
        index = pd.MultiIndex.from_product(
            [self.layers, KINDS, self.labels, self.k], names=["layer", "kind", "label", "k"]
        )
        frame = pd.DataFrame({name: column.flatten().numpy() for name, column in columns.items()}, index=index)
        tokens = dict(zip(self.labels, self.tokens[:, :, 0, 1].sum(0).tolist(), strict=True))
        frame = frame.reset_index().assign(tokens=int(n[:, 0, 0].sum()), sources=len(self.sources))
        return frame.assign(labelled=[tokens[label] for label in frame["label"]])

    def components(self) -> pd.DataFrame:
        """A row per label, layer, kind and place: expert, neuron (missing of experts), both (picked on both halves).

        They are those of the first half of the sources.
        """
        first, other = self.picked
        both = (first[..., None] == other[..., None, :]).any(-1)
        at = torch.ones_like(first, dtype=torch.bool).nonzero()
        widths = torch.tensor(self.widths)[at[:, 1]]
        flat = first.flatten()
        neuron = pd.array((flat % widths).tolist(), dtype="Int64")
        kind = [KINDS[one] for one in at[:, 1].tolist()]
        frame = pd.DataFrame(
            {
                "label": [self.labels[one] for one in at[:, 2].tolist()],
                "layer": [self.layers[one] for one in at[:, 0].tolist()],
                "kind": kind,
                "place": at[:, 3].numpy(),
                "expert": (flat // widths).numpy(),
                "neuron": neuron,
                "both": both.flatten().numpy(),
            }
        )
        frame.loc[frame["kind"] == EXPERTS, "neuron"] = pd.NA
        return frame


class ProbeScores(Accumulator[ProbeResult]):
    """Counts what probes say."""

    def __init__(self, layers: Sequence[int], labels: Sequence[str], k: Sequence[int], widths: tuple[int, int]):
        self.layers, self.labels, self.k, self.widths = tuple(layers), tuple(labels), tuple(k), widths
        self._tokens, self._said = BySource(), BySource()
        self._picked = Maximum((2, len(self.layers), len(KINDS), len(self.labels), max(self.k)))
        about = {"layers": self.layers, "labels": self.labels, "k": self.k, "widths": widths}
        super().__init__(about, {"tokens": self._tokens, "said": self._said, "picked": self._picked})

    def update(
        self,
        tokens: Int[Tensor, "batch label 2 2"],
        said: Int[Tensor, "batch layer kind label 2 k 2"],
        picked: Int[Tensor, "half layer kind label most"],
        sources: Sequence[str],
    ) -> Self:
        """Count a batch; what is picked is the same in every one."""
        self._tokens.add(tokens, sources)
        self._said.add(said, sources)
        self._picked.add(picked)
        return self

    def result(self) -> ProbeResult:
        """The counts so far."""
        if not self._tokens.sources:
            raise InputError("no tokens were counted; is there any text?")
        picked = self._picked.value.long()
        tokens, said = self._tokens.stacked(), self._said.stacked()
        return ProbeResult(self.layers, self.labels, self.k, self._tokens.sources, tokens, said, picked, self.widths)
