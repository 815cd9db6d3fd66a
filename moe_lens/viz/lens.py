"""The paper's Figure 2 from what a lens read, for the page and for the terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from rich.text import Text

from moe_lens.errors import InputError
from moe_lens.lenses import LensResult
from moe_lens.partial_sum import PartialSum
from moe_lens.viz.style import INK, MUTED, SCALE, styled
from moe_lens.viz.text import escaped, readable

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

NOT_SELECTED = "not selected"


@dataclass(frozen=True)
class _Cell:
    row: int
    column: int
    tokens: Sequence[int]
    logits: Sequence[float]
    probs: Sequence[float]
    expert: int | None
    weight: float


def lens_table(
    result: LensResult, position: int, *, batch: int = 0, colour_by: Literal["prob", "logit"] = "prob"
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
    cells = list(_cells(result, position, batch))
    shades = _shades([cell.probs[0] if colour_by == "prob" else cell.logits[0] for cell in cells], colour_by)
    for cell, shade in zip(cells, shades, strict=True):
        i, j = cell.row, cell.column
        values[i][j] = cell.probs[0] if colour_by == "prob" else cell.logits[0]
        words[i][j] = escaped(_shortened(result.text(cell.tokens[0])))
        listed = zip(cell.tokens, cell.logits, cell.probs, strict=True)
        lines = [f"{escaped(result.text(token))}  {prob:.1%}  (logit {logit:.2f})" for token, logit, prob in listed]
        routed = "" if cell.expert is None else f"<br>expert {cell.expert}, weight {cell.weight:.3f}"
        hover[i][j] = f"layer {result.layers[i]}, {_title(result.sums[j])}{routed}<br>" + "<br>".join(lines)
        if cell.expert is not None:
            look = {"size": 9, "color": "white" if shade > 0.6 else INK if shade > 0.3 else MUTED}
            base = {"x": j, "y": i, "showarrow": False, "font": look}
            notes.append({**base, "text": str(cell.expert), "xshift": -46, "yshift": -12, "xanchor": "left"})
            notes.append({**base, "text": f"{cell.weight:.2f}", "xshift": 46, "yshift": 12, "xanchor": "right"})
    for i, j in _unselected(result, position, batch):
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
            },
            **limits,
        )
    )
    styled(figure, height=40 * rows + 90, annotations=notes)
    figure.update_annotations(font_size=9)
    figure.update_layout(font_color=INK, margin={"t": 50, "b": 10})
    labels = [
        _title(which).replace(" + ", "<br>+ ").replace("layer output", "layer<br>output") for which in result.sums
    ]
    figure.update_xaxes(tickvals=list(range(columns)), ticktext=labels, side="top", showgrid=False)
    layers = [f"{layer} (dense)" if layer in result.dense else str(layer) for layer in result.layers]
    figure.update_yaxes(
        tickvals=list(range(rows)), ticktext=layers, autorange="reversed", showgrid=False, title_text="layer"
    )
    return figure


def lens_text(result: LensResult, position: int, *, batch: int = 0) -> Table:
    """The same table for a terminal: `token 37%`, and below it `expert·weight`; print it with rich.

    Raises:
        InputError: The result does not have that position or row.
    """
    table = Table("layer", *(_title(which) for which in result.sums), show_lines=True)
    grid = [[Text("") for _ in result.sums] for _ in result.layers]
    for i, j in _unselected(result, position, batch):
        grid[i][j] = Text(NOT_SELECTED, style="dim")
    for cell in _cells(result, position, batch):
        text = Text(f"{readable(_shortened(result.text(cell.tokens[0])))} {cell.probs[0]:.0%}")
        if cell.expert is not None:
            text.append(f"\n{cell.expert}·{cell.weight:.2f}", style="dim")
        grid[cell.row][cell.column] = text
    for layer, cells in zip(result.layers, grid, strict=True):
        table.add_row(f"{layer} (dense)" if layer in result.dense else str(layer), *cells)
    return table


def _place(result: LensResult, position: int, batch: int) -> tuple[int, int]:
    if position not in result.positions:
        raise InputError(f"position {position} was not read; the result has {list(result.positions)}")
    rows = result.top_tokens.shape[2]
    if not 0 <= batch < rows:
        raise InputError(f"there is no row {batch} of the batch; the result has 0 to {rows - 1}")
    return batch, result.positions.index(position)


def _cells(result: LensResult, position: int, batch: int) -> Iterator[_Cell]:
    where = _place(result, position, batch)
    for i in range(len(result.layers)):
        for j in range(len(result.sums)):
            tokens = result.top_tokens[i, j, *where].tolist()
            if tokens[0] < 0:
                continue
            expert, weight = int(result.expert[i, j, *where]), float(result.weight[i, j, *where])
            logits, probs = result.top_logits[i, j, *where].tolist(), result.top_probs[i, j, *where].tolist()
            yield _Cell(i, j, tokens, logits, probs, None if expert < 0 else expert, weight)


def _unselected(result: LensResult, position: int, batch: int) -> Iterator[tuple[int, int]]:
    """Cells of sums that name experts none of which the token selected."""
    where = _place(result, position, batch)
    real = bool((result.top_tokens[:, :, *where] >= 0).any())
    for i, layer in enumerate(result.layers):
        for j, which in enumerate(result.sums):
            if real and which.experts and layer not in result.dense and result.top_tokens[i, j, *where][0] < 0:
                yield i, j


def _shades(values: Sequence[float], colour_by: str) -> list[float]:
    """How dark each cell is, from 0 to 1."""
    if colour_by == "prob" or not values:
        return list(values)
    low, high = min(values), max(values)
    return [(value - low) / ((high - low) or 1) for value in values]


def _title(which: PartialSum) -> str:
    if which == PartialSum(shared=True):
        return "layer output"
    if which == PartialSum():
        return "all routed + residual"
    if which.residual == "mid" and which.weighted and not which.shared and len(which.ranks or ()) == 1:
        return f"rank {next(iter(which.ranks or ()))} + residual"
    return which.label


def _shortened(text: str, length: int = 12) -> str:
    return text if len(text) <= length or text.isspace() else text[: length - 1] + "…"
