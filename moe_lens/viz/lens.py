"""The paper's Figure 2 from what a lens read, for the page and for the terminal."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from rich.text import Text

from moe_lens.checked import Natural
from moe_lens.lenses import LensResult
from moe_lens.viz.lens_cells import NOT_SELECTED, cells, unselected
from moe_lens.viz.style import INK, MUTED, SCALE, least_width, styled
from moe_lens.viz.token_text import as_text, escaped, readable

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def lens_table(
    result: LensResult, position: int, *, batch: Natural = 0, colour_by: Literal["prob", "logit"] = "prob"
) -> "Figure":
    """Layers × sums; a cell shows the most likely token, its expert lower left, the routing weight upper right.

    Hovering shows the most likely tokens that were kept. A cell is empty where there is nothing to read; a sum over
    experts that the token did not select says so.

    Args:
        result: What a lens read.
        position: One of `result.positions`.
        batch: Which row of the batch.
        colour_by: Whether the colour is the probability of the token, or its logit.

    Raises:
        InputError: The result does not have that position or row.
    """
    import plotly.graph_objects as go

    rows, columns = len(result.layers), len(result.sums)
    values: list[list[float | None]] = [[None] * columns for _ in range(rows)]
    words, hover = ([[""] * columns for _ in range(rows)] for _ in range(2))
    notes: list[dict[str, Any]] = []
    found = list(cells(result, position, batch))
    shades = _shades([cell.probs[0] if colour_by == "prob" else cell.logits[0] for cell in found], colour_by)
    for cell, shade in zip(found, shades, strict=True):
        i, j = cell.row, cell.column
        values[i][j] = cell.probs[0] if colour_by == "prob" else cell.logits[0]
        words[i][j] = escaped(_shortened(result.text(cell.tokens[0])))
        listed = zip(cell.tokens, cell.logits, cell.probs, strict=True)
        lines = [f"{escaped(result.text(token))}  {prob:.1%}  (logit {logit:.2f})" for token, logit, prob in listed]
        routed = "" if cell.expert is None else f"<br>expert {cell.expert}, weight {cell.weight:.3f}"
        hover[i][j] = f"layer {result.layers[i]}, {as_text(result.sums[j].label)}{routed}<br>" + "<br>".join(lines)
        if cell.expert is not None:
            look = {"size": 9, "color": "white" if shade > 0.6 else INK if shade > 0.3 else MUTED}
            base = {"showarrow": False, "font": look, "borderpad": 1}
            left = {"x": j - 0.48, "xanchor": "left", "y": i + 0.45, "yanchor": "bottom"}  # layers count downwards
            right = {"x": j + 0.48, "xanchor": "right", "y": i - 0.45, "yanchor": "top"}
            notes.append({**base, **left, "text": str(cell.expert)})
            notes.append({**base, **right, "text": f"{cell.weight:.2f}"})
    for i, j in unselected(result, position, batch):
        notes.append({"x": j, "y": i, "showarrow": False, "font": {"size": 9, "color": MUTED}, "text": NOT_SELECTED})
    limits = {"zmin": 0, "zmax": 1} if colour_by == "prob" else {}
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=list(range(columns)),
            y=list(range(rows)),
            text=words,
            texttemplate="%{text}",
            textfont={"size": 13},
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=False,
            colorscale=SCALE,
            xgap=2,
            ygap=2,
            colorbar={
                "title": {"text": "probability" if colour_by == "prob" else "logit", "font": {"size": 11}},
                "tickformat": ".0%" if colour_by == "prob" else "",
                "thickness": 10,
                "len": min(1.0, 320 / (40 * rows + 90)),
                "y": 1,
                "yanchor": "top",
            },
            **limits,
        )
    )
    labels = ["<br>".join(_wrapped(as_text(which.label))) for which in result.sums]
    lines = max(label.count("<br>") for label in labels) + 1
    styled(figure, height=40 * rows + 16 * lines + 26)
    least_width(figure, 76 * columns + 130)
    figure.update_layout(font_color=INK, margin={"t": 16 * lines + 10, "b": 10}, annotations=notes)
    figure.update_xaxes(tickvals=list(range(columns)), ticktext=labels, tickangle=0, side="top", showgrid=False)
    layers = [f"{layer} (dense)" if layer in result.dense else str(layer) for layer in result.layers]
    figure.update_yaxes(
        tickvals=list(range(rows)), ticktext=layers, autorange="reversed", showgrid=False, title_text="layer"
    )
    return figure


def lens_text(result: LensResult, position: int, *, batch: Natural = 0) -> Table:
    """The same table for a terminal: `token 37%`, and below it `expert·weight`; print it with rich.

    Args:
        result: What a lens's `decode` gave.
        position: One of `result.positions`, along the cache with its padding, which is empty; −1 is the last of them.
        batch: The row of the batch.

    Raises:
        InputError: The result does not have that position or row.
    """
    table = Table("layer", show_lines=True)
    for which in result.sums:
        table.add_column(Text(which.label), overflow="fold")
    grid = [[Text("") for _ in result.sums] for _ in result.layers]
    for i, j in unselected(result, position, batch):
        grid[i][j] = Text(NOT_SELECTED, style="dim")
    for cell in cells(result, position, batch):
        text = Text(f"{readable(_shortened(result.text(cell.tokens[0])))} {cell.probs[0]:.0%}")
        if cell.expert is not None:
            text.append(f"\n{cell.expert}·{cell.weight:.2f}", style="dim")
        grid[cell.row][cell.column] = text
    for layer, row in zip(result.layers, grid, strict=True):
        table.add_row(f"{layer} (dense)" if layer in result.dense else str(layer), *row)
    return table


def _wrapped(label: str) -> list[str]:
    """Lines as short as columns are narrow: slanted, names would take the height of the rows."""
    return [line for part in label.replace(" + ", "\n+ ").splitlines() for line in textwrap.wrap(part, 12)]


def _shades(values: Sequence[float], colour_by: str) -> list[float]:
    """How dark each cell is, from 0 to 1."""
    if colour_by == "prob" or not values:
        return list(values)
    low, high = min(values), max(values)
    return [(value - low) / ((high - low) or 1) for value in values]


def _shortened(text: str, length: int = 12) -> str:
    return text if len(text) <= length or text.isspace() else text[: length - 1] + "…"
