"""What was read of a domain."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Self

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from moe_lens.data import Corpus, Domain, TokenBatch
from moe_lens.stats import Accumulator, Result
from moe_lens.stats.sums import BySource, Total


@dataclass(frozen=True, eq=False)
class Texts(Result):
    """Tokens and windows, by source."""

    sources: tuple[str, ...]
    tokens: Int[Tensor, " source"]
    """Of text, special tokens left out."""
    windows: Int[Tensor, " source"]
    left_out: int
    """Passages of fewer than two tokens, or of special ones alone."""

    def facts(self) -> dict[str, int]:
        """The numbers of the whole domain."""
        return {
            "tokens": int(self.tokens.sum()),
            "windows": int(self.windows.sum()),
            "sources": len(self.sources),
            "left_out": self.left_out,
        }

    def to_frame(self) -> pd.DataFrame:
        """One row per source."""
        return pd.DataFrame({"source": self.sources, "tokens": self.tokens.numpy(), "windows": self.windows.numpy()})


def repeated(domain: Domain | Corpus) -> dict[str, int]:
    """How many texts of a domain other sources have too, word for word; nothing where none, or it is not in memory."""
    if not isinstance(domain, Domain):
        return {}
    sources: defaultdict[str, set[str]] = defaultdict(set)
    for passage in domain.passages:
        sources[passage.text].add(passage.source)
    n = sum(len(sources[passage.text]) > 1 for passage in domain.passages)
    return {"repeated": n} if n else {}


class TextStats(Accumulator[Texts]):
    """Counts tokens and windows by source."""

    def __init__(self) -> None:
        self._read, self._left_out = BySource(), Total()
        self._left_out.add(torch.zeros((), dtype=torch.long))
        super().__init__({}, {"read": self._read, "left_out": self._left_out})

    def update(self, batch: TokenBatch) -> Self:
        """Count a batch."""
        tokens = batch.counted.sum(-1)
        self._read.add(torch.stack([tokens, torch.ones_like(tokens)], -1), batch.sources)
        return self

    def leave_out(self, passages: int) -> Self:
        """Count passages that were left out."""
        self._left_out.add(torch.tensor(passages))
        return self

    def result(self) -> Texts:
        """The counts so far."""
        if not self._read.sources:
            none = torch.zeros(0, dtype=torch.long)
            return Texts((), none, none, int(self._left_out.value))
        read = self._read.stacked()
        return Texts(self._read.sources, read[:, 0], read[:, 1], int(self._left_out.value))
