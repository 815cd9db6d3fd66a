"""Templates of this package, and numbers and figures as they stand in them."""

from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

CONFIG = {"displayModeBar": False, "responsive": True}
ROWS = 200
"""Of a table that the page holds; its parquet file holds all."""


def rendered(template: str, **values: Any) -> str:
    """A template with its values; everything that is no `Markup` is escaped."""
    environment = Environment(
        loader=PackageLoader("moe_lens.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": _percent, "number": _number, "span": _span, "whole": "{:,}".format}
    environment.filters["side"] = lambda verdict: verdict.split()[0]
    return environment.get_template(template).render(**values)


def as_html(figure: Any) -> Markup:
    """A figure as part of a page that has plotly.js; one that must not be narrow scrolls where the page is."""
    drawn = Markup(figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG))
    least = (figure.layout.meta or {}).get("least_width")
    return (
        Markup('<div class="scroll"><div style="min-width:{}px">{}</div></div>').format(least, drawn)
        if least
        else drawn
    )


def table_html(table: pd.DataFrame) -> Markup:
    """The first rows of a table; pandas escapes what it writes."""
    shown = table.head(ROWS)
    return Markup(shown.to_html(index=False, border=0, na_rep="–", float_format=lambda value: f"{value:.4g}"))


def ranged(values: Any, shown: str, unit: str = "") -> str:
    """The least and the greatest of some numbers, or the one that all are; what is missing is left out."""
    known = [float(value) for value in values if value == value]
    if not known:
        return "–"
    low, high = (format(value, shown) for value in (min(known), max(known)))
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def _missing(value: float | None) -> bool:
    return value is None or value != value


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or _missing(value) else f"{100 * value:.{digits}f} %"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or _missing(value) else f"{value:,.{digits}f}"


def _span(low: float | None, high: float | None, digits: int = 2, percent: bool = False) -> str:
    if low is None or high is None or _missing(low) or _missing(high):
        return "–"
    scale = 100 if percent else 1
    return f"{scale * low:.{digits}f}–{scale * high:.{digits}f}"
