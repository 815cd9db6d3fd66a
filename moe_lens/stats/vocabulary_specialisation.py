"""Which experts a token of the vocabulary is sent to (OLMoE, arXiv 2409.02060, "Vocabulary specialization")."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, Self, get_args

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from moe_lens.checked import Natural, Positive
from moe_lens.errors import InputError
from moe_lens.stats.accumulator import Accumulator, Result
from moe_lens.stats.routed_batch import RoutedBatch
from moe_lens.stats.routing_stats import check_sizes
from moe_lens.stats.sums import Counts, Total, summed

By = Literal["input", "next", "predicted"]

_PLACES = 2**24


@dataclass(frozen=True, eq=False)
class VocabularyResult(Result):
    """How often each token of the vocabulary was sent to each expert: only what occurred is kept."""

    by: By
    layers: tuple[Natural, ...]
    n_experts: Positive
    top_k: Positive
    d_vocab: Positive
    groups: Positive
    n_tokens: Natural
    keys: Int[Tensor, " cell"]
    """((group · d_vocab + token) · layers + layer's place) · n_experts + expert, ascending."""
    assigned: Int[Tensor, " cell"]
    """Tokens that chose the expert."""
    top1: Int[Tensor, " cell"]
    """Tokens that gave it the greatest weight."""

    def cells(self) -> tuple[Int[Tensor, " cell"], Int[Tensor, " cell"], Int[Tensor, " cell"], Int[Tensor, " cell"]]:
        """Group, token, place of the layer and expert of each cell."""
        rest, expert = self.keys // self.n_experts, self.keys % self.n_experts
        rest, layer = rest // len(self.layers), rest % len(self.layers)
        return rest // self.d_vocab, rest % self.d_vocab, layer, expert

    def table(self, layer: Natural) -> tuple[Int[Tensor, " token"], Int[Tensor, "2 token n_experts"]]:
        """The tokens that occur, ascending, and how often each expert of the layer was chosen, and chosen first.

        Raises:
            InputError: there is no such layer.
        """
        if layer not in self.layers:
            raise InputError(f"there are no counts of layer {layer}; there are some of layers {list(self.layers)}")
        _, token, place, expert = self.cells()
        here = place == self.layers.index(layer)
        tokens, row = token[here].unique(return_inverse=True)
        counts = torch.zeros(2, len(tokens), self.n_experts, dtype=torch.long)
        for i, values in enumerate((self.assigned, self.top1)):
            counts[i].view(-1).index_add_(0, row * self.n_experts + expert[here], values[here])
        return tokens, counts

    def to_frame(self, *, at_least: Positive = 1) -> pd.DataFrame:
        """A row per layer, token and expert that it was sent to.

        Columns: layer, token, expert, assigned, top1, tokens (N_x, how often the token occurred), specialisation
        N_{x,E} / N_x of the chosen experts (in [0, 1]; a token's sum to top_k) and specialisation_top1 of the first.

        Args:
            at_least: Leave out tokens that occurred less often: a token seen once is always specialised.
        """
        frames = []
        for layer in self.layers:
            tokens, counts = self.table(layer)
            occurred = counts[1].sum(-1)
            row, expert = ((counts[0] > 0) & (occurred >= at_least)[:, None]).nonzero().T
            frames.append(
                pd.DataFrame(
                    {
                        "layer": layer,
                        "token": tokens[row].numpy(),
                        "expert": expert.numpy(),
                        "assigned": counts[0][row, expert].numpy(),
                        "top1": counts[1][row, expert].numpy(),
                        "tokens": occurred[row].numpy(),
                    }
                )
            )
        frame = pd.concat(frames, ignore_index=True)
        return frame.assign(
            specialisation=frame["assigned"] / frame["tokens"], specialisation_top1=frame["top1"] / frame["tokens"]
        )

    def per_layer(self, *, at_least: Positive = 10) -> pd.DataFrame:
        """A row per layer: how far the token decides the expert. The summaries are ours, not the paper's.

        Columns: specialisation and specialisation_top1, each the specialisation of a token to its most frequent expert,
        mean over tokens that occurred `at_least` times, each counting as often as it occurred; information, I(E; X) of
        an assignment's expert and its token in nats; tokens and types, how many these are. All are too large where
        tokens are rare: set beside them what `uniform_routing` gives.
        """
        rows = []
        for layer in self.layers:
            _, counts = self.table(layer)
            kept = counts[:, counts[1].sum(-1) >= at_least].double()
            occurred = kept[1].sum(-1)
            best = (kept.amax(-1) / occurred * occurred / occurred.sum()).sum(-1)
            joint = kept[0] / kept[0].sum()
            terms = torch.special.entr(joint.sum(0)).sum() + torch.special.entr(joint.sum(1)).sum()
            rows.append(
                {
                    "layer": layer,
                    "specialisation": float(best[0]),
                    "specialisation_top1": float(best[1]),
                    "information": float(terms - torch.special.entr(joint).sum()),
                    "tokens": int(occurred.sum()),
                    "types": len(occurred),
                }
            )
        return pd.DataFrame(rows)


class VocabularyStats(Accumulator[VocabularyResult]):
    """Counts token × layer × expert: memory is bounded by the vocabulary and does not grow with the corpus beyond it.

    Args:
        layers: The model's layers with experts.
        n_experts: Routed experts of a layer.
        top_k: Experts active per token.
        d_vocab: Size of the vocabulary.
        by: The token that is read ("input"), that truly follows ("next": the last one of a row has none), or that the
            model holds most likely to follow ("predicted").
        groups: So many sources are counted apart, which is what `conditional_information` permutes; more are divided
            into so many groups by a hash of their names. Memory grows with it.
    """

    def __init__(
        self,
        layers: Sequence[int],
        n_experts: Positive,
        top_k: Positive,
        d_vocab: Positive,
        *,
        by: By = "input",
        groups: Positive = 1,
    ):
        if by not in get_args(By):
            raise InputError(f"by is {by!r}; expected one of {get_args(By)}")
        if groups < 1:
            raise InputError(f"groups is {groups}; expected at least 1")
        self.layers, self.n_experts, self.top_k = tuple(layers), n_experts, top_k
        self.d_vocab, self.groups = d_vocab, groups
        self.by: By = by
        self._places: dict[str, int] = {}
        self._assigned, self._top1, self._tokens = Counts(), Counts(), Total()
        super().__init__(
            {
                "layers": self.layers,
                "n_experts": n_experts,
                "top_k": top_k,
                "d_vocab": d_vocab,
                "by": by,
                "groups": groups,
            },
            {"assigned": self._assigned, "top1": self._top1, "tokens": self._tokens},
        )

    def update(self, batch: RoutedBatch) -> Self:
        """Count a batch.

        Raises:
            InputError: the batch does not know its tokens (or predicted tokens), has some that the vocabulary does not,
                or is of another model.
        """
        check_sizes(batch, self.layers, self.n_experts, self.top_k)
        tokens, mask = batch.require_tokens(), batch.mask
        if self.by == "predicted":
            if batch.predicted is None:
                raise InputError("this batch does not know the predicted tokens; observe(…, predicted=True) notes them")
            tokens = batch.predicted
        elif self.by == "next":
            real = torch.ones_like(mask) if batch.routing.mask is None else batch.routing.mask.to(mask.device)
            tokens = tokens.roll(-1, 1)
            mask = mask & real.roll(-1, 1)
            mask[:, -1] = False
        found = tokens[mask].long()
        if not len(found):
            return self
        if not 0 <= int(found.min()) <= int(found.max()) < self.d_vocab:
            low, high = int(found.min()), int(found.max())
            raise InputError(f"tokens from {low} to {high}; expected ids from 0 to {self.d_vocab - 1}")
        self._places |= {source: _place(source, self.groups) for source in batch.sources if source not in self._places}
        group = torch.tensor([self._places[source] for source in batch.sources])
        if len(self._places) > self.groups:
            group %= self.groups
        rows = group.to(mask.device)[mask.nonzero()[:, 0]] * self.d_vocab + found
        layer = torch.arange(len(self.layers), device=mask.device)[:, None]
        cell = (rows * len(self.layers) + layer)[..., None] * self.n_experts  # [layer, token, 1]
        chosen = batch.routing.indices[:, mask]
        self._assigned.add((cell + chosen).flatten())
        self._top1.add((cell + chosen[..., :1]).flatten())
        self._tokens.add(torch.tensor(len(found)))
        return self

    def result(self) -> VocabularyResult:
        """The counts so far."""
        if not self._tokens.seen:
            raise InputError("no tokens were counted; update with a batch that holds text first")
        (keys, assigned), (first, counts) = (self._grouped(*of.compact()) for of in (self._assigned, self._top1))
        top1 = torch.zeros_like(assigned)
        top1[torch.searchsorted(keys, first)] = counts  # whoever is first is chosen
        return VocabularyResult(
            by=self.by,
            layers=self.layers,
            n_experts=self.n_experts,
            top_k=self.top_k,
            d_vocab=self.d_vocab,
            groups=self.groups,
            n_tokens=int(self._tokens.value),
            keys=keys,
            assigned=assigned,
            top1=top1,
        )

    def _grouped(self, keys: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Counts by group: sources numbered from 0 where there are enough groups, else places folded onto them."""
        cells = self.d_vocab * len(self.layers) * self.n_experts
        places, at = (keys // cells).unique(return_inverse=True)
        group = at if len(places) <= self.groups <= int(places[0]) else places[at] % self.groups
        return summed([group * cells + keys % cells], [counts])


def _place(source: str, groups: int) -> int:
    """Of a source among so many that hardly any two share one; those below the number of groups are for groups."""
    number = int.from_bytes(blake2b(source.encode(), digest_size=8).digest(), "little")
    return groups + number % (_PLACES - groups)
