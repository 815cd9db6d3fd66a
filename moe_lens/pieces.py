"""Texts that are longer than what a model reads at a time, in pieces."""

from collections.abc import Iterator, Sequence


def pieces(ids: Sequence[int], context: int, opening: Sequence[int] = ()) -> Iterator[tuple[int, list[int]]]:
    """Where in `ids` each piece begins, and the piece: at most `context` ids, `opening` put before each.

    Args:
        ids: of a text, without what opens it.
        context: the greatest length of a piece, what opens it included.
        opening: what the tokenizer puts before a text, such as BOS.
    """
    room = max(1, context - len(opening))
    for start in range(0, len(ids), room):
        yield start, [*opening, *ids[start : start + room]]
