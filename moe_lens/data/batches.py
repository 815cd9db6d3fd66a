"""Token batches: a budget of tokens spread over the sources of a domain, each passage in a row of its own."""

import random
from collections import defaultdict
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

    tokenizer: Any

    def to_tokens(self, text: str, *, truncate: bool) -> Int[Tensor, "1 pos"]:
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

    Sources take turns in a random order, and within a source the passages do, so that a small budget still sees as many
    sources as it can. A passage longer than `context` is cut into windows, each opened by BOS if the model has one.

    Args:
        domain: The texts.
        encoder: The model that they are tokenised for.
        n_tokens: Windows are added until they hold at least so many tokens of text.
        context: The greatest length of a window, BOS included.
        batch_tokens: Rows × columns of a batch; one row that is longer stands alone.
        seed: Of the order.

    Raises:
        InputError: A text of fewer than two tokens came up; the message names file and line.
    """
    rows: list[tuple[list[int], str]] = []
    special = set(encoder.tokenizer.all_special_ids)
    found = 0
    for passage in _in_turns(domain, seed):
        if found >= n_tokens:
            break
        for window in _windows(passage, encoder, context):
            rows.append((window, passage.source))
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


def _in_turns(domain: Domain, seed: int) -> Iterator[Passage]:
    shuffled = random.Random(seed)
    by_source: dict[str, list[Passage]] = defaultdict(list)
    for passage in domain.passages:
        by_source[passage.source].append(passage)
    queues = list(by_source.values())
    shuffled.shuffle(queues)
    for queue in queues:
        shuffled.shuffle(queue)
    for turn in range(max(map(len, queues))):
        yield from (queue[turn] for queue in queues if turn < len(queue))


def _windows(passage: Passage, encoder: Encoder, context: int) -> Iterator[list[int]]:
    ids = encoder.to_tokens(passage.text, truncate=False)[0].tolist()
    bos = encoder.tokenizer.bos_token_id
    opening = [bos] if bos is not None and ids[:1] == [bos] else []
    text = ids[len(opening) :]
    if len(text) < 2:
        raise InputError(
            f"{passage.origin}: a text of {len(text)} token; at least two are needed to predict one from another"
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
