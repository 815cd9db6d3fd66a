"""Figures of the study `checkpoints`: how alike two models route, and what swapping their routers costs."""

from typing import TYPE_CHECKING, Any

from moe_lens.studies import StudyResult
from moe_lens.studies.checkpoint_overlap import PAIRS
from moe_lens.studies.frames import where
from moe_lens.viz.of_study import add_by_layer, panels, table_of
from moe_lens.viz.style import MUTED, colour, error_bars, styled
from moe_lens.viz.token_text import as_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

LABELS = {
    "checkpoints": "both as they are",
    "routers": "the first, its routers and the other's",
    "all but routers": "both with the same routers",
}


def routing_overlap(result: StudyResult) -> "Figure":
    """Share of a token's experts that both choose, by layer: a panel for each domain.

    Dotted is the overlap that the loads of the experts alone would give.

    Args:
        result: Of a `Checkpoints` study.
    """
    table = table_of(result, "checkpoints", "overlap")
    figure = panels(result.domains, "layer", "share of experts in common")
    for column, domain in enumerate(result.domains, start=1):
        for number, pair in enumerate(PAIRS):
            rows = where(table, domain=domain, pair=pair)
            how: dict[str, Any] = {"number": number, "column": column}
            name, loads = LABELS[pair], f"{LABELS[pair]}, by load alone"
            add_by_layer(figure, rows, "overlap", ("low", "high"), name=name, legend=column == 1, **how)
            add_by_layer(figure, rows, "by_load", name=loads, legend=False, **how)
    figure.update_yaxes(range=[0, 1.02])
    return figure


def swapped_router_costs(result: StudyResult) -> "Figure":
    """Nats a token that the other's routers add to a model's loss, by domain, with intervals over sources.

    Args:
        result: Of a `Checkpoints` study.
    """
    import plotly.graph_objects as go

    table = table_of(result, "checkpoints", "losses")
    figure = go.Figure()
    swapped = [run for run in dict.fromkeys(table["run"]) if " with " in run]
    for number, run in enumerate(swapped):
        rows = where(table, run=run)
        figure.add_bar(
            x=[as_text(domain) for domain in rows["domain"]],
            y=rows["added"],
            error_y=error_bars(rows["added"], rows["low"], rows["high"]),
            marker_color=colour(number),
            name=run,
            hovertemplate="%{x}: %{y:+.3f} nats a token",
        )
    styled(figure, height=360, barmode="group", legend={"orientation": "h", "y": -0.15, "x": 0})
    figure.add_hline(y=0, line={"color": MUTED, "width": 1})
    figure.update_yaxes(title_text="added loss, nats a token")
    return figure
