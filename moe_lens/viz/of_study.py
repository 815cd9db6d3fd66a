"""What figures ask of a study's result, and what those with a panel for each domain have in common."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.errors import InputError
from moe_lens.studies import StudyResult
from moe_lens.viz.style import colour, error_bars, styled
from moe_lens.viz.token_text import as_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def table_of(result: StudyResult, study: str, table: str) -> pd.DataFrame:
    """A table of a result.

    Raises:
        InputError: It is the result of another study.
    """
    if result.study != study:
        raise InputError(f"this figure is of a study {study!r}; got the result of {result.study!r}")
    return result.tables[table]


def panels(domains: Sequence[str], x: str, y: str) -> "Figure":
    """Empty panels side by side, one for each domain, with one axis of values."""
    from plotly.subplots import make_subplots

    titles = [as_text(name) for name in domains]
    figure = make_subplots(
        rows=1, cols=len(domains), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.015
    )
    styled(figure, height=360, legend={"orientation": "h", "y": -0.22, "x": 0})
    figure.update_layout(margin={"b": 90})
    figure.update_xaxes(title_text=x, showgrid=False)
    figure.update_yaxes(title_text=y, row=1, col=1)
    return figure


def add_by_layer(
    figure: "Figure",
    rows: pd.DataFrame,
    value: str,
    ends: tuple[str, str] | None = None,
    *,
    name: str,
    number: int,
    column: int,
    legend: bool = True,
) -> None:
    """Add a quantity by layer to a panel: solid, with its intervals, or dotted, as controls are.

    Args:
        figure: With panels.
        rows: A row for each layer, in the column `layer`.
        value: The quantity's column.
        ends: Columns of the ends of its interval; dotted without.
        name: In the legend, which switches all lines of this name on and off.
        number: Of its colour.
        column: The panel, from 1.
        legend: Whether it has a line in the legend.
    """
    line: dict[str, Any] = {"color": colour(number), "width": 2}
    how: dict[str, Any] = {"mode": "lines", "line": {**line, "dash": "dot", "width": 1.5}}
    if ends is not None:
        bars = error_bars(rows[value], *(rows[end] for end in ends))
        how = {"mode": "lines+markers", "line": line, "error_y": bars}
    figure.add_scatter(
        x=rows["layer"],
        y=rows[value],
        name=name,
        legendgroup=name,
        showlegend=legend,
        hovertemplate="layer %{x}: %{y:.3f}",
        row=1,
        col=column,
        **how,
    )
