"""The paper's Figure 2 from what a lens read, for the page and for the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich.table import Table
from rich.text import Text

from moe_lens.lenses import LensResult
from moe_lens.partial_sum import PartialSum
from moe_lens.viz.style import INK, MUTED, SCALE, styled
from moe_lens.viz.text import escaped, readable

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class _Cell:
    layer: int
    column: int
    tokens: Sequence[int]
    logits: Sequence[float]
    probs: Sequence[float]
    expert: int | None
    weight: float | None


def lens_table(
    result: LensResult,
    position: int,
    texts: Mapping[int, str],
    *,
    batch: int = 0,
    colour_by: Literal["prob", "logit"] = "prob",
) -> "Figure":
    """Layers × sums; a cell shows the most likely token, its expert lower left, the routing weight upper right.

    Args:
        result: What a lens read.
        position: One of `result.positions`.
        texts: What each token reads as.
        batch: Which row of the batch.
        colour_by: Whether the colour is the probability of the token, or its logit.
    """
    import plotly.graph_objects as go

    rows, columns = len(result.layers), len(result.sums)
    values: list[list[float | None]] = [[None] * columns for _ in range(rows)]
    words, hover = ([[""] * columns for _ in range(rows)] for _ in range(2))
    notes = []
    for i, cell in _cells(result, position, batch):
        j = cell.column
        values[i][j] = cell.probs[0] if colour_by == "prob" else cell.logits[0]
        words[i][j] = escaped(_shortened(texts[cell.tokens[0]]))
        listed = zip(cell.tokens, cell.logits, cell.probs, strict=True)
        lines = [f"{escaped(texts[token])}  {prob:.1%}  (logit {logit:.2f})" for token, logit, prob in listed]
        routed = "" if cell.expert is None else f"<br>expert {cell.expert}, weight {cell.weight:.3f}"
        hover[i][j] = f"layer {cell.layer}, {_title(result.sums[j])}{routed}<br>" + "<br>".join(lines)
        if cell.expert is not None:
            dark = cell.probs[0] if colour_by == "prob" else 0.4
            look = {"size": 9, "color": "white" if dark > 0.6 else INK if dark > 0.3 else MUTED}
            base = {"x": j, "y": i, "showarrow": False, "font": look}
            notes.append({**base, "text": str(cell.expert), "xshift": -46, "yshift": -12, "xanchor": "left"})
            notes.append({**base, "text": f"{cell.weight:.2f}", "xshift": 46, "yshift": 12, "xanchor": "right"})
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


def lens_text(result: LensResult, position: int, texts: Mapping[int, str], *, batch: int = 0) -> Table:
    """The same table for a terminal: `token 37%`, and below it `expert·weight`; print it with rich."""
    table = Table("layer", *(_title(which) for which in result.sums), show_lines=True)
    grid = [[Text("") for _ in result.sums] for _ in result.layers]
    for i, cell in _cells(result, position, batch):
        text = Text(f"{readable(_shortened(texts[cell.tokens[0]]))} {cell.probs[0]:.0%}")
        if cell.expert is not None:
            text.append(f"\n{cell.expert}·{cell.weight:.2f}", style="dim")
        grid[i][cell.column] = text
    for layer, cells in zip(result.layers, grid, strict=True):
        table.add_row(f"{layer} (dense)" if layer in result.dense else str(layer), *cells)
    return table


def _cells(result: LensResult, position: int, batch: int) -> Iterator[tuple[int, _Cell]]:
    at = result.positions.index(position)
    for i, layer in enumerate(result.layers):
        for j, which in enumerate(result.sums):
            place = i, j, batch, at
            tokens = result.top_tokens[place].tolist()
            if tokens[0] < 0:
                continue
            expert = weight = None
            if which.ranks is not None and len(which.ranks) == 1:
                slot = i, batch, at, next(iter(which.ranks))
                expert, weight = int(result.experts[slot]), float(result.weights[slot])
            logits, probs = result.top_logits[place].tolist(), result.top_probs[place].tolist()
            yield i, _Cell(layer, j, tokens, logits, probs, expert, weight)


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
