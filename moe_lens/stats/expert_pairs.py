"""Which experts go together: in a layer, from layer to layer, and from token to token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.checked import Natural, Positive
from moe_lens.errors import InputError
from moe_lens.resampling import bootstrap_all
from moe_lens.stats.accumulator import Accumulator, Result
from moe_lens.stats.routed_batch import RoutedBatch
from moe_lens.stats.routing_stats import check_sizes
from moe_lens.stats.sums import BySource, Total


@dataclass(frozen=True, eq=False)
class PairResult(Result):
    """Counts of pairs of experts."""

    layers: tuple[Natural, ...]
    top_k: Positive
    n_tokens: Natural
    together: Int[Tensor, "layer n_experts n_experts"]
    """Tokens that chose both experts of a layer; on the diagonal, those that chose the expert."""
    onwards: Int[Tensor, "pair n_experts n_experts"]
    """Tokens that chose the first expert in one MoE layer and the second in the next."""
    sources: tuple[str, ...]
    neighbours: Int[Tensor, " source"]
    """Pairs of neighbouring tokens that both count."""
    kept: Int[Tensor, "source layer 2"]
    """Over these pairs: experts chosen by both tokens; pairs whose top expert is the same."""
    left: Int[Tensor, "layer 2 n_experts"]
    """Over these pairs: how often the first token chose the expert, and had it as its top expert."""
    right: Int[Tensor, "layer 2 n_experts"]
    """The same of the second token."""

    @property
    def coactivation(self) -> Float[Tensor, "layer n_experts n_experts"]:
        """Share of the first expert's tokens that chose the second, too: N_ij / N_i (OLMoE, arXiv 2409.02060).

        1 on the diagonal; NaN in the row of an expert that nobody chose.
        """
        alone = self.together.diagonal(dim1=-2, dim2=-1).double()
        return self.together.double() / alone[..., None]

    @property
    def coactivation_lift(self) -> Float[Tensor, "layer n_experts n_experts"]:
        """N_ij · N / (N_i N_j): how much more often two experts go together than if chosen independently.

        As a token chooses exactly k, independent experts would give a little less than 1, (k − 1) E / (k (E − 1)).
        """
        alone = self.together.diagonal(dim1=-2, dim2=-1).double()
        return self.together.double() * self.n_tokens / (alone[..., None] * alone[..., None, :])

    @property
    def transition(self) -> Float[Tensor, "pair n_experts n_experts"]:
        """Share of an expert's tokens that chose the second expert in the next MoE layer; a row sums to top_k."""
        return self.onwards.double() / (self.onwards.sum(-1, keepdim=True).double() / self.top_k)

    @property
    def transition_lift(self) -> Float[Tensor, "pair n_experts n_experts"]:
        """Transition over the share that the second expert has of all tokens: 1 if layers chose independently."""
        share = self.onwards.sum(-2, keepdim=True).double() / self.top_k / self.n_tokens
        return self.transition / share

    def persistence(self) -> pd.DataFrame:
        """A row per layer and measure: does a token choose what the one before it chose?

        Measures: "overlap", the share of a token's experts that the token before it chose, too, and "top1", the share
        of tokens with the same top expert. `expected` is what the experts' frequencies alone give, Σ_e p_e q_e (over k
        for the overlap), p and q of the first and the second token of a pair; `low` and `high` are the 95 % interval of
        the value, over sources.
        """
        pairs, per_pair = self.neighbours.double(), torch.tensor([float(self.top_k), 1.0], dtype=torch.float64)

        def value(times: Float[Tensor, "resample source"]) -> Float[Tensor, "resample layer 2"]:
            kept = torch.einsum("rs,slm->rlm", times, self.kept.double())
            return kept / (times @ pairs)[:, None, None] / per_pair

        n = pairs.sum()
        expected = (self.left.double() / n * self.right.double() / n).sum(-1) / per_pair
        ends = bootstrap_all(value, pairs)
        whole = value(torch.ones(1, len(self.sources), dtype=torch.float64))[0]
        low, high = (torch.full_like(whole, torch.nan),) * 2 if ends is None else ends
        index = pd.MultiIndex.from_product([self.layers, ["overlap", "top1"]], names=["layer", "measure"])
        columns = {"value": whole, "low": low, "high": high, "expected": expected}
        frame = pd.DataFrame({name: table.flatten().numpy() for name, table in columns.items()}, index=index)
        return frame.reset_index().assign(pairs=int(n), sources=len(self.sources))

    def to_frame(self) -> pd.DataFrame:
        """A row per pair of experts: together in a layer ("coactivation"), or from a layer to the next ("transition").

        Columns: kind, layer (the first), expert, other, tokens, share, lift. Pairs within a layer are told once, the
        lower expert first, and share is of the lower expert's tokens.
        """
        n_experts = self.together.shape[-1]
        experts = torch.arange(n_experts)
        frames = []
        for kind, layers, counts, share, lift, keep in (
            ("coactivation", self.layers, self.together, self.coactivation, self.coactivation_lift, True),
            ("transition", self.layers[:-1], self.onwards, self.transition, self.transition_lift, False),
        ):
            shown = (experts[:, None] < experts if keep else torch.ones(n_experts, n_experts, dtype=torch.bool)).expand(
                counts.shape
            )
            at, first, second = shown.nonzero().T
            frames.append(
                pd.DataFrame(
                    {
                        "kind": kind,
                        "layer": torch.tensor(layers, dtype=torch.long)[at].numpy(),
                        "expert": first.numpy(),
                        "other": second.numpy(),
                        "tokens": counts[shown].numpy(),
                        "share": share[shown].numpy(),
                        "lift": lift[shown].numpy(),
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)


class PairStats(Accumulator[PairResult]):
    """Counts all pairs of experts: within a layer, from a MoE layer to the next, and from a token to the next."""

    def __init__(self, layers: Sequence[int], n_experts: Positive, top_k: Positive):
        self.layers, self.n_experts, self.top_k = tuple(layers), n_experts, top_k
        self._together, self._onwards, self._sides, self._tokens = Total(), Total(), Total(), Total()
        self._neighbours, self._kept = BySource(), BySource()
        super().__init__(
            {"layers": self.layers, "n_experts": n_experts, "top_k": top_k},
            {
                "together": self._together,
                "onwards": self._onwards,
                "sides": self._sides,
                "tokens": self._tokens,
                "neighbours": self._neighbours,
                "kept": self._kept,
            },
        )

    def update(self, batch: RoutedBatch) -> Self:
        """Count a batch. Rows are texts of their own: no pair reaches from one into another.

        Raises:
            InputError: the layers, experts or the number of active experts are not those announced.
        """
        check_sizes(batch, self.layers, self.n_experts, self.top_k)
        mask = batch.mask
        if not bool(mask.any()):
            return self
        hot = batch.chosen.flatten(1, 2)
        self._tokens.add(mask.sum())
        self._together.add((hot.mT @ hot).long())
        self._onwards.add((hot[:-1].mT @ hot[1:]).long())
        pair = mask[:, :-1] & mask[:, 1:]
        before, after = batch.chosen[:, :, :-1], batch.chosen[:, :, 1:]  # 0 where not counted
        top = batch.routing.indices[..., 0]
        same = (top[:, :, :-1] == top[:, :, 1:]) & pair
        sides = torch.stack([self._side(before, top[:, :, :-1], pair), self._side(after, top[:, :, 1:], pair)])
        self._sides.add(sides)
        kept = torch.stack([(before * after).sum((2, 3)).long(), same.sum(2)], -1)  # [layer, batch, 2]
        rows = mask.any(-1)
        sources = [source for source, any_ in zip(batch.sources, rows.tolist(), strict=True) if any_]
        self._kept.add(kept.transpose(0, 1)[rows], sources)
        self._neighbours.add(pair.sum(-1)[rows], sources)
        return self

    def _side(self, hot: Tensor, top: Tensor, pair: Tensor) -> Int[Tensor, "layer 2 n_experts"]:
        first = torch.zeros(len(top), self.n_experts, dtype=torch.long, device=top.device)
        inside = top.flatten(1)
        first.scatter_add_(1, inside, pair.long().flatten().expand_as(inside))
        return torch.stack([(pair.to(hot.dtype)[:, None] @ hot).sum((1, 2)).long(), first], 1)

    def result(self) -> PairResult:
        """The counts so far."""
        if not self._tokens.seen:
            raise InputError("no tokens were counted; update with a batch that holds text first")
        left, right = self._sides.value
        return PairResult(
            layers=self.layers,
            top_k=self.top_k,
            n_tokens=int(self._tokens.value),
            together=self._together.value,
            onwards=self._onwards.value,
            sources=self._neighbours.sources,
            neighbours=self._neighbours.stacked(),
            kept=self._kept.stacked(),
            left=left,
            right=right,
        )
