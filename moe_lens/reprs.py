"""`Summary`: what an object shows of itself at a prompt and in a notebook: a line, and a small table."""

import importlib
from collections.abc import Mapping, Sequence, Sized
from dataclasses import fields, is_dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from moe_lens.errors import one_line

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

VIZ = "moe_lens.viz.figures"
"""The module that draws results."""
WIDTH = 60
"""Characters of a value that are shown."""
ROWS = 40
"""Rows of a table that are shown."""
TRUST = "run this cell, or choose Trust Notebook in JupyterLab's command palette"
"""What to do where a notebook leaves out of a saved output what it does not trust: scripts and frames."""


class Summary:
    """Gives a class a `repr` of one line and a table in notebooks, both of `_facts`: its fields, if it is a dataclass.

    Tensors show their dtype and shape, tables and collections their size. A class may have a `__repr__` of its own.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the inherited `__repr__` of a class that `dataclass` would write one for."""
        super().__init_subclass__(**kwargs)
        cls.__repr__ = cls.__repr__

    def _facts(self) -> dict[str, Any]:
        """What is worth knowing, by name; values may be anything."""
        return {field.name: getattr(self, field.name) for field in fields(self)} if is_dataclass(self) else {}

    def __repr__(self) -> str:
        told = ", ".join(f"{name}={short(value)}" for name, value in self._facts().items() if value is not None)
        return f"{type(self).__name__}({told})"

    def _repr_html_(self) -> str:
        """A table of names and values; everything in it is text."""
        facts = list(self._facts().items())
        rows = [f"<tr><th>{escape(str(name))}</th><td>{escape(short(value))}</td></tr>" for name, value in facts[:ROWS]]
        if len(facts) > ROWS:
            rows.append(f"<tr><th>…</th><td>{len(facts) - ROWS} more</td></tr>")
        return f"<table><caption>{escape(type(self).__name__)}</caption>{''.join(rows)}</table>"


class Drawn(Summary):
    """Gives a result the method `figure`. Figures stand above results in the layers, so they are looked up by name."""

    def figure(self, name: str | None = None, **options: Any) -> "Figure":
        """A plotly figure of this result: the first that `moe_lens.viz` has for it, or another one by name.

        Args:
            name: Name of a function of `moe_lens.viz`; `viz.figures_of(result)` lists those that draw this result.
            options: Arguments of that function.

        Raises:
            InputError: There is no figure of this result, or none of that name.
        """
        return importlib.import_module(VIZ).figure(self, name, **options)


def short(value: Any) -> str:
    """A value in at most `WIDTH` characters: the size of what is large, the value of what is small."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if hasattr(value, "columns") and hasattr(value, "index"):
        return f"{len(value)} rows × {len(value.columns)} columns"
    large = isinstance(value, Sized) and len(value) > 6
    if isinstance(value, Mapping) and (large or any(not isinstance(one, (int, float, str)) for one in value.values())):
        return clipped(f"{len(value)}: {', '.join(map(str, value))}")
    if isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, str):
        whole = large or any(not isinstance(one, (int, float, str)) for one in value)
        if whole and isinstance(value, range | Sequence) and all(type(one) is int for one in value):
            return f"{value[0]} … {value[-1]} ({len(value)})"
        return f"{len(value)} entries" if whole else clipped(repr(value))
    return clipped(value if isinstance(value, str) else repr(value))


def clipped(text: str) -> str:
    """Text on one line, its end left out if it is long."""
    line = one_line(text)
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"
