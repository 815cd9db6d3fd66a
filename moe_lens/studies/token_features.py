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
from moe_lens.studies.token_tables import ABOUT, KEYS, check_tokens, needs_domain, plain, token_rows

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
    token_rows(frame, called)
    if not set(frame.columns) - set(ABOUT):
        raise InputError(f"{called}: expected features beside {list(map(str, frame.columns))}; there are none")
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
    needs_domain(frame, "the features", samples)
    rows: Any = token_rows(frame, "the features")
    keys = [key for key in KEYS if key in rows.columns]
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
            f"{plain(first, keys)}: read the same texts in the same way as for the table"
        )
    if "token" in rows.columns:
        check_tokens("the features", rows["token"].to_numpy()[place], wanted, keys)
    found: Any = frame.iloc[rows.index[place]]
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
