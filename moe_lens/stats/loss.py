"""Loss and perplexity, by source."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.errors import InputError, several
from moe_lens.resampling import Interval, bootstrap
from moe_lens.stats.accumulator import Accumulator, Result
from moe_lens.stats.sums import BySource


@dataclass(frozen=True, eq=False)
class LossResult(Result):
    """Sums of next-token losses, by source; a row is one window of text, a sample in the paper's words."""

    sources: tuple[str, ...]
    nats: Float[Tensor, " source"]
    tokens: Int[Tensor, " source"]
    row_losses: Float[Tensor, " source"]
    """Sum over rows of the row's mean loss, in nats per token."""
    rows: Int[Tensor, " source"]

    @property
    def n_tokens(self) -> int:
        """Predicted tokens."""
        return int(self.tokens.sum())

    @property
    def loss(self) -> float:
        """Mean nats per token, every token counting the same."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """Exponential of the mean nats per token."""
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())

    @property
    def geometric_perplexity(self) -> float:
        """Geometric mean of the rows' perplexities: every row counts the same, as the paper's authors average."""
        return float((self.row_losses.sum() / self.rows.sum()).exp())

    def ratio(self, reference: "LossResult") -> float:
        """Perplexity divided by that of the reference."""
        return self.perplexity / self._paired(reference).perplexity

    def ratio_interval(self, reference: "LossResult") -> Interval | None:
        """95 % interval of `ratio`, paired: both sides are resampled with the same sources."""
        difference = self.nats - self._paired(reference).nats
        tokens = self.tokens.double()
        return bootstrap(lambda times: ((times @ difference) / (times @ tokens)).exp(), tokens)

    def interval(self) -> Interval | None:
        """95 % interval of the perplexity, resampling sources."""
        tokens = self.tokens.double()
        return bootstrap(lambda times: ((times @ self.nats) / (times @ tokens)).exp(), tokens)

    def to_frame(self) -> pd.DataFrame:
        """One row per source: nats and tokens (sums), rows, and row_losses (sum of the rows' mean losses)."""
        columns = {"nats": self.nats, "tokens": self.tokens, "rows": self.rows, "row_losses": self.row_losses}
        return pd.DataFrame({"source": self.sources, **{name: value.numpy() for name, value in columns.items()}})

    def _paired(self, reference: "LossResult") -> "LossResult":
        if self.sources != reference.sources or not torch.equal(self.tokens, reference.tokens):
            raise InputError("two losses can be compared only on the same tokens of the same sources")
        return reference


class LossStats(Accumulator[LossResult]):
    """Sums losses per source."""

    def __init__(self) -> None:
        self._sums, self._counts = BySource(), BySource()
        super().__init__({}, {"sums": self._sums, "counts": self._counts})

    def update(
        self, losses: Float[Tensor, "batch pos"], counted: Bool[Tensor, "batch pos"], sources: Sequence[str]
    ) -> Self:
        """Count a batch.

        Args:
            losses: Nats of each predicted token.
            counted: The tokens to count.
            sources: Of each row.

        Raises:
            InputError: A counted loss is not finite.
        """
        sources = several(sources, "sources")
        nats = losses.double().masked_fill(~counted, 0)
        if not nats.isfinite().all():
            raise InputError("a loss is not finite: the logits hold NaN, or infinities where the true token is")
        tokens = counted.sum(-1)
        sums, filled = nats.sum(-1), tokens > 0
        self._sums.add(torch.stack([sums, sums / tokens.clamp(min=1)], -1)[filled], _take(sources, filled))
        self._counts.add(torch.stack([tokens, torch.ones_like(tokens)], -1)[filled], _take(sources, filled))
        return self

    def result(self) -> LossResult:
        """The sums so far."""
        if not self._sums.sources:
            raise InputError("no tokens were counted; update with a batch that holds text first")
        sums, counts = self._sums.stacked(), self._counts.stacked()
        return LossResult(self._sums.sources, sums[:, 0], counts[:, 0], sums[:, 1], counts[:, 1])


def _take(sources: Sequence[str], keep: Bool[Tensor, " batch"]) -> list[str]:
    return [source for source, kept in zip(sources, keep.tolist(), strict=True) if kept]
