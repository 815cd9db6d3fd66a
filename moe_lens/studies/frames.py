"""Tables of several domains, and rows of them."""

import re
from collections.abc import Iterable, Mapping, Sequence
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

    Args:
        frame: The table.
        columns: Those to write; all if not given.
        digits: Of numbers.
        equal: Only rows that hold this value, or one of several, by column.

    Raises:
        InputError: There is no such column, or no row that holds a value; or rows are to hold one in a column of lists.
    """
    known = list(frame.columns)
    for name in (*(columns or ()), *equal):
        if name not in known:
            raise InputError(f"there is no column {name!r}; there are {', '.join(known)}{near_miss(name, known)}")
    rows: Any = frame.reset_index(drop=True)
    for name, value in equal.items():
        if not rows[name].map(pd.api.types.is_scalar).all():
            raise InputError(f"{name} is a list in each row; choose rows by another column")
        several = value if isinstance(value, list | tuple | set | range) else [value]
        rows = rows[rows.index.isin({at for each in several for at in _holding(rows, name, each).index})]
    ends = _ends(known)
    hidden = {end for name in columns or known for end in ends.get(name, ())}
    kept = [name for name in columns or known if name not in hidden]
    written = pd.DataFrame({name: _cells(rows, name, ends.get(name), digits) for name in kept})
    numbers = "".join("r" if frame[name].dtype.kind in "iuf" else "l" for name in kept)
    head, *body = map(_row, [map(_escaped, kept), *written.itertuples(index=False)])
    lines = [rf"\begin{{tabular}}{{{numbers}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def _holding(frame: pd.DataFrame, column: str, value: Any) -> pd.DataFrame:
    """The rows that hold a value.

    Raises:
        InputError: There is none.
    """
    rows = where(frame, **{column: value})
    if not len(rows):
        there = list(dict.fromkeys(frame[column].dropna().tolist()))
        some = ", ".join(map(repr, there[:12])) + (f" and {len(there) - 12:,} more" if len(there) > 12 else "")
        near = near_miss(value, [each for each in there if isinstance(each, str)]) if isinstance(value, str) else ""
        raise InputError(f"no row has {column} {value!r}; there are {some}{near}")
    return rows


def _ends(columns: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The ends of each number's interval."""
    ends = {name: (f"{name}_low", f"{name}_high") for name in columns if f"{name}_low" in columns}
    if "low" in columns and (at := columns.index("low")) > 0:
        ends[columns[at - 1]] = ("low", "high")
    return ends


def _cells(rows: pd.DataFrame, name: str, ends: tuple[str, str] | None, digits: int) -> list[str]:
    def said(value: Any) -> str:
        if not pd.api.types.is_scalar(value):
            return ", ".join(map(said, value))
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


def _row(cells: Iterable[str]) -> str:
    """A line of the table; `{}` before what the line above would take for its own, a length in brackets or a star."""
    line = " & ".join(cells) + r" \\"
    return "{}" + line if line.startswith(("[", "*")) else line


_SPECIAL = {one: f"\\{one}" for one in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\texttt{\char34}",
}
"""Characters that mean something to LaTeX, or are printed as others in its default encoding (< as an inverted !)."""


def _escaped(text: str) -> str:
    """A text that is printed as it is, in any encoding of LaTeX, and spaces that it would drop as visible ones."""
    shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
    shown = re.sub(r"(?<=([-,'`]))(?=\1)|(?<=[!?])(?=`)", "\0", shown)  # LaTeX makes one of two: -- a dash, '' a quote
    shown = re.sub(r"^ +| +$| {2,}", lambda spaces: "\1" * len(spaces[0]), shown)
    special = _SPECIAL | {"\0": "{}", "\1": r"\textvisiblespace{}"}
    return "".join(special.get(one, one) for one in shown)
