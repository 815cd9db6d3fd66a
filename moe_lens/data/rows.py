"""Rows: the text and the source that a row of a file, a table or a stream holds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moe_lens.errors import InputError, a_kind, check_characters, near_miss


@dataclass(frozen=True)
class Passage:
    """A text that is read on its own: no attention reaches from one passage to another."""

    text: str
    source: str
    """The document it was taken from. Passages of one source are dependent, so intervals resample sources."""
    origin: str
    """File and line, for messages."""


def read_row(
    row: Mapping[Any, Any],
    origin: str,
    file: str,
    *,
    text: str = "text",
    source: str | None = None,
    implied: bool = True,
    empty: bool = False,
) -> Passage:
    """A row of a dataset as a passage.

    Args:
        row: By column. Columns inside columns are named with dots: `meta.book`.
        origin: File and line, for messages.
        file: What counts as the source where the row's own is missing.
        text: The column with the text, or several joined by +, whose texts then follow one another.
        source: The column with the source. None: `source`, in rows that have it.
        implied: Whether it is so; otherwise None means that no column has the source.
        empty: Whether an empty text will do: it then counts among those that are too short to be read.

    Raises:
        InputError: There is no such text in it, no such column, or half of a character.
    """
    for what, column in (("text", text), ("source", source)):
        if not isinstance(column, str) and (column is not None or what == "text"):
            raise InputError(f"{what} is {column!r:.80}; expected the name of a column")
    found = []
    for column in [text] if text in row else text.split("+"):
        value = _find(row, column)
        if value is _NOTHING:
            raise InputError(f'{origin}: expected an object with "{column}", got {_keys(row, column)}')
        if not isinstance(value, str) or not (empty or value.strip()):
            came = "empty" if isinstance(value, str) else "missing" if is_missing(value) else type(value).__name__
            raise InputError(f'{origin}: "{column}" must be a text that is not empty, and is {came}')
        found.append(value)
    given = None
    if source is not None:
        given = _find(row, source)
        if given is _NOTHING:
            raise InputError(f'{origin}: there is no "{source}" that says the source; got {_keys(row, source)}')
    elif implied and (given := row.get("source")) is None and "source" not in row:
        _check_spelling(row, origin)
    return passage("\n".join(found), given, origin, file)


def passage(text: str, source: Any, origin: str, file: str) -> Passage:
    """A text and the source it is said to have, or else the file's.

    Raises:
        InputError: The source is no plain value, or one of the two holds half of a character.
    """
    if isinstance(source, Mapping | list | tuple | set) or getattr(source, "ndim", 0):
        raise InputError(f"{origin}: the source is {a_kind(source)}; expected a text or a number")
    if hasattr(source, "requires_grad") and source.ndim == 0:  # of a data set in torch's format; its str is rounded
        source = source.item()
    if isinstance(source, float) and source.is_integer():
        source = int(source)  # a column of whole numbers that lacks one is of floats
    of = str(file if is_missing(source) or source == "" else source)
    for what, value in (("text", text), ("source", of)):
        check_characters(f"{origin}: the {what}", value)
    return Passage(text, of, origin)


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing, in any of the ways that tables have for it."""
    if value is None or isinstance(value, str):
        return value is None
    import pandas as pd

    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


_NOTHING = object()


def _find(row: Mapping[Any, Any], column: str) -> Any:
    """The value of a column by its own name, or else of a column inside a column by a name with dots."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _NOTHING
        value = value[part]
    return value


def _check_spelling(row: Mapping[Any, Any], origin: str) -> None:
    """Without a source of their own, all rows of a file are one source, and no interval can be had.

    Raises:
        InputError: A column is `source` but for its capitals or spaces, as behind the commas of a .csv.
    """
    for column in row:
        if isinstance(column, str) and column.strip().lower() == "source":
            raise InputError(
                f'{origin}: the column "{column}" is not "source": rename it, or name it as the column of the source'
            )


def _keys(row: Mapping[Any, Any], wanted: str, limit: int = 20) -> str:
    """What there is instead, and which of it may have been meant."""
    names = sorted(_names(row))
    shown = f"keys {names[:limit]}" + (f" and {len(names) - limit} more" if len(names) > limit else "")
    return shown + near_miss(wanted, names)


def _names(row: Mapping[Any, Any]) -> Iterator[str]:
    for key, value in row.items():
        if isinstance(value, Mapping) and value:
            yield from (f"{key}.{name}" for name in _names(value))
        else:
            yield str(key)
