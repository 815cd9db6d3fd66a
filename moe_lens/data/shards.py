"""Shards: the units in which a study reads a domain, saves its progress and shares the work among processes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from moe_lens.argument_checks import ModelWith
from moe_lens.checked import Natural, Positive, Seed
from moe_lens.data.corpus import Corpus, check_rank
from moe_lens.data.domains import Domain, Passage
from moe_lens.data.windows import Window, in_turns, up_to, windows_of
from moe_lens.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How texts are read; together with the texts it decides which tokens are counted."""

    tokens: Positive | None = 4096
    """Of text, per domain: windows are added until they hold at least so many. None: all there are."""
    context: Positive = 256
    """The greatest length of a window, BOS included; a shorter context of the model counts."""
    packed: bool = False
    """Whether windows are laid one after another in rows of `context` tokens. No attention reaches from one to another
    either way, so that results are the same up to rounding; it saves the padding of texts of very unlike lengths."""
    seed: Seed = 0
    """Of the choice of texts."""
    shard_tokens: Positive = 2**15
    """Tokens after which progress is saved."""

    def __post_init__(self) -> None:
        for name, least in (("tokens", 2), ("context", 3), ("shard_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; expected at least {least}")


@dataclass(frozen=True, eq=False)
class Shard:
    """Consecutive windows of a domain."""

    number: Natural
    """Among those of the domain that this process reads."""
    windows: tuple[Window, ...]
    short: Natural
    """Passages of fewer than two tokens, or of special ones alone, that were met and left out on the way."""


def shards(
    domain: Domain | Corpus,
    encoder: Annotated[Any, ModelWith("own_ids")],
    reading: Reading,
    *,
    rank: Natural = 0,
    world_size: Positive = 1,
    start: Natural = 0,
) -> Iterator[Shard]:
    """The shards of a domain that one process is to read.

    With a budget of tokens, every process goes through the same windows and takes every `world_size`-th shard of them,
    since only so is it known where the budget ends. Without one, a corpus is shared out passage by passage
    (`datasets.distributed`), and each process sees its own only. All tokens together are the same, however many
    processes there are.

    Args:
        domain: Texts in memory, of which sources take turns, or a corpus, which is read in its order (shuffled in a
            buffer where there is a budget).
        encoder: The model that they are tokenised for.
        reading: How.
        rank: Which process this is.
        world_size: How many there are.
        start: Leave out this many of the process's own shards.

    Raises:
        InputError: The domain holds no text of two tokens, or cannot be read, or there is no such process.
    """
    check_rank(rank, world_size)
    context = min(reading.context, int(encoder.cfg.n_ctx))
    shared = isinstance(domain, Corpus) and reading.tokens is None
    short = 0

    def leave_out(passage: Passage, length: int) -> None:  # noqa: ARG001
        nonlocal short
        short += 1

    def windows() -> Iterator[Window]:
        if isinstance(domain, Domain):
            yield from in_turns(domain, encoder, context, reading.seed, leave_out)
            return
        seed = None if reading.tokens is None else reading.seed
        place = {"rank": rank, "world_size": world_size} if shared else {}
        from moe_lens.model.loading.tokenizer import special_ids  # not before: it imports transformers

        special = special_ids(encoder.tokenizer)
        for number, passage in domain.passages(seed=seed, **place):
            yield from windows_of(number, passage, encoder, context, special, leave_out)

    found, before = 0, 0
    for number, group in enumerate(_groups(up_to(windows(), reading.tokens), reading.shard_tokens)):
        found += len(group)
        own, place = (number, rank) if shared else divmod(number, world_size)
        if own >= start and place == rank:
            yield Shard(own, group, short - before)
        before = short
    if not found and not shared:
        raise InputError(f"domain {domain.name!r} holds no text of two tokens or more")


def _groups(windows: Iterable[Window], size: int) -> Iterator[tuple[Window, ...]]:
    """Groups of so many tokens, each when the next window or the end was met: what lies between them was met, too."""
    group: list[Window] = []
    tokens = 0
    for window in windows:
        if tokens >= size:
            yield tuple(group)
            group, tokens = [], 0
        group.append(window)
        tokens += len(window.ids)
    if group:
        yield tuple(group)
