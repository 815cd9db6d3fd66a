"""What a user knows of tokens (SAE activations, labels), from a table with a row per token."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from moe_lens.errors import InputError, UnfitError, a_kind
from moe_lens.json_files import check_file
from moe_lens.stats.held_out import Categories, Feature, Numbers
from moe_lens.stats.token_sample import TokenSampleResult

KEYS = ("domain", "document", "position")
ABOUT = (*KEYS, "token", "counted", "source")
"""Columns that say which token a row is of, and are no features."""
NUMBERS = "numbers"
"""The feature of all columns of numbers together."""
MOST = 4096
"""Columns of numbers that can be fitted at a time."""
LARGEST = 1e15
"""Numbers whose squares can be summed over all tokens in float32."""


@dataclass(frozen=True, eq=False)
class UserFeatures:
    """Features of the tokens of some samples, one sample after another."""

    features: Mapping[str, Feature]
    names: Mapping[str, tuple[str, ...]]
    """Of each feature what its categories, or its columns, are called."""


def read_features(path: str | Path) -> pd.DataFrame:
    """A table of tokens.

    Raises:
        InputError: It cannot be read, or lacks what says which token a row is of.
    """
    path = Path(path)
    kinds = {".parquet": pd.read_parquet, ".csv": pd.read_csv}
    if path.suffix not in kinds:
        raise InputError(f"{path}: expected a table of tokens, .parquet or .csv")
    try:
        check_file(path)
        frame = kinds[path.suffix](path)
        if path.suffix == ".csv":  # pandas gives the second column of a name another one
            frame.columns = list(pd.read_csv(path, header=None, nrows=1, dtype=str).iloc[0].fillna(""))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # pandas and pyarrow raise what they like  # noqa: BLE001
        raise InputError(f"{path}: is no table ({str(error).splitlines()[0]})") from None
    return check_features(frame, str(path))


def check_features(frame: pd.DataFrame, called: str = "the features") -> pd.DataFrame:
    """Refuse a table that does not say which token a row is of, or has no texts and numbers beside."""
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise InputError(f"{called}: two columns are called {twice!r}; expected each name once")
    missing = [key for key in KEYS[1:] if key not in frame.columns]
    if missing or not set(frame.columns) - set(ABOUT):
        raise InputError(
            f"{called}: expected a row per token with columns document and position, as `collect` has them (domain, "
            f"too, if there are several), and features beside them; got {list(map(str, frame.columns))[:12]}"
        )
    if "counted" in frame.columns and frame["counted"].dtype.kind not in "biu":
        some = list(frame["counted"].head(3))
        raise InputError(f"{called}: the column counted holds {some}; expected true or false")
    for column in set(frame.columns) - set(ABOUT):
        values = frame[column] if frame[column].dtype.kind == "O" else ()
        if odd := [value for value in values if isinstance(value, list | dict | np.ndarray)]:
            raise InputError(f"{called}: the feature {column!r} holds {a_kind(odd[0])}; expected texts or numbers")
    return frame


def user_features(frame: pd.DataFrame, samples: Mapping[str, TokenSampleResult]) -> UserFeatures:
    """The rows of a table that belong to the tokens of samples.

    Args:
        frame: With columns document and position (see `Collected`), domain if there are several, and features:
            columns of texts and of truth values are features by themselves, and all columns of numbers are one,
            `NUMBERS`. Rows whose column counted is false are not looked at.
        samples: Of each domain.

    Raises:
        InputError: A token has no row, or several, or one of another token; a value is missing; or there are too many
            columns of numbers.
    """
    check_features(frame)
    if len(samples) > 1 and "domain" not in frame.columns:
        raise InputError(f"the features lack a column domain; expected one, as there are several: {list(samples)}")
    rows: Any = frame[frame["counted"].astype(bool)] if "counted" in frame.columns else frame
    keys = [key for key in KEYS if key in rows.columns]
    if rows.duplicated(keys).any():
        again = rows[rows.duplicated(keys)].iloc[0]
        raise UnfitError(f"the features have several rows of one token: {_plain(again, keys)}")
    wanted: Any = pd.concat(
        [
            pd.DataFrame({"domain": name, **{key: of.column(key).numpy() for key in (*KEYS[1:], "token")}})
            for name, of in samples.items()
        ]
    )
    place = pd.MultiIndex.from_frame(rows[keys]).get_indexer(pd.MultiIndex.from_frame(wanted[keys]))
    if (place < 0).any():
        first = wanted.iloc[int(np.flatnonzero(place < 0)[0])]
        raise UnfitError(
            f"the features lack {int((place < 0).sum()):,} of {len(wanted):,} tokens that were read; for example "
            f"{_plain(first, keys)}: read the same texts in the same way as for the table"
        )
    found = rows.iloc[place]
    if "token" in found.columns and found["token"].dtype.kind in "iu":
        check_tokens("the features", found["token"].to_numpy(), wanted, keys)
    features: dict[str, Feature] = {}
    names: dict[str, tuple[str, ...]] = {}
    numbers = []
    for column in (column for column in found.columns if column not in ABOUT):
        values = found[column]
        if values.isna().any() or (values.dtype.kind == "f" and not np.isfinite(values.to_numpy()).all()):
            raise UnfitError(f"the feature {column!r} has values that are missing or not finite")
        if values.dtype.kind in "iuf" and float(values.abs().max()) > LARGEST:
            most = float(values.abs().max())
            raise UnfitError(f"the feature {column!r} reaches {most:.3g}; at most {LARGEST:.0e} can be fitted")
        if values.dtype.kind in "iuf":
            numbers.append(column)
            continue
        codes, kinds = pd.factorize(values, sort=True)
        features[str(column)] = Categories(torch.tensor(codes), len(kinds))
        names[str(column)] = tuple(map(str, kinds))
    if len(numbers) > MOST:
        raise UnfitError(f"the features have {len(numbers):,} columns of numbers; at most {MOST:,} can be fitted")
    if numbers:
        features[NUMBERS] = Numbers(torch.tensor(found[numbers].to_numpy(np.float32)))
        names[NUMBERS] = tuple(map(str, numbers))
    return UserFeatures(features, names)


def check_tokens(what: str, given: Any, read: pd.DataFrame, keys: list[str]) -> None:
    """Refuse a table whose rows are of other tokens than those that were read.

    Args:
        what: The table is called.
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
            f"{what} are of other texts: they have token {int(given[other[0]])} at {_plain(row, keys)}, and token "
            f"{int(row['token'])} was read there"
        )


def _plain(row: Any, keys: list[str]) -> dict[str, Any]:
    """Some columns of a row, without numpy's names of kinds."""
    return {key: getattr(row[key], "item", lambda value=row[key]: value)() for key in keys}
