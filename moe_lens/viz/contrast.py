"""Figures of the study `contrast`: which experts A and B of paired prompts choose, and what steering them does."""

from typing import TYPE_CHECKING

from moe_lens.errors import InputError
from moe_lens.studies import StudyResult
from moe_lens.studies.frames import where
from moe_lens.viz.attribution import DIVERGING
from moe_lens.viz.of_study import table_of
from moe_lens.viz.style import INK, MUTED, PALETTE, error_bars, styled

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SURE = 0.05
KINDS = {
    "picked": ("picked on the other half of the units", PALETTE[1], "circle"),
    "opposite": ("the opposite sign", PALETTE[0], "x-thin-open"),
    "matched": ("same layers, same routing weight", MUTED, "diamond"),
}
WAYS = {"forbid": "A's experts forbidden, in A", "push": "A's experts pushed, in B"}


def contrast_map(result: StudyResult) -> "Figure":
    """Share of tokens that choose an expert, in A minus in B: layers × experts; a dot where the corrected p ≤ .05.

    Args:
        result: Of a `ContrastStudy`.
    """
    import plotly.graph_objects as go

    table = table_of(result, "contrast", "experts")
    cells = table.pivot(index="layer", columns="expert", values="difference")
    p_values = table.pivot(index="layer", columns="expert", values="p_value")
    largest = float(cells.abs().max(axis=None)) or 1.0
    layers = [f"layer {layer}" for layer in cells.index]
    figure = go.Figure(
        go.Heatmap(
            z=cells.to_numpy(),
            y=layers,
            customdata=p_values.to_numpy(),
            colorscale=DIVERGING,
            zmin=-largest,
            zmax=largest,
            colorbar={"title": {"text": "A minus B"}, "thickness": 12},
            hovertemplate="%{y}, expert %{x}: %{z:+.3f}, p = %{customdata:.3f}<extra></extra>",
        )
    )
    sure = table[table["p_value"] <= SURE]
    figure.add_scatter(
        x=sure["expert"],
        y=[f"layer {layer}" for layer in sure["layer"]],
        mode="markers",
        marker={"color": INK, "size": 4},
        hoverinfo="skip",
    )
    figure.update_xaxes(title_text="expert", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return styled(figure, height=140 + 32 * len(layers))


def contrast_steering(result: StudyResult) -> "Figure":
    """How far steering moves answer − foil in the expected direction: picked experts, and what they are held against.

    Args:
        result: Of a `ContrastStudy` whose pairs have answers.

    Raises:
        InputError: They have none.
    """
    import plotly.graph_objects as go

    table_of(result, "contrast", "experts")
    if "steering" not in result.tables:
        raise InputError("the pairs of this study have no answers, so that nothing was steered; draw contrast_map")
    table = result.tables["steering"]
    figure = go.Figure()
    for kind, (label, shade, symbol) in KINDS.items():
        rows = where(table, kind=kind)
        figure.add_scatter(
            x=[WAYS[way] for way in rows["way"]],
            y=rows["effect"],
            error_y=error_bars(rows["effect"], rows["low"], rows["high"]),
            mode="markers",
            marker={"color": shade, "symbol": symbol, "size": 10, "line": {"width": 1.6}},
            name=label,
            hovertemplate="%{x}: %{y:+.3f} nats",
        )
    styled(figure, height=360, legend={"orientation": "h", "y": -0.15, "x": 0})
    figure.add_hline(y=0, line={"color": MUTED, "width": 1})
    figure.update_yaxes(title_text="change of answer − foil, nats")
    return figure
