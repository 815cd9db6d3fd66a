"""Token rows from whatever a user has: texts, token tensors, or batches with a mask, read once and never kept."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.errors import InputError, a_kind, not_files, several
from moe_lens.padding import pad
from moe_lens.pieces import pieces
from moe_lens.protocols import PaddedTokens

BUFFER = 1024
"""Rows among which the order is shuffled."""


Texts = Iterable[Any]
"""What is accepted as a corpus: items that are texts, token ids [pos] or [batch, pos], or batches with a mask."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of tokens, padded on the right."""

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    """True at real tokens."""


def rows(model: Any, texts: Texts, context: int | None = None) -> Iterator[list[int]]:
    """Rows of at most `context` token ids (default: the model's), in order; empty ones are left out.

    A longer text is cut into windows, each opened by BOS if the tokenizer opens texts so; rows of token ids are cut as
    they are.

    Raises:
        InputError: An item is neither text nor tokens, or holds a token that the model does not have.
    """
    texts = several(texts, "texts")
    if isinstance(texts, Sequence):  # what can only be read once is not looked at
        not_files(texts[:BUFFER], "the texts", "load_domain(name, path) reads one")
    length = int(context or model.cfg.n_ctx)
    for item in texts:
        yield from (row for row in of_item(model, item, length) if row)


def of_item(model: Any, item: Any, length: int) -> Iterator[list[int]]:
    """The rows of one item of a corpus."""
    if isinstance(item, str):
        opening, ids = model.own_ids(item)
        yield from _cut(model, ids, length, opening)
    elif isinstance(item, PaddedTokens):
        for row, real in zip(item.tokens, item.mask, strict=True):
            yield from _cut(model, row[real.to(row.device)].tolist(), length, [])
    else:
        try:
            tokens = torch.as_tensor(item)
        except (TypeError, ValueError, RuntimeError):
            tokens = torch.tensor(torch.nan)  # no tokens: refused below
        if tokens.numel() == 0 and tokens.ndim in (1, 2):  # of no dtype that says anything: [] is floating-point
            return
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool or tokens.ndim not in (1, 2):
            raise InputError(
                f"a corpus holds {a_kind(item)}; expected texts, token ids [pos] or [batch, pos], or batches "
                "with `tokens` and `mask`"
            )
        for row in (tokens if tokens.ndim == 2 else tokens[None]).tolist():
            yield from _cut(model, row, length, [])


def _cut(model: Any, ids: list[int], length: int, opening: list[int]) -> Iterator[list[int]]:
    if ids and not 0 <= min(ids) <= max(ids) < model.cfg.d_vocab:
        raise InputError(
            f"a corpus holds tokens from {min(ids)} to {max(ids)}, and the model has 0 to {model.cfg.d_vocab - 1}; are "
            "they of another model's tokenizer?"
        )
    for _, piece in pieces(ids, length, opening):
        yield piece


def endless(model: Any, texts: Texts, context: int, skip: int = 0) -> Iterator[list[int]]:
    """The rows of a corpus but those of its first `skip` items, over and over; empty ones are left out.

    Raises:
        InputError: It has ended and cannot be read again, or holds nothing.
    """
    first = True
    while True:
        found = False
        for number, item in enumerate(texts):
            for row in of_item(model, item, context) if number >= skip else ():
                if row:
                    found = True
                    yield row
        if not found:
            raise InputError(
                "the corpus holds nothing to train on"
                if first
                else "the corpus has been read to its end and cannot be read again: pass a list, or a data set that "
                "can be iterated more than once, or ask for fewer steps"
            )
        first = False


def shuffled(stream: Iterator[list[int]], seed: int, size: int = BUFFER) -> Iterator[list[int]]:
    """The rows in an order that is random within a buffer; the same for the same seed."""
    choice = random.Random(seed)
    held: list[list[int]] = []
    for row in stream:
        held.append(row)
        if len(held) == size:
            at = choice.randrange(size)
            held[at], held[-1] = held[-1], held[at]
            yield held.pop()
    choice.shuffle(held)
    yield from held


def row_batches(stream: Iterator[list[int]], size: int) -> Iterator[Rows]:
    """Batches of `size` rows; the last may be smaller."""
    part: list[list[int]] = []
    for row in stream:
        part.append(row)
        if len(part) == size:
            yield padded(part)
            part = []
    if part:
        yield padded(part)


def padded(part: Sequence[Sequence[int]]) -> Rows:
    """Rows of different lengths as one batch."""
    return Rows(*pad(part))
