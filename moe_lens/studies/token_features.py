"""What a user knows of tokens (SAE activations, labels), from a table with a row per token."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from moe_lens.errors import InputError
from moe_lens.stats.held_out import Categories, Feature, Numbers
from moe_lens.stats.token_sample import TokenSampleResult

KEYS = ("domain", "document", "position")
ABOUT = (*KEYS, "token", "counted", "source")
"""Columns that say which token a row is of, and are no features."""
NUMBERS = "numbers"
"""The feature of all columns of numbers together."""
MOST = 4096
"""Columns of numbers that can be fitted at a time."""


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
        frame = kinds[path.suffix](path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # pandas and pyarrow raise what they like  # noqa: BLE001
        raise InputError(f"{path}: is no table ({str(error).splitlines()[0]})") from None
    return check_features(frame, str(path))


def check_features(frame: pd.DataFrame, called: str = "the features") -> pd.DataFrame:
    """Refuse a table that does not say which token a row is of, or says nothing else."""
    missing = [key for key in KEYS[1:] if key not in frame.columns]
    if missing or not set(frame.columns) - set(ABOUT):
        raise InputError(
            f"{called}: expected a row per token with columns document and position, as `collect` has them (domain, "
            f"too, if there are several), and features beside them; got {list(map(str, frame.columns))[:12]}"
        )
    return frame


def user_features(frame: pd.DataFrame, samples: Mapping[str, TokenSampleResult]) -> UserFeatures:
    """The rows of a table that belong to the tokens of samples.

    Args:
        frame: With columns document and position (see `Collected`), domain if there are several, and features:
            columns of texts and of truth values are features by themselves, and all columns of numbers are one,
            `NUMBERS`. Rows whose column counted is false are not looked at.
        samples: Of each domain.

    Raises:
        InputError: A token has no row, or several; a value is missing; or there are too many columns of numbers.
    """
    check_features(frame)
    if len(samples) > 1 and "domain" not in frame.columns:
        raise InputError(f"the features lack a column domain; expected one, as there are several: {list(samples)}")
    rows: Any = frame[frame["counted"].astype(bool)] if "counted" in frame.columns else frame
    keys = [key for key in KEYS if key in rows.columns]
    if rows.duplicated(keys).any():
        again = rows[rows.duplicated(keys)].iloc[0]
        raise InputError(f"the features have several rows of one token: { ({key: again[key] for key in keys}) }")
    wanted: Any = pd.concat(
        [
            pd.DataFrame({"domain": name, **{key: of.column(key).numpy() for key in KEYS[1:]}})
            for name, of in samples.items()
        ]
    )
    place = pd.MultiIndex.from_frame(rows[keys]).get_indexer(pd.MultiIndex.from_frame(wanted[keys]))
    if (place < 0).any():
        first = wanted.iloc[int(np.flatnonzero(place < 0)[0])]
        raise InputError(
            f"the features lack {int((place < 0).sum()):,} of {len(wanted):,} tokens that were read; for example "
            f"{ ({key: first[key] for key in keys}) }: read the same texts in the same way as for the table"
        )
    found = rows.iloc[place]
    features: dict[str, Feature] = {}
    names: dict[str, tuple[str, ...]] = {}
    numbers = []
    for column in (column for column in found.columns if column not in ABOUT):
        values = found[column]
        if values.isna().any() or (values.dtype.kind == "f" and not np.isfinite(values.to_numpy()).all()):
            raise InputError(f"the feature {column!r} has values that are missing or not finite")
        if values.dtype.kind in "iuf":
            numbers.append(column)
            continue
        codes, kinds = pd.factorize(values, sort=True)
        features[str(column)] = Categories(torch.tensor(codes), len(kinds))
        names[str(column)] = tuple(map(str, kinds))
    if len(numbers) > MOST:
        raise InputError(f"the features have {len(numbers):,} columns of numbers; at most {MOST:,} can be fitted")
    if numbers:
        features[NUMBERS] = Numbers(torch.tensor(found[numbers].to_numpy(np.float32)))
        names[NUMBERS] = tuple(map(str, numbers))
    return UserFeatures(features, names)
