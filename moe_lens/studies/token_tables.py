"""Tables with a row per token that a user gives: features, or labels. Which token is a row of?"""

from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd

from moe_lens.errors import InputError, UnfitError

KEYS = ("domain", "document", "position")
ABOUT = (*KEYS, "token", "counted", "source")
"""Columns that say which token a row is of, and are no features and no labels."""
EXACT = 2**53
"""Whole numbers below it are exact in float64."""


def token_rows(frame: pd.DataFrame, called: str) -> pd.DataFrame:
    """Columns document and position (and domain, token, if there) of the rows whose column counted is not false.

    Document, position and token are int64, whatever a join or a file made of them; the index counts rows of the table.

    Args:
        frame: A row per token.
        called: The table in messages: "the features".

    Raises:
        InputError: Two columns have one name, document or position is missing, counted holds no truth values, one of
            the others no whole numbers from 0, or two rows are of one token.
    """
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise InputError(f"{called}: two columns are called {twice!r}; expected each name once")
    if not set(KEYS[1:]) <= set(frame.columns):
        raise InputError(
            f"{called}: expected a row per token with columns document and position (domain, too, if there are "
            f"several); got {list(map(str, frame.columns))[:12]}"
        )
    rows: Any = frame.reset_index(drop=True)[[column for column in (*KEYS, "token") if column in frame.columns]]
    if "counted" in frame.columns:
        counted = frame["counted"]
        if counted.dtype.kind not in "biu" or counted.hasnans:
            raise InputError(f"{called}: the column counted holds {list(counted.head(3))}; expected true or false")
        rows = rows[counted.to_numpy(bool)]
    for column in rows.columns.drop("domain", errors="ignore"):
        rows = rows.assign(**{column: _whole(rows[column], f"{called}: the column {column}")})
    keys = [key for key in KEYS if key in rows.columns]
    again = rows[rows.duplicated(keys)]
    if len(again):
        first = plain(again.iloc[0], keys)
        lacks = "" if "domain" in keys else "; there is no column domain"
        raise InputError(f"{called}: several rows are of one token: {first}{lacks}")
    return rows


def _whole(values: Any, called: str) -> np.ndarray:
    """Numbers of any dtype as int64.

    Raises:
        InputError: One is missing, negative, or no whole number.
    """
    values = values.infer_objects()
    odd = values.isna()
    if values.dtype.kind in "iuf":
        numbers = values.to_numpy(np.float64, na_value=np.nan)
        odd |= (numbers % 1 != 0) | (numbers < 0) | (numbers >= EXACT)
    elif not odd.any():
        odd |= True
    if odd.any():
        first = plain({"odd": values[odd].iloc[0]}, ["odd"])["odd"]
        raise InputError(f"{called} holds {first!r:.40}; expected whole numbers from 0")
    return values.to_numpy(np.int64)


def needs_domain(frame: pd.DataFrame, called: str, domains: Collection[str]) -> None:
    """Refuse a table that does not say of which domain a row is, where there are several.

    Raises:
        InputError: It has no column domain.
    """
    if len(domains) > 1 and "domain" not in frame.columns:
        raise InputError(f"{called} lack a column domain; expected one, as there are several: {list(domains)}")


def check_tokens(called: str, given: Any, read: pd.DataFrame, keys: list[str]) -> None:
    """Refuse a table whose rows are of other tokens than those that were read.

    Args:
        called: The table in messages.
        given: The ids that it has in its column token.
        read: A row for each of these: `keys` and token.
        keys: Columns that say which token it is.

    Raises:
        UnfitError: Names the first that differs.
    """
    other = np.flatnonzero(given != read["token"].to_numpy())
    if len(other):
        row = read.iloc[int(other[0])]
        raise UnfitError(
            f"{called} are of other texts: they have token {int(given[other[0]])} at {plain(row, keys)}, and token "
            f"{int(row['token'])} was read there"
        )


def plain(row: Any, keys: list[str]) -> dict[str, Any]:
    """Some columns of a row, without numpy's names of kinds."""
    return {key: getattr(row[key], "item", lambda value=row[key]: value)() for key in keys}
