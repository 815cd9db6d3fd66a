"""Token batches: windows of text, one a row or packed, with what is counted and where each row comes from."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from moe_lens.argument_checks import ModelWith
from moe_lens.checked import Positive, Seed, checked
from moe_lens.data.domains import Domain
from moe_lens.data.packing import Packing, packed_rows
from moe_lens.data.windows import Window, in_turns, up_to
from moe_lens.errors import InputError, a_kind
from moe_lens.padding import pad
from moe_lens.reprs import Summary


@runtime_checkable
class Encoder(Protocol):
    """What is asked of a model to tokenise for it."""

    cfg: Any
    tokenizer: Any

    def own_ids(self, text: str, /) -> tuple[list[int], list[int]]:
        """A text as the tokenizer itself encodes it: the special tokens that it puts first, and the text's ids."""
        ...


@checked
@dataclass(frozen=True, eq=False)
class TokenBatch(Summary):
    """Windows of text, one a row, padded on the right."""

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    """True for real tokens, BOS among them: the model's attention mask."""
    counted: Bool[Tensor, "batch pos"]
    """True for text: neither padding nor special tokens. Statistics are taken here and nowhere else."""
    sources: tuple[str, ...]
    """Of each row."""
    windows: tuple[Window, ...] = ()
    """What the rows were made from, if they were made from windows."""
    packing: Packing | None = None
    """How rows are laid together in one row of the model's input; None: each by itself. All else here is by row."""

    def unpack(self, values: Shaped[Tensor, "rows columns *rest"]) -> Shaped[Tensor, "batch pos *rest"]:
        """What the model gave for what it read, by row of the batch."""
        return values if self.packing is None else self.packing.unpack(values)

    def pack(self, values: Shaped[Tensor, "batch pos *rest"]) -> Shaped[Tensor, "rows columns *rest"]:
        """Values by row of the batch, as the model reads it."""
        return values if self.packing is None else self.packing.pack(values, self.mask)


@checked
@dataclass(frozen=True)
class Tokens(Summary):
    """The batches of a domain; can be read any number of times."""

    domain: str
    batches: tuple[TokenBatch, ...]

    def __iter__(self) -> Iterator[TokenBatch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def _facts(self) -> dict[str, Any]:
        sizes = {"tokens": self.n_tokens, "batches": len(self), "windows": self.n_rows, "sources": len(self.sources)}
        return {"domain": self.domain, **sizes}

    @property
    def n_tokens(self) -> int:
        """How many tokens of text are counted."""
        return sum(int(batch.counted.sum()) for batch in self.batches)

    @property
    def n_rows(self) -> int:
        """How many windows of text there are."""
        return sum(len(batch.sources) for batch in self.batches)

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources that occur, sorted."""
        return tuple(sorted({source for batch in self.batches for source in batch.sources}))


@checked
def tokenize(
    domain: Domain,
    encoder: Annotated[Encoder, ModelWith("own_ids")],
    *,
    n_tokens: Positive,
    context: Positive,
    batch_tokens: Positive = 2048,
    seed: Seed = 0,
) -> Tokens:
    """Choose passages until there are `n_tokens` of text, and batch them.

    A passage longer than `context` is cut into windows, each opened by BOS if the tokenizer itself opens texts so.
    Sources take turns in a random order, a window each time, so that a small budget still sees as many sources as it
    can; within a source, passages come in a random order.

    Args:
        domain: The texts.
        encoder: The model that they are tokenised for.
        n_tokens: Windows are added until they hold at least so many tokens of text.
        context: The greatest length of a window, BOS included.
        batch_tokens: Rows × columns of a batch; one row that is longer stands alone.
        seed: Of the order.

    Raises:
        InputError: A text of fewer than two tokens came up, or one with tokens that the model does not have; the
            message names file and line.
    """
    if not isinstance(domain, Domain):
        raise InputError(f"the texts are {a_kind(domain)}; expected a domain: Domain.of(name, texts) makes one of them")
    windows = up_to(in_turns(domain, encoder, context, seed), n_tokens)
    return Tokens(domain.name, tuple(batch_windows(list(windows), encoder, batch_tokens=batch_tokens)))


@checked
def batch_windows(
    windows: Iterable[Window], encoder: Encoder, *, batch_tokens: Positive, packed: Positive | None = None
) -> Iterator[TokenBatch]:
    """Windows as batches, those of like length together so that there is little padding.

    Args:
        windows: At least one.
        encoder: The model that they were tokenised for.
        batch_tokens: Rows × columns of what the model reads at once; a longer window stands alone.
        packed: The length of the packed rows to lay the windows in, or None for one window a row.
    """
    from moe_lens.model.loading.tokenizer import special_ids  # not before: it imports transformers

    special = special_ids(encoder.tokenizer)
    ordered = sorted(windows, key=lambda window: len(window.ids))
    start = 0
    for end in range(1, len(ordered) + 1):
        if end < len(ordered):
            if packed is None:
                size = (end - start + 1) * len(ordered[end].ids)
            else:
                size = sum(len(window.ids) for window in ordered[start : end + 1])
            if size <= batch_tokens:
                continue
        yield _batch(ordered[start:end], special, packed)
        start = end


def _batch(rows: list[Window], special: set[int], packed: int | None) -> TokenBatch:
    tokens, mask = pad([row.ids for row in rows])
    width = tokens.shape[1]
    counted = mask & ~torch.isin(tokens, torch.tensor(sorted(special), dtype=torch.long))
    packing = None if packed is None else packed_rows(rows, max(packed, width), width)
    return TokenBatch(tokens, mask, counted, tuple(row.source for row in rows), tuple(rows), packing)
