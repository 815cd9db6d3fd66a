"""Tables of several domains, and rows of them."""

from collections.abc import Mapping
from typing import Any

import pandas as pd


def by_domain(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One table after another, with the domain in the first column."""
    named = [frame.assign(domain=name) for name, frame in frames.items()]
    together = pd.concat(named, ignore_index=True)
    return together.reindex(columns=["domain", *(column for column in together.columns if column != "domain")])


def where(frame: pd.DataFrame, **equal: Any) -> pd.DataFrame:
    """The rows that hold these values, by column."""
    kept = pd.Series(True, index=frame.index)
    for column, value in equal.items():
        kept &= frame[column].isna() if value is None else frame[column] == value
    return pd.DataFrame(frame[kept])
