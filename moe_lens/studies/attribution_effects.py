"""What each expert is worth to the loss, by several measures, and how well the measures agree."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.errors import InputError
from moe_lens.stats import Accumulator, Result, bootstrap_all
from moe_lens.stats.sums import BySource

METHODS = {
    "direct": "direct attribution, the final norm frozen",
    "gradient": "gradient × activation",
    "integrated": "integrated gradients of a layer, later layers' experts frozen",
    "frequency": "how many tokens chose the expert",
    "norm": "Σ ‖g E(x)‖ over the tokens that chose it",
}
"""Cheap measures of an expert's worth; the last two know nothing of the loss."""
REFERENCES = {
    "knockout": "loss without the expert, later layers choosing again",
    "knockout_frozen": "loss without the expert, later layers keeping theirs",
    "direct_knockout": "loss without what the expert adds to the last stream itself",
}
"""Exact effects of taking an expert out."""
MEASURES = (*METHODS, *REFERENCES)
AGREEMENTS = ("spearman", "pearson", "top10")
TOP = 10


@dataclass(frozen=True, eq=False)
class EffectResult(Result):
    """Sums over tokens of every measure of every expert, by source.

    Measures of the loss are in nats that the expert saves: loss without it − loss with it, or an estimate of that.
    """

    sources: tuple[str, ...]
    layers: tuple[int, ...]
    tokens: Int[Tensor, " source"]
    """Predicted tokens."""
    counts: Int[Tensor, "source layer n_experts"]
    """Tokens that chose the expert."""
    effects: Float[Tensor, "source measure layer n_experts"]
    """In the order of `MEASURES`."""

    def total(self, measure: str) -> Float[Tensor, "layer n_experts"]:
        """A measure's sum over all tokens."""
        return self.effects[:, MEASURES.index(measure)].sum(0)

    @property
    def active(self) -> Bool[Tensor, "layer n_experts"]:
        """The pairs that any token was routed to."""
        return self.counts.sum(0) > 0

    def to_frame(self) -> pd.DataFrame:
        """A row per active pair: layer, expert, count, and each measure per predicted token."""
        row, expert = self.active.nonzero().T.numpy()
        tokens = float(self.tokens.sum())
        measures = {name: (self.total(name) / tokens).numpy()[row, expert] for name in MEASURES}
        count = self.counts.sum(0).numpy()[row, expert]
        return pd.DataFrame({"layer": np.asarray(self.layers)[row], "expert": expert, "count": count, **measures})

    def fidelity(self, *, resamples: int = 1000) -> pd.DataFrame:
        """How well each method agrees with each knock-out, over active pairs: a row per layer, method and reference.

        Columns: layer (missing for all layers together), method, reference, pairs; spearman, pearson, in [−1, 1], and
        top10, the share of the ten pairs of greatest effect that are among the method's ten greatest; each with the
        ends of its 95 % interval, resampling sources (missing below ten sources); sources. Agreement is that on as much
        text; its interval does not cover that of unlimited text, where noise neither lowers nor raises it.
        """
        rows = []
        for layer in (None, *self.layers):
            at = slice(None) if layer is None else slice(self.layers.index(layer), self.layers.index(layer) + 1)
            effects, counts = self.effects[:, :, at].flatten(2), self.counts[:, at].flatten(1).double()
            pairs = [(m, r) for r in REFERENCES for m in METHODS if r != "direct_knockout" or m == "direct"]

            def agree(times: Tensor, effects: Tensor = effects, counts: Tensor = counts, pairs: Any = pairs) -> Tensor:
                active = (times @ counts) > 0
                sums = {name: times @ effects[:, i] for i, name in enumerate(MEASURES)}
                ranks = {name: ranked(value, active) for name, value in sums.items()}
                return torch.stack([_agreement(sums, ranks, active, *pair) for pair in pairs], 1)

            found = agree(torch.ones(1, len(self.sources), dtype=torch.float64))[0]
            ends = bootstrap_all(agree, self.tokens, resamples=resamples)
            for i, (method, reference) in enumerate(pairs):
                row = {
                    "layer": layer,
                    "method": method,
                    "reference": reference,
                    "pairs": int((counts.sum(0) > 0).sum()),
                }
                for j, name in enumerate(AGREEMENTS):
                    low, high = (None, None) if ends is None else ends[:, i, j].tolist()
                    row |= {name: float(found[i, j]), f"{name}_low": low, f"{name}_high": high}
                rows.append({**row, "sources": len(self.sources)})
        return pd.DataFrame(rows).astype({"layer": "Int64"})

    def rerouting(self) -> pd.DataFrame:
        """The re-routing effect, knock-out free − frozen: a row per layer.

        Columns: layer, pairs; mean over active pairs of the absolute effects, free, frozen and free − frozen, in nats
        per predicted token; and share, the last divided by the first.
        """
        free, frozen = self.total("knockout"), self.total("knockout_frozen")
        tokens = float(self.tokens.sum())
        rows = []
        for row, layer in enumerate(self.layers):
            of = self.active[row]
            sizes = [float(v[row][of].abs().mean()) / tokens for v in (free, frozen, free - frozen)]
            columns = dict(zip(("free", "frozen", "difference"), sizes, strict=True))
            rows.append({"layer": layer, "pairs": int(of.sum()), **columns, "share": sizes[2] / sizes[0]})
        return pd.DataFrame(rows)


class EffectStats(Accumulator[EffectResult]):
    """Sums the measures over tokens, by source."""

    def __init__(self, layers: Sequence[int], n_experts: int):
        self.layers = tuple(layers)
        self._effects, self._counts, self._tokens = BySource(), BySource(), BySource()
        parts = {"effects": self._effects, "counts": self._counts, "tokens": self._tokens}
        super().__init__({"layers": self.layers, "n_experts": n_experts, "measures": MEASURES}, parts)

    def update(
        self,
        effects: Float[Tensor, "batch measure layer n_experts"],
        counts: Int[Tensor, "batch layer n_experts"],
        tokens: Int[Tensor, " batch"],
        sources: Sequence[str],
    ) -> Self:
        """Count a batch: sums over each item's tokens, in the order of `MEASURES`.

        Raises:
            InputError: a measure is not finite.
        """
        if not effects.isfinite().all():
            raise InputError("an attribution is not finite; the logits hold NaN or infinities")
        self._effects.add(effects, sources)
        self._counts.add(counts, sources)
        self._tokens.add(tokens, sources)
        return self

    def result(self) -> EffectResult:
        """The sums so far."""
        if not self._tokens.sources:
            raise InputError("no tokens were counted; update with a batch that holds text first")
        tokens, counts, effects = (part.stacked() for part in (self._tokens, self._counts, self._effects))
        return EffectResult(self._tokens.sources, self.layers, tokens, counts, effects)


def pooled(results: Sequence[EffectResult]) -> EffectResult:
    """Several domains as one; a source that occurs in two of them counts as two.

    Raises:
        InputError: they are not of the same layers and experts.
    """
    first = results[0]
    if any(r.layers != first.layers or r.counts.shape[2] != first.counts.shape[2] for r in results):
        raise InputError("results of different layers or numbers of experts cannot be pooled")
    sources = tuple(f"{i}/{source}" for i, result in enumerate(results) for source in result.sources)
    tokens, counts, effects = (torch.cat([getattr(r, n) for r in results]) for n in ("tokens", "counts", "effects"))
    return EffectResult(sources, first.layers, tokens, counts, effects)


def ranked(values: Float[Tensor, "rows pairs"], active: Bool[Tensor, "rows pairs"]) -> Float[Tensor, "rows pairs"]:
    """Ranks within each row, from 1, among the active; ties share their mean rank. Zero where not active."""
    frame = pd.DataFrame(values.masked_fill(~active, torch.nan).numpy())
    return torch.from_numpy(frame.rank(axis=1).to_numpy(copy=True)).nan_to_num()


def correlation(
    one: Float[Tensor, "rows pairs"], other: Float[Tensor, "rows pairs"], active: Bool[Tensor, "rows pairs"]
) -> Float[Tensor, " rows"]:
    """Pearson's correlation within each row, over the active; NaN where one of them does not vary."""
    n = active.sum(1, keepdim=True)
    x, y = (torch.where(active, v - (v * active).sum(1, keepdim=True) / n, 0) for v in (one, other))
    return (x * y).sum(1) / ((x * x).sum(1) * (y * y).sum(1)).sqrt()


def overlap(
    one: Float[Tensor, "rows pairs"], other: Float[Tensor, "rows pairs"], active: Bool[Tensor, "rows pairs"]
) -> Float[Tensor, " rows"]:
    """Share of the `TOP` greatest of one (all, if there are fewer) that are among those of the other."""
    k = min(TOP, one.shape[1])
    best = [v.masked_fill(~active, -torch.inf).topk(k, 1).indices for v in (one, other)]
    inside = [torch.zeros_like(active).scatter(1, b, True) & active for b in best]
    return (inside[0] & inside[1]).sum(1).double() / inside[1].sum(1)


def _agreement(
    sums: dict[str, Tensor], ranks: dict[str, Tensor], active: Tensor, method: str, reference: str
) -> Float[Tensor, "rows agreement"]:
    """All of `AGREEMENTS`, in their order."""
    return torch.stack(
        [
            correlation(ranks[method], ranks[reference], active),
            correlation(sums[method], sums[reference], active),
            overlap(sums[method], sums[reference], active),
        ],
        1,
    )
