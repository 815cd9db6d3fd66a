"""Losses of several versions of a model on the same texts, by source."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.errors import InputError
from moe_lens.stats import Accumulator, LossResult, Result, bootstrap_all
from moe_lens.stats.sums import BySource

Variant = tuple[str, int | None, int]
"""What was done to the other experts, in which layer (None: in all), and how many experts were kept."""

WHOLE = "whole"
"""Nothing was done."""


@dataclass(frozen=True, eq=False)
class VariantLosses(Result):
    """Sums of next-token losses; a row is one window of text, a sample in the paper's words."""

    variants: tuple[Variant, ...]
    """The first one is the whole model."""
    sources: tuple[str, ...]
    nats: Float[Tensor, "source variant"]
    tokens: Int[Tensor, " source"]
    row_losses: Float[Tensor, "source variant"]
    """Sum over rows of the row's mean loss, in nats per token."""
    rows: Int[Tensor, " source"]

    def of(self, treatment: str, k: int, layer: int | None = None) -> LossResult:
        """One variant.

        Raises:
            InputError: It was not run.
        """
        if (treatment, layer, k) not in self.variants:
            raise InputError(f"there is no variant {(treatment, layer, k)}; there are {list(self.variants)}")
        at = self.variants.index((treatment, layer, k))
        return LossResult(self.sources, self.nats[:, at], self.tokens, self.row_losses[:, at], self.rows)

    def log_ratios(self) -> tuple[Float[Tensor, "source variant"], Float[Tensor, "source variant"]]:
        """Differences to the whole model, of the sums of nats and of the sums of rows' losses."""
        return self.nats - self.nats[:, :1], self.row_losses - self.row_losses[:, :1]

    def to_frame(self) -> pd.DataFrame:
        """One row per variant.

        Columns: treatment, layer (missing: all layers at once), k, loss (nats per token), perplexity, geometric
        (perplexity with every window counting the same, as the paper's authors average), ratio and geometric_ratio to
        the whole model, paired by source; perplexity and ratios with their 95 % intervals over sources
        (perplexity_low, perplexity_high, …); tokens, rows, sources.
        """
        nats, row_losses = self.log_ratios()
        tokens, rows = self.tokens.double(), self.rows.double()
        one = torch.ones(1, len(self.sources), dtype=torch.float64)
        columns: dict[str, Tensor] = {"loss": self.nats.sum(0) / tokens.sum()}
        columns["geometric"] = (self.row_losses.sum(0) / rows.sum()).exp()
        means = {
            "perplexity": (self.nats, tokens),
            "ratio": (nats, tokens),
            "geometric_ratio": (row_losses, rows),
        }
        for name, (sums, weights) in means.items():

            def mean(times: Tensor, sums: Tensor = sums, weights: Tensor = weights) -> Tensor:
                return ((times @ sums) / (times @ weights)[:, None]).exp()

            columns[name] = mean(one)[0]
            ends = bootstrap_all(mean, weights)
            low, high = (torch.full_like(columns[name], torch.nan),) * 2 if ends is None else ends
            columns |= {f"{name}_low": low, f"{name}_high": high}
        treatment, layer, k = zip(*self.variants, strict=True)
        return pd.DataFrame(
            {
                "treatment": treatment,
                "layer": pd.array(list(layer), dtype="Int64"),
                "k": k,
                **{name: value.numpy() for name, value in columns.items()},
                "tokens": int(self.tokens.sum()),
                "rows": int(self.rows.sum()),
                "sources": len(self.sources),
            }
        )


class VariantStats(Accumulator[VariantLosses]):
    """Sums losses of all variants per source."""

    def __init__(self, variants: Sequence[Variant]):
        self.variants = tuple(variants)
        self._sums, self._counts = BySource(), BySource()
        super().__init__({"variants": self.variants}, {"sums": self._sums, "counts": self._counts})

    @property
    def seen(self) -> bool:
        """Whether anything was counted."""
        return bool(self._counts.sources)

    def update(
        self,
        losses: Float[Tensor, "variant batch pos"],
        predicted: Bool[Tensor, "batch pos"],
        sources: Sequence[str],
    ) -> Self:
        """Count a batch.

        Args:
            losses: Nats of each token, in the order of the variants.
            predicted: The tokens to count.
            sources: Of each row.

        Raises:
            InputError: A loss that is to be counted is not finite.
        """
        rows = predicted.any(-1)
        nats = losses[:, rows].double().masked_fill(~predicted[rows], 0)
        if not nats.isfinite().all():
            raise InputError("a loss is not finite: the logits hold infinities where the true token is")
        tokens = predicted[rows].sum(-1)
        sums = nats.sum(-1)
        kept = [source for source, row in zip(sources, rows.tolist(), strict=True) if row]
        self._sums.add(torch.stack([sums, sums / tokens], -1).transpose(0, 1), kept)
        self._counts.add(torch.stack([tokens, torch.ones_like(tokens)], -1), kept)
        return self

    def result(self) -> VariantLosses:
        """The sums so far."""
        if not self._sums.sources:
            raise InputError("no token was predicted from another; are all texts a single token?")
        sums, counts = self._sums.stacked(), self._counts.stacked()
        return VariantLosses(self.variants, self._sums.sources, sums[..., 0], counts[:, 0], sums[..., 1], counts[:, 1])
