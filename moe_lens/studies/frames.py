"""Tables of several domains, and rows of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from moe_lens.errors import InputError, near_miss


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


def latex(frame: pd.DataFrame, columns: Sequence[str] | None = None, digits: int = 3, **equal: Any) -> str:
    """A table in LaTeX (booktabs) with every name escaped; an interval stands behind the number that it is of.

    `x_low` and `x_high` are of `x`; `low` and `high` of the column before them.

    Raises:
        InputError: There is no such column.
    """
    known = list(frame.columns)
    for name in (*(columns or ()), *equal):
        if name not in known:
            raise InputError(f"there is no column {name!r}; there are {', '.join(known)}{near_miss(name, known)}")
    rows, ends = where(frame, **equal), _ends(known)
    kept = [name for name in columns or known if name not in {end for pair in ends.values() for end in pair}]
    written = pd.DataFrame({name: _cells(rows, name, ends.get(name), digits) for name in kept})
    numbers = "".join("r" if frame[name].dtype.kind in "iuf" else "l" for name in kept)
    body = [" & ".join(row) + r" \\" for row in written.itertuples(index=False)]
    head = " & ".join(map(_escaped, kept)) + r" \\"
    lines = [rf"\begin{{tabular}}{{{numbers}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def _ends(columns: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The ends of each number's interval."""
    ends = {name: (f"{name}_low", f"{name}_high") for name in columns if f"{name}_low" in columns}
    if "low" in columns and (at := columns.index("low")) > 0:
        ends[columns[at - 1]] = ("low", "high")
    return ends


def _cells(rows: pd.DataFrame, name: str, ends: tuple[str, str] | None, digits: int) -> list[str]:
    def said(value: Any) -> str:
        if pd.isna(value):
            return ""
        if not isinstance(value, float):
            return _escaped(str(value))
        number, exponent, power = f"{value:.{digits}g}".partition("e")
        return f"${number}\\times10^{{{int(power)}}}$" if exponent else f"${number}$"

    values = [said(value) for value in rows[name]]
    if ends is None:
        return values
    low, high = ([said(value).strip("$") for value in rows[end]] for end in ends)
    spans = zip(values, low, high, strict=True)
    return [f"{value} $[{start}, {end}]$" if start and value else value for value, start, end in spans]


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
    return "".join(special.get(one, f"\\{one}" if one in "&%$#_{}" else one) for one in shown)
