"""Token batches: a budget of tokens spread over the sources of a domain, each passage in a row of its own."""

import random
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.data.domains import Domain, Passage
from moe_lens.errors import InputError


@runtime_checkable
class Encoder(Protocol):
    """What is asked of a model to tokenise for it."""

    cfg: Any
    tokenizer: Any

    def to_tokens(self, text: str, /, *, truncate: bool) -> Int[Tensor, "1 pos"]:
        """The ids of a text, opened by BOS if the model has one."""
        ...


@dataclass(frozen=True)
class TokenBatch:
    """Windows of text, one a row, padded on the right."""

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    """True for real tokens, BOS among them: the model's attention mask."""
    counted: Bool[Tensor, "batch pos"]
    """True for text: neither padding nor special tokens. Statistics are taken here and nowhere else."""
    sources: tuple[str, ...]
    """Of each row."""


@dataclass(frozen=True)
class Tokens:
    """The batches of a domain; can be read any number of times."""

    domain: str
    batches: tuple[TokenBatch, ...]

    def __iter__(self) -> Iterator[TokenBatch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

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


def tokenize(
    domain: Domain, encoder: Encoder, *, n_tokens: int, context: int, batch_tokens: int = 2048, seed: int = 0
) -> Tokens:
    """Choose passages until there are `n_tokens` of text, and batch them.

    A passage longer than `context` is cut into windows, each opened by BOS if the model has one. Sources take turns in
    a random order, a window each time, so that a small budget still sees as many sources as it can; within a source,
    passages come in a random order.

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
    rows: list[tuple[list[int], str]] = []
    special = set(encoder.tokenizer.all_special_ids)
    found = 0
    for window, source in _in_turns(domain, encoder, context, seed):
        rows.append((window, source))
        found += sum(token not in special for token in window)
        if found >= n_tokens:
            break
    rows.sort(key=lambda row: len(row[0]))
    batches, start = [], 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or (end - start + 1) * len(rows[end][0]) > batch_tokens:
            batches.append(_batch(rows[start:end], special))
            start = end
    return Tokens(domain.name, tuple(batches))


def _in_turns(domain: Domain, encoder: Encoder, context: int, seed: int) -> Iterator[tuple[list[int], str]]:
    shuffled = random.Random(seed)
    by_source: dict[str, list[Passage]] = defaultdict(list)
    for passage in domain.passages:
        by_source[passage.source].append(passage)
    order = list(by_source)
    shuffled.shuffle(order)
    for passages in by_source.values():
        shuffled.shuffle(passages)
    waiting = deque((source, _windows(by_source[source], encoder, context)) for source in order)
    while waiting:
        source, windows = waiting.popleft()
        window = next(windows, None)
        if window is not None:
            yield window, source
            waiting.append((source, windows))


def _windows(passages: list[Passage], encoder: Encoder, context: int) -> Iterator[list[int]]:
    for passage in passages:
        ids = encoder.to_tokens(passage.text, truncate=False)[0].tolist()
        bos = encoder.tokenizer.bos_token_id
        opening = [bos] if bos is not None and ids[:1] == [bos] else []
        text = ids[len(opening) :]
        if len(text) < 2:
            raise InputError(
                f"{passage.origin}: a text of {len(text)} token; at least two are needed to predict one from another"
            )
        if (unknown := max(ids)) >= encoder.cfg.d_vocab:
            raise InputError(
                f"{passage.origin}: the tokenizer gives token {unknown}, and the model has {encoder.cfg.d_vocab};"
                " is it the tokenizer of another model?"
            )
        room = context - len(opening)
        for start in range(0, len(text), room):
            window = text[start : start + room]
            if len(window) >= 2:  # a single left-over token predicts nothing
                yield opening + window


def _batch(rows: list[tuple[list[int], str]], special: set[int]) -> TokenBatch:
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])  # any id will do: it is masked
    mask = torch.arange(width) < torch.tensor([len(ids) for ids, _ in rows])[:, None]
    counted = mask & ~torch.isin(tokens, torch.tensor(sorted(special), dtype=torch.long))
    return TokenBatch(tokens, mask, counted, tuple(source for _, source in rows))
