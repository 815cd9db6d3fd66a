"""What was read of a domain."""

import hashlib
from dataclasses import dataclass
from typing import Self

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from moe_lens.data import TokenBatch
from moe_lens.stats import Accumulator, Result
from moe_lens.stats.sums import BySource, Counts, Total


@dataclass(frozen=True, eq=False)
class Texts(Result):
    """Tokens and windows, by source."""

    sources: tuple[str, ...]
    tokens: Int[Tensor, " source"]
    """Of text, special tokens left out."""
    windows: Int[Tensor, " source"]
    left_out: int
    """Passages of fewer than two tokens, or of special ones alone."""
    repeated: int = 0
    """Texts that other sources have too, word for word: counted once in each source."""

    def facts(self) -> dict[str, int]:
        """The numbers of the whole domain."""
        return {
            "tokens": int(self.tokens.sum()),
            "windows": int(self.windows.sum()),
            "sources": len(self.sources),
            "left_out": self.left_out,
            **({"repeated": self.repeated} if self.repeated else {}),
        }

    def to_frame(self) -> pd.DataFrame:
        """One row per source."""
        return pd.DataFrame({"source": self.sources, "tokens": self.tokens.numpy(), "windows": self.windows.numpy()})


class TextStats(Accumulator[Texts]):
    """Counts tokens and windows by source, and the texts that several sources have."""

    def __init__(self) -> None:
        self._read, self._left_out = BySource(), Total()
        self._left_out.add(torch.zeros((), dtype=torch.long))
        self._texts = Counts()
        """By 47 bits of the text's digest and 16 of the source's: texts are told apart among millions, and of two
        sources of one text one in 65,536 is missed."""
        super().__init__({}, {"read": self._read, "left_out": self._left_out, "texts": self._texts})

    def update(self, batch: TokenBatch) -> Self:
        """Count a batch."""
        tokens = batch.counted.sum(-1)
        self._read.add(torch.stack([tokens, torch.ones_like(tokens)], -1), batch.sources)
        found = [window.text & ~_OF_SOURCE | _digest(window.source) & _OF_SOURCE for window in batch.windows]
        self._texts.add(torch.tensor(found, dtype=torch.long))
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
        by_text = (self._texts.compact()[0] >> 16).unique(return_counts=True)[1]
        repeated = int(by_text[by_text > 1].sum())
        return Texts(self._read.sources, read[:, 0], read[:, 1], int(self._left_out.value), repeated)


_OF_SOURCE = 2**16 - 1


def _digest(source: str) -> int:
    return int.from_bytes(hashlib.blake2b(source.encode(), digest_size=2).digest())
