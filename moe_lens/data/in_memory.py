"""Texts that are at hand in Python: lists, frames, datasets, generators."""

import io
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from moe_lens.data.rows import Passage, passage, read_row
from moe_lens.errors import InputError, a_kind


def read_given(name: str, texts: Any, *, text: str, sources: str | Iterable[Any] | None) -> Iterator[Passage]:
    """The passages of texts as `Domain.of` takes them."""
    column = sources if isinstance(sources, str) else None
    _check_index(name, texts, {*([text] if sources is not None else [text, "source"]), column})
    rows = rows_of(name, texts)
    if sources is None or column is not None:
        for number, row in enumerate(rows):
            yield _passage(name, number, row, text, column)
        return
    if isinstance(sources, Mapping | bytes) or not isinstance(sources, Iterable):
        raise InputError(
            f"sources of domain {name!r} are {sources!r:.80}; expected a column's name, or one for each text"
        )
    if isinstance(sources, set | frozenset):
        raise InputError(f"sources of domain {name!r} are a set, which has no order; give a list, one for each text")
    given: tuple[Any, ...] = (texts, sources)
    places = [one.index for one in given if hasattr(one, "iloc")]
    if len(places) == 2 and not places[0].equals(places[1]):
        raise InputError(
            f"domain {name!r}: texts and sources are of pandas, and their indices differ: sources.loc[texts.index] "
            "puts them in the texts' order, sources.tolist() takes them as they stand"
        )
    nothing = object()
    for number, (row, source) in enumerate(zip_longest(rows, sources, fillvalue=nothing)):
        if row is nothing or source is nothing:
            fewer, more = ("texts", "sources") if row is nothing else ("sources", "texts")
            raise InputError(f"domain {name!r} has {number} {fewer}, and more {more}; give each text one source")
        found = _passage(name, number, row, text, None)
        yield passage(found.text, source, found.origin, name)


def rows_of(name: str, texts: Any) -> Iterable[Any]:
    """Texts or rows, one by one.

    Raises:
        InputError: They are one text, or of a kind that would be read as something else.
    """
    if isinstance(texts, io.IOBase):
        raise InputError(f"the texts of domain {name!r} are an open file; load_domain(name, path) reads files")
    if isinstance(texts, str | bytes | Path):
        raise InputError(
            f"the texts of domain {name!r} are one {type(texts).__name__} ({str(texts)!r:.60}); expected several: "
            "[text], or load_domain(name, path) for a file"
        )
    if isinstance(texts, set | frozenset):
        raise InputError(
            f"the texts of domain {name!r} are a set, whose order is another in every process; expected a list"
        )
    if isinstance(texts, Mapping):
        raise InputError(
            f"the texts of domain {name!r} are a dictionary with the keys {list(texts)[:10]}; expected a list, a "
            "frame or a dataset: give one of its values"
        )
    import pandas as pd

    if isinstance(texts, pd.DataFrame):
        if not texts.columns.is_unique:
            raise InputError(f"domain {name!r}: two columns of the frame have one name: {list(texts.columns)}")
        return texts.to_dict("records")
    if not isinstance(texts, Iterable) or getattr(texts, "ndim", 1) == 0:
        raise InputError(f"the texts of domain {name!r} are {a_kind(texts)}; expected a list, a frame or a dataset")
    return texts


def _check_index(name: str, texts: Any, wanted: set[str | None]) -> None:
    """Nothing, unless what is looked for in columns is the index of what pandas holds, where it would be passed over.

    Raises:
        InputError: It is; says how it becomes a column.
    """
    index = getattr(texts, "index", None)
    for found in getattr(index, "names", ()) if hasattr(texts, "iloc") else ():
        if found in wanted and found is not None and found not in getattr(texts, "columns", ()):
            raise InputError(
                f"domain {name!r}: {found!r} is the index of the texts, and no column: texts.reset_index() makes it one"
            )


def _passage(name: str, number: int, row: Any, text: str, column: str | None) -> Passage:
    origin = f"{name}[{number}]"
    if isinstance(row, Mapping):
        return read_row(row, origin, name, text=text, source=column)
    if column is not None and isinstance(row, str):
        raise InputError(
            f"sources={column!r} names a column, and the texts of {name!r} have none; give one for each text"
        )
    return read_row({"text": row}, origin, name)
