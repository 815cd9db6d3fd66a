"""A random sample of tokens, each with the experts that it chose and where it stands."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.checked import Natural, Positive
from moe_lens.errors import InputError
from moe_lens.stats.accumulator import Accumulator, Result
from moe_lens.stats.routed_batch import RoutedBatch
from moe_lens.stats.routing_stats import check_sizes
from moe_lens.stats.top_rows import TopRows, name_key, row_keys

ABOUT = ("token", "previous", "document", "position", "place")
NOTHING = -1
"""What stands before the first token of a text that nothing opens."""


@dataclass(frozen=True, eq=False)
class TokenSampleResult(Result):
    """A random sample of counted tokens."""

    layers: tuple[Natural, ...]
    n_experts: Positive
    source: tuple[str, ...]
    about: Int[Tensor, "token 5"]
    """Columns `ABOUT`: ids of the token and of the one before it (−1: none), number of the passage in its domain,
    position in the passage, place in the window that the model read."""
    chosen: Int[Tensor, "token layer top_k"]
    """The experts of each."""

    def column(self, name: str) -> Int[Tensor, " token"]:
        """One of the columns `ABOUT`."""
        return self.about[:, ABOUT.index(name)]

    def hot(self, layers: slice) -> Float[Tensor, "token expert"]:
        """1 where a token chose an expert, else 0: the experts of some layers, one layer after another."""
        some = self.chosen[:, layers]
        hot = torch.zeros(*some.shape[:2], self.n_experts).scatter_(-1, some, 1.0)
        return hot.flatten(1)

    def to_frame(self) -> pd.DataFrame:
        """A row per token: source, `ABOUT`."""
        return pd.DataFrame({name: self.column(name).numpy() for name in ABOUT}).assign(source=list(self.source))


class TokenSample(Accumulator[TokenSampleResult]):
    """Keeps a random sample of counted tokens.

    Which ones are kept is decided by where they stand: it is random, and the same whatever the order they come in.

    Args:
        layers: The model's layers with experts.
        n_experts: Routed experts of a layer.
        top_k: Experts active per token.
        n: How many tokens to keep.
    """

    def __init__(self, layers: Sequence[int], n_experts: Positive, top_k: Positive, *, n: Positive = 2**13):
        self.layers, self.n_experts, self.top_k, self.n = tuple(layers), n_experts, top_k, n
        self._kept = TopRows(n, len(ABOUT) + len(self.layers) * top_k)
        about = {"layers": self.layers, "n_experts": n_experts, "top_k": top_k, "n": n}
        super().__init__(about, {"kept": self._kept})

    def update(
        self,
        batch: RoutedBatch,
        document: Int[Tensor, "batch pos"],
        position: Int[Tensor, "batch pos"],
        place: Int[Tensor, "batch pos"],
    ) -> Self:
        """Look at a batch.

        Args:
            batch: Tokens and their routing.
            document: Number of the passage of each token.
            position: Of the token in its passage.
            place: Of the token in the window that was read.

        Raises:
            InputError: the batch does not know its tokens, or is of another model.
        """
        check_sizes(batch, self.layers, self.n_experts, self.top_k)
        tokens, mask = batch.require_tokens().cpu(), batch.mask.cpu()
        previous = torch.full_like(tokens, NOTHING)
        previous[:, 1:] = tokens[:, :-1]
        about = torch.stack([tokens, previous, document, position, place], -1)[mask]
        chosen = batch.routing.indices.cpu().movedim(0, 2)[mask].flatten(1)
        sources = [source for source, n in zip(batch.sources, mask.sum(1).tolist(), strict=True) for _ in range(n)]
        if sources:
            keys = {source: name_key(source) for source in set(sources)}
            key = torch.tensor([keys[source] for source in sources])
            random = row_keys(torch.cat([about, key[:, None]], 1)).double()
            self._kept.add(torch.zeros(len(sources), dtype=torch.long), random, torch.cat([about, chosen], 1), sources)
        return self

    def result(self) -> TokenSampleResult:
        """The sample so far."""
        kept = self._kept
        if not len(kept.target):
            raise InputError("no tokens were counted; is there any text?")
        about, chosen = kept.content[:, : len(ABOUT)], kept.content[:, len(ABOUT) :]
        return TokenSampleResult(
            self.layers, self.n_experts, kept.names(), about, chosen.reshape(len(chosen), len(self.layers), -1)
        )
