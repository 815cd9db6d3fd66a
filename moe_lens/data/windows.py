"""Windows: passages as token ids, cut to the context that a model is given."""

import hashlib
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any

from moe_lens.checked import Natural
from moe_lens.data.domains import Domain, Passage
from moe_lens.errors import InputError
from moe_lens.pieces import pieces


@dataclass(frozen=True)
class Window:
    """A piece of a passage that is read on its own."""

    ids: tuple[Natural, ...]
    """Opened by what the tokenizer itself puts before a text: BOS, if anything."""
    source: str
    """Of the passage."""
    document: Natural
    """Number of the passage in its domain, from 0."""
    start: Natural
    """Where the window's text begins, among the ids that the tokenizer gives for the passage without adding any."""
    counted: Natural
    """How many of its tokens are text: no special tokens."""
    opening: Natural = 0
    """How many of its first tokens open it, and are not counted as its text."""
    written: bool = False
    """Whether the text itself begins with these tokens, as a rendered chat template does, so that none were added."""
    text: Natural = 0
    """A digest of the whole passage's text, in 63 bits: by it equal texts are known."""


def too_short(passage: Passage, length: int) -> None:
    """Refuse a text of fewer than two tokens, or of special ones alone, of which `length` is 0."""
    tokens = "1 token" if length else "0 tokens, special ones not counted"
    raise InputError(f"{passage.origin}: a text of {tokens}; at least two are needed to predict one from another")


def windows_of(
    number: int,
    passage: Passage,
    encoder: Any,
    context: int,
    special: Set[int],
    short: Callable[[Passage, int], None] = too_short,
) -> Iterator[Window]:
    """The windows of a passage, in order: those that hold text, and not special tokens alone.

    Args:
        number: Of the passage in its domain.
        passage: The text.
        encoder: The model that it is tokenised for.
        context: The greatest length of a window, what opens it included.
        special: Tokens that are not counted as text: `special_ids` of the tokenizer.
        short: Called with a passage of fewer than two tokens and their number, or of special tokens alone and 0;
            raises if not given.

    Raises:
        InputError: The tokenizer gives tokens that the model does not have; names file and line. Or a window has no
            room for two tokens of text.
    """
    opening, text = encoder.own_ids(passage.text)
    if context - len(opening) < 2:
        raise InputError(
            f"a window of {context} tokens, {len(opening)} of which open it, has no room for two tokens of text; the "
            "window that is asked for or the model's own context is too short"
        )
    if len(text) < 2 or special >= set(text):
        short(passage, sum(token not in special for token in text))
        return
    if (unknown := max(*opening, *text)) >= encoder.cfg.d_vocab:
        raise InputError(
            f"{passage.origin}: the tokenizer gives token {unknown}, and the model has {encoder.cfg.d_vocab};"
            " is it the tokenizer of another model?"
        )
    from moe_lens.model.loading.tokenizer import opens_itself  # not before: it imports transformers

    written = bool(opening) and opens_itself(encoder.tokenizer, passage.text, opening)
    before = len(opening) if written else 0
    digest = int.from_bytes(hashlib.blake2b(passage.text.encode(), digest_size=8).digest()) >> 1
    for start, window in pieces(text, context, opening):
        own = window[len(opening) :]
        counted = sum(token not in special for token in own)
        if len(window) >= 2 and counted:  # nothing predicts a single left-over token, unless BOS does
            first = written and start == 0
            yield Window(tuple(window), passage.source, number, before + start, counted, len(opening), first, digest)


def in_turns(
    domain: Domain, encoder: Any, context: int, seed: int, short: Callable[[Passage, int], None] = too_short
) -> Iterator[Window]:
    """Windows of a domain that is held in memory: sources take turns in a random order, a window each time."""
    from moe_lens.model.loading.tokenizer import special_ids  # not before: it imports transformers

    special, shuffled = special_ids(encoder.tokenizer), random.Random(seed)
    by_source: dict[str, list[tuple[int, Passage]]] = defaultdict(list)
    for number, passage in enumerate(domain.passages):
        by_source[passage.source].append((number, passage))
    order = list(by_source)
    shuffled.shuffle(order)
    for passages in by_source.values():
        shuffled.shuffle(passages)

    def of_source(source: str) -> Iterator[Window]:
        for number, passage in by_source[source]:
            yield from windows_of(number, passage, encoder, context, special, short)

    waiting = deque((source, of_source(source)) for source in order)
    while waiting:
        source, windows = waiting.popleft()
        window = next(windows, None)
        if window is not None:
            yield window
            waiting.append((source, windows))


def up_to(windows: Iterable[Window], n_tokens: int | None) -> Iterator[Window]:
    """Windows until they hold at least so many tokens of text; all of them if it is None."""
    found = 0
    for window in windows:
        yield window
        found += window.counted
        if n_tokens is not None and found >= n_tokens:
            return
