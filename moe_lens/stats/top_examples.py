"""The contexts in which an expert or a neuron is strongest, from a stream of any length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.checked import Natural, Positive
from moe_lens.errors import InputError
from moe_lens.stats.accumulator import Accumulator, Result
from moe_lens.stats.routed_batch import RoutedBatch
from moe_lens.stats.top_rows import TopRows


@dataclass(frozen=True, eq=False)
class TopExamplesResult(Result):
    """For each target its strongest contexts, strongest first."""

    before: Natural
    """How many tokens of context before the token; shorter at the start of a text."""
    target: Int[Tensor, " example"]
    score: Float[Tensor, " example"]
    tokens: Int[Tensor, "example context"]
    """The context: `before` tokens, the token itself, those after it; −1 where the text does not reach."""
    position: Int[Tensor, " example"]
    """Of the token in its row."""
    source: tuple[str, ...]
    shown: Float[Tensor, "example context"] | None = None
    """What was to be shown of each token of the context, such as the expert's weight there; NaN where there is none."""

    def of(self, target: Natural) -> "TopExamplesResult":
        """The examples of one target."""
        at = self.target == target
        rows = at.nonzero()[:, 0].tolist()
        source = tuple(self.source[row] for row in rows)
        shown = None if self.shown is None else self.shown[at]
        return TopExamplesResult(
            self.before, self.target[at], self.score[at], self.tokens[at], self.position[at], source, shown
        )

    def to_frame(self) -> pd.DataFrame:
        """A row per example: target, rank (from 0), score, token, before and after (lists of ids), position, source."""
        rank = torch.arange(len(self.target)) - torch.searchsorted(self.target, self.target)
        contexts = [[token for token in row if token >= 0] for row in self.tokens[:, : self.before].tolist()]
        following = [[token for token in row if token >= 0] for row in self.tokens[:, self.before + 1 :].tolist()]
        return pd.DataFrame(
            {
                "target": self.target.numpy(),
                "rank": rank.numpy(),
                "score": self.score.numpy(),
                "token": self.tokens[:, self.before].numpy(),
                "before": contexts,
                "after": following,
                "position": self.position.numpy(),
                "source": list(self.source),
            }
        )


class TopExamples(Accumulator[TopExamplesResult]):
    """Keeps the `n` strongest contexts of each target: an expert's routing weight, a neuron's activation, anything.

    Memory does not grow with the corpus. Of equal scores the same are kept in whatever order they come.

    Args:
        n_targets: How many experts, or neurons.
        n: How many contexts to keep for each.
        before: Tokens of context to keep before the token.
        after: Tokens to keep after it.
        shows: Whether `update` is also told what to show of each token of a context.
    """

    def __init__(
        self,
        n_targets: Positive,
        n: Positive = 10,
        *,
        before: Natural = 15,
        after: Natural = 5,
        shows: bool = False,
    ):
        self.n_targets, self.n, self.before, self.after = n_targets, n, before, after
        self.shows = shows
        width = before + after + 1
        self._best = TopRows(n, 1 + width * (1 + shows))
        about = {"n_targets": n_targets, "n": n, "before": before, "after": after, "shows": shows}
        super().__init__(about, {"best": self._best})

    def update(
        self,
        scores: Float[Tensor, "batch pos target"],
        tokens: Int[Tensor, "batch pos"],
        counted: Bool[Tensor, "batch pos"],
        sources: Sequence[str],
        *,
        mask: Bool[Tensor, "batch pos"] | None = None,
        shown: Float[Tensor, "batch pos target"] | None = None,
    ) -> Self:
        """Look at a batch.

        Args:
            scores: Of every target at every token; −∞ or NaN where a target was not active.
            tokens: Ids.
            counted: The tokens that may be kept as examples.
            sources: Of each row.
            mask: The tokens that may stand in a context: all but padding. If not given, the counted ones.
            shown: What to show of every target at every token, kept in float32; just where `shows` was said.

        Raises:
            InputError: another number of targets than announced.
        """
        if scores.shape[-1] != self.n_targets:
            raise InputError(f"scores of {scores.shape[-1]} targets; expected {self.n_targets}")
        if (shown is not None) != self.shows:
            raise InputError(f"shows is {self.shows}, and this update is {'not ' * self.shows}told what to show")
        real = (counted if mask is None else mask).cpu()
        known = (
            scores.double()
            .masked_fill(~counted.to(scores.device)[..., None], -torch.inf)
            .nan_to_num(nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf)
        )
        flat = known.flatten(0, 1)
        if not len(flat):
            return self
        # No more than n of this batch can be kept, and none below those kept already; equal ones go on.
        least = flat.topk(min(self.n, len(flat)), dim=0).values[-1].cpu()
        least = torch.maximum(least, self._best.threshold(self.n_targets)).to(flat.device)
        place, target = ((flat >= least) & (flat > -torch.inf)).nonzero().T
        score = flat[place, target]
        row, position = (place // tokens.shape[1]).cpu(), (place % tokens.shape[1]).cpu()
        around = position[:, None] + torch.arange(-self.before, self.after + 1)
        inside = (around >= 0) & (around < tokens.shape[1])
        around = around.clamp(0, tokens.shape[1] - 1)
        inside &= real[row[:, None], around]
        inside[:, self.before] = True
        context = tokens.cpu()[row[:, None], around].long().masked_fill(~inside, -1)
        content = torch.cat([context, position[:, None]], 1)
        if shown is not None:
            values = shown.cpu()[row[:, None], around, target.cpu()[:, None]].float().masked_fill(~inside, torch.nan)
            content = torch.cat([content, values.view(torch.int32).long()], 1)
        self._best.add(target, score, content, [str(sources[i]) for i in row.tolist()])
        return self

    def update_routing(self, batch: RoutedBatch, layer: Natural) -> Self:
        """Look at a layer's routing: targets are its experts, and scores their routing weights.

        Raises:
            InputError: the batch does not know its tokens or the layer, or has another number of experts.
        """
        routing = batch.routing.layer(layer)
        scores = torch.full((*batch.mask.shape, routing.n_experts), -torch.inf, device=routing.weights.device)
        scores.scatter_(-1, routing.indices, routing.weights.float())
        return self.update(scores, batch.require_tokens(), batch.mask, batch.sources, mask=batch.routing.mask)

    def result(self) -> TopExamplesResult:
        """The contexts so far."""
        if not len(self._best.target):
            raise InputError("no tokens were counted; update with a batch that holds text first")
        best, width = self._best, self.before + self.after + 1
        return TopExamplesResult(
            before=self.before,
            target=best.target,
            score=best.score,
            tokens=best.content[:, :width],
            position=best.content[:, width],
            source=best.names(),
            shown=best.content[:, width + 1 :].int().view(torch.float32) if self.shows else None,
        )
