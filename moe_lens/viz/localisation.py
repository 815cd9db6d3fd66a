"""Figures of the localisation study."""

from typing import TYPE_CHECKING

from moe_lens.studies import StudyResult
from moe_lens.viz.of_study import table_of
from moe_lens.viz.style import MUTED, PALETTE, error_bars, styled
from moe_lens.viz.token_text import as_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SERIES = {
    "own": ("picked, own domain", PALETTE[1], "circle"),
    "others": ("picked, other domains", PALETTE[1], "circle-open"),
    "control_own": ("matched, own domain", MUTED, "diamond"),
    "control_others": ("matched, other domains", MUTED, "diamond-open"),
}
CONTROLS = {
    "matched": "minus matched coalitions",
    "random": "minus the same number at random",
    "busiest": "minus the most used",
}


def localisation_costs(result: StudyResult) -> "Figure":
    """What the picked experts and coalitions of the same routing weight cost their own domain, and others.

    A panel for each way of taking experts out; where nothing could be matched, the picked alone.

    Args:
        result: Of a `Localisation` study.
    """
    from plotly.subplots import make_subplots

    table = table_of(result, "localisation", "contrast")
    table = table[table["control"] == "matched"]
    ways = list(dict.fromkeys(table["how"]))
    figure = make_subplots(rows=1, cols=len(ways), shared_yaxes=True, subplot_titles=[_way(how) for how in ways])
    for column, how in enumerate(ways, start=1):
        rows = table[table["how"] == how]
        for series, (name, shade, symbol) in SERIES.items():
            figure.add_scatter(
                x=[as_text(domain) for domain in rows["domain"]],
                y=rows[series],
                mode="markers",
                marker={"color": shade, "symbol": symbol, "size": 10, "line": {"width": 2}},
                name=name,
                legendgroup=series,
                showlegend=column == 1,
                hovertemplate="%{x}: %{y:+.3f} nats a token",
                row=1,
                col=column,
            )
    styled(figure, height=360, legend={"orientation": "h", "y": -0.15, "x": 0})
    figure.add_hline(y=0, line={"color": MUTED, "width": 1})
    figure.update_yaxes(title_text="added loss, nats a token", row=1, col=1)
    return figure


def localisation_contrast(result: StudyResult) -> "Figure":
    """The contrast of the picked (Δ own − mean Δ of others) minus that of each control, with intervals.

    Args:
        result: Of a `Localisation` study.
    """
    import plotly.graph_objects as go

    table = table_of(result, "localisation", "contrast")
    table = table[table["how"] == table["how"].iloc[0]]
    figure = go.Figure()
    for number, (control, label) in enumerate(CONTROLS.items()):
        rows = table[table["control"] == control]
        figure.add_bar(
            x=[as_text(domain) for domain in rows["domain"]],
            y=rows["estimate"],
            error_y=error_bars(rows["estimate"], rows["low"], rows["high"]),
            marker_color=PALETTE[number],
            name=label,
            customdata=rows[["beaten", "controls"]],
            hovertemplate="%{x}: %{y:+.3f} nats a token; above %{customdata[0]:.0%} of %{customdata[1]} controls",
        )
    styled(figure, height=360, barmode="group", legend={"orientation": "h", "y": -0.15, "x": 0})
    figure.add_hline(y=0, line={"color": MUTED, "width": 1})
    figure.update_yaxes(title_text="contrast beyond the control, nats a token")
    return figure


def _way(how: str) -> str:
    return {"reroute": "forbidden, others come", "zero": "contribution set to zero"}[how]
