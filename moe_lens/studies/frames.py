"""Tables of several domains."""

from collections.abc import Mapping

import pandas as pd


def by_domain(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One table after another, with the domain in the first column."""
    named = [frame.assign(domain=name) for name, frame in frames.items()]
    together = pd.concat(named, ignore_index=True)
    return together.reindex(columns=["domain", *(column for column in together.columns if column != "domain")])
