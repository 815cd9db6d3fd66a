"""What coalitions of experts are worth to texts: sums by source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.data import Reading, TokenBatch
from moe_lens.errors import InputError
from moe_lens.interventions import CleanRun, Loss
from moe_lens.interventions.coalitions import Removal, added_at
from moe_lens.model.loading.batch_sizes import BATCH_TOKENS, tokens_at_once
from moe_lens.stats import Accumulator, Result
from moe_lens.stats.sums import BySource
from moe_lens.studies.forecast import Load
from moe_lens.studies.forward_passes import input_device, predicted

FIRST = 4
"""Predicted tokens with which a window begins: where all begin alike, an expert that serves one of them seems to cost
all of the domain."""


@dataclass(frozen=True, eq=False)
class CoalitionEffects(Result):
    """Sums over the predicted tokens of one domain, when coalitions of every domain are taken out of the model.

    The coalitions that a source is read without were picked on the other half of the sources.
    """

    how: tuple[str, ...]
    """Ways of taking out."""
    kinds: tuple[str, ...]
    """Of each variant; see `matched_coalitions.KINDS`."""
    sources: tuple[str, ...]
    nats: Float[Tensor, " source"]
    """Loss of the whole model."""
    predicted: Int[Tensor, " source"]
    """Tokens."""
    added: Float[Tensor, "source how domain variant"]
    """Loss without the coalition − loss of the whole model, over the tokens that were read without it. Domains are
    those that the coalitions were picked for, in the order of the study."""
    tokens: Int[Tensor, "source how domain variant"]
    """Those tokens: all of them for the picked and the busiest experts, and for all coalitions of the own domain."""

    def of(self, how: str) -> tuple[Float[Tensor, "source domain variant"], Int[Tensor, "source domain variant"]]:
        """Sums and tokens of one way of taking out.

        Raises:
            InputError: It was not run.
        """
        if how not in self.how:
            raise InputError(f"experts were not taken out by {how!r}; expected one of {', '.join(self.how)}")
        at = self.how.index(how)
        return self.added[:, at], self.tokens[:, at]

    def to_frame(self) -> pd.DataFrame:
        """A row per way of taking out, domain (by number) that coalitions are for, and variant: added nats a token."""
        index = pd.MultiIndex.from_product(
            [self.how, range(self.added.shape[2]), range(len(self.kinds))], names=["how", "of_domain", "variant"]
        )
        tokens = self.tokens.sum(0).flatten()
        added = self.added.sum(0).flatten() / tokens
        frame = pd.DataFrame({"added": added.numpy(), "tokens": tokens.numpy()}, index=index).reset_index()
        return frame.assign(kind=[self.kinds[at] for at in frame["variant"]])


class CoalitionStats(Accumulator[CoalitionEffects]):
    """Sums what texts lose without coalitions, by source."""

    def __init__(self, how: Sequence[str], kinds: Sequence[str]):
        self.how, self.kinds = tuple(how), tuple(kinds)
        self._sums, self._counts = BySource(), BySource()
        about = {"how": self.how, "kinds": self.kinds}
        super().__init__(about, {"sums": self._sums, "counts": self._counts})

    def update(
        self,
        nats: Float[Tensor, " batch"],
        predicted: Int[Tensor, " batch"],
        added: Float[Tensor, "batch how domain variant"],
        read: Bool[Tensor, "batch how domain variant"],
        sources: Sequence[str],
    ) -> Self:
        """Count texts.

        Args:
            nats: Loss of the whole model, summed over each text's predicted tokens.
            predicted: How many there are.
            added: What is added to it without each coalition.
            read: Whether the text was read without it.
            sources: Of each text.
        """
        self._sums.add(torch.cat([nats.double()[:, None], added.double().flatten(1)], 1), sources)
        tokens = predicted[:, None] * read.flatten(1)
        self._counts.add(torch.cat([predicted[:, None], tokens], 1), sources)
        return self

    def result(self) -> CoalitionEffects:
        """The sums so far."""
        if not self._sums.sources:
            raise InputError("no token was predicted from another; are all texts a single token?")
        sums, counts = self._sums.stacked(), self._counts.stacked()
        shape = (len(self.how), -1, len(self.kinds))
        added, tokens = (value[:, 1:].unflatten(1, shape) for value in (sums, counts))
        return CoalitionEffects(self.how, self.kinds, self._sums.sources, sums[:, 0], counts[:, 0], added, tokens)


def load_without(model: Any, reading: Reading, coalitions: int) -> Load:
    """What `read_without` asks of a model: the clean run, and each text once more without each coalition."""
    tokens = reading.tokens or 0
    at_once = tokens_at_once(model, input_device(model))
    return Load.stacked(tokens, BATCH_TOKENS) + Load.stacked(tokens * coalitions, at_once)


def read_without(
    model: Any,
    batch: TokenBatch,
    members: Bool[Tensor, "2 domain variant layer n_experts"],
    half: Mapping[str, int],
    read: Bool[Tensor, "batch how domain variant"],
    how: Sequence[Removal],
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"], Float[Tensor, "batch how domain variant"]]:
    """What texts lose without coalitions: what `CoalitionStats` counts.

    Args:
        model: A `HookedMoE`.
        batch: The texts.
        members: The coalitions that sources of either half are read without, by the domain that they are for.
        half: Of each source.
        read: Which texts are read without which coalitions.
        how: Ways of taking out.

    Returns:
        Nats and predicted tokens of each text, and nats added without each coalition.
    """
    nats, count, added = read_parts(model, batch, members, half, read, how)
    return nats, count, added[0]


def read_parts(
    model: Any,
    batch: TokenBatch,
    members: Bool[Tensor, "2 domain variant layer n_experts"],
    half: Mapping[str, int],
    read: Bool[Tensor, "batch how domain variant"],
    how: Sequence[Removal],
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"], Float[Tensor, "2 batch how domain variant"]]:
    """As `read_without`: what is added at all predicted tokens, and at the first `FIRST` of each text."""
    device = input_device(model)
    tokens, mask = batch.tokens.to(device), batch.mask.to(device)
    if not predicted(batch).any():
        return torch.zeros(len(tokens)), torch.zeros(len(tokens)).long(), torch.zeros(2, *read.shape)
    metric, run = Loss(tokens, mask, batch.counted), CleanRun.of(model, tokens, attention_mask=mask.long())
    reads = metric.reads(*tokens.shape).to(run.logits.device)
    at = reads.nonzero().unbind(-1)
    nats = torch.zeros(reads.shape, dtype=torch.float64, device=reads.device)
    nats[at] = metric.values(run.logits[at], *at).double()
    halves = torch.tensor([half[source] for source in batch.sources])
    parts = torch.stack([reads, reads & (reads.cumsum(-1) <= FIRST)])
    added = torch.zeros(2, *read.shape, dtype=torch.float64)
    n_domains, n_variants = members.shape[1:3]
    for number, way in enumerate(how):
        row, of_domain, variant = read[:, number].nonzero().unbind(-1)
        coalition = (halves[row] * n_domains + of_domain) * n_variants + variant
        pairs = torch.stack([coalition, row], 1)
        found = added_at(model, run, metric, members.flatten(0, 2), pairs, way, parts)
        added[:, row, number, of_domain, variant] = found.T
    return nats.sum(-1).cpu(), reads.sum(-1).cpu(), added
