"""What each expert is worth to texts, by source: what experts may be picked by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.data import TokenBatch
from moe_lens.errors import InputError
from moe_lens.interventions import CleanRun, Loss, expert_attribution
from moe_lens.interventions.attribution_gradients import Slots
from moe_lens.interventions.attribution_knockout import Knockouts
from moe_lens.stats import Accumulator, Result
from moe_lens.stats.sums import BySource
from moe_lens.studies.forward_passes import input_device, predicted


@dataclass(frozen=True, eq=False)
class ScoreResult(Result):
    """Nats that each expert saves, measured or estimated."""

    layers: tuple[int, ...]
    sources: tuple[str, ...]
    predicted: Int[Tensor, " source"]
    saved: Float[Tensor, "source layer n_experts"]
    """Summed over predicted tokens."""

    def per_token(self, kept: Sequence[bool]) -> Float[Tensor, "layer n_experts"]:
        """Nats a token, over some of the sources."""
        rows = torch.tensor(list(kept))
        return self.saved[rows].sum(0) / self.predicted[rows].sum()

    def to_frame(self) -> pd.DataFrame:
        """A row per layer and expert: saved, nats a token."""
        mean = self.per_token([True] * len(self.sources))
        index = pd.MultiIndex.from_product([self.layers, range(mean.shape[1])], names=["layer", "expert"])
        return pd.DataFrame({"saved": mean.flatten().numpy()}, index=index).reset_index()


class ScoreStats(Accumulator[ScoreResult]):
    """Sums what experts save, by source."""

    def __init__(self, layers: Sequence[int], n_experts: int):
        self.layers = tuple(layers)
        self._saved, self._predicted = BySource(), BySource()
        about = {"layers": self.layers, "n_experts": n_experts}
        super().__init__(about, {"saved": self._saved, "predicted": self._predicted})

    def update(
        self, saved: Float[Tensor, "batch layer n_experts"], predicted: Int[Tensor, " batch"], sources: Sequence[str]
    ) -> Self:
        """Count texts: nats that each expert saves each of them, and how many tokens were predicted.

        Raises:
            InputError: One is not finite.
        """
        if not saved.isfinite().all():
            raise InputError("an attribution is not finite; the logits hold NaN or infinities")
        self._saved.add(saved, sources)
        self._predicted.add(predicted, sources)
        return self

    def result(self) -> ScoreResult:
        """The sums so far."""
        if not self._predicted.sources:
            raise InputError("no tokens were counted; is there any text?")
        return ScoreResult(self.layers, self._predicted.sources, self._predicted.stacked(), self._saved.stacked())


def scores_of(model: Any, batch: TokenBatch, by: str) -> tuple[Tensor, Tensor]:
    """Nats that each expert saves each text, and how many tokens were predicted."""
    device = input_device(model)
    tokens, mask = batch.tokens.to(device), batch.mask.to(device)
    if not predicted(batch).any():
        return torch.zeros(len(tokens), len(model.moe_layers), model.n_experts), torch.zeros(len(tokens)).long()
    metric = Loss(tokens, mask, batch.counted)
    reads = metric.reads(*tokens.shape).cpu()
    if by == "attribution":
        found = expert_attribution(model, tokens, metric, method="gradient", attention_mask=mask.long())
        return -found.values.sum(-1).double().cpu().movedim(-1, 0) * reads.sum(), reads.sum(-1)
    hooks = Slots.hooks(model.moe_layers, weights=False)
    run = CleanRun.of(model, tokens, keep=hooks, attention_mask=mask.long())
    slots = Slots.of(run.cache, model.moe_layers, None)
    every = mask[None, :, :, None] & slots.computed.to(mask.device)
    saved = -Knockouts(model, run, slots, every, "expert").by_item(metric, "free")
    return saved.movedim(-1, 0), reads.sum(-1)
