"""The figure of the study `ablation`."""

from typing import TYPE_CHECKING

from moe_lens.studies import StudyResult
from moe_lens.studies.frames import where
from moe_lens.viz.of_study import table_of
from moe_lens.viz.style import MUTED, PALETTE, error_bars, styled
from moe_lens.viz.token_text import as_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

KINDS = {
    "picked": ("the experts", PALETTE[1], "circle"),
    "matched": ("same layers, same routing weight", MUTED, "diamond"),
    "random": ("as many at random", MUTED, "x-thin-open"),
}


def ablation_costs(result: StudyResult) -> "Figure":
    """What the experts, and their controls, cost each domain, in nats a token: a panel for each way of taking out.

    Args:
        result: Of an `AblationStudy`.
    """
    from plotly.subplots import make_subplots

    table = table_of(result, "ablation", "ablation")
    ways = list(dict.fromkeys(table["how"]))
    figure = make_subplots(rows=1, cols=len(ways), shared_yaxes=True, subplot_titles=ways)
    for column, how in enumerate(ways, start=1):
        for kind, (label, shade, symbol) in KINDS.items():
            rows = where(table, how=how, coalition=kind)
            figure.add_scatter(
                x=[as_text(domain) for domain in rows["domain"]],
                y=rows["added"],
                error_y=error_bars(rows["added"], rows["low"], rows["high"]),
                mode="markers",
                marker={"color": shade, "symbol": symbol, "size": 10, "line": {"width": 1.6}},
                name=label,
                legendgroup=kind,
                showlegend=column == 1,
                hovertemplate="%{x}: %{y:+.4f} nats a token",
                row=1,
                col=column,
            )
    styled(figure, height=360, legend={"orientation": "h", "y": -0.15, "x": 0})
    figure.add_hline(y=0, line={"color": MUTED, "width": 1})
    figure.update_yaxes(title_text="added loss, nats a token", row=1, col=1)
    return figure
