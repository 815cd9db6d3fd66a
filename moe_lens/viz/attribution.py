"""Figures of attributions."""

from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.interventions import ExpertAttribution
from moe_lens.studies import StudyResult
from moe_lens.viz.of_study import table_of
from moe_lens.viz.style import colour, error_bars, styled
from moe_lens.viz.token_text import as_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

DIVERGING = [[0.0, "#8f1d2c"], [0.25, "#e08a86"], [0.5, "#f7fafc"], [0.75, "#6baed6"], [1.0, "#0b3c6f"]]
REFERENCES = {
    "knockout": "knock-out, later layers choose again",
    "knockout_frozen": "knock-out, later layers keep their experts",
    "direct_knockout": "knock-out of the direct path",
}


def attribution_map(result: ExpertAttribution) -> "Figure":
    """Layers × experts (or ranks), summed over positions: blue raises the metric, red lowers it, blank is inactive.

    Args:
        result: What `expert_attribution` gave.
    """
    import plotly.graph_objects as go

    values, used = result.total().double(), result.used()
    shown = values.masked_fill(used == 0, float("nan"))
    largest = float(shown.nan_to_num().abs().max()) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=shown.tolist(),
            y=[f"layer {layer}" for layer in result.layers],
            customdata=used.tolist(),
            colorscale=DIVERGING,
            zmin=-largest,
            zmax=largest,
            colorbar={"title": {"text": as_text(result.metric)}, "thickness": 12},
            hoverongaps=False,
            hovertemplate=f"%{{y}}, {result.unit} %{{x}}: %{{z:.4g}}<br>%{{customdata}} tokens<extra></extra>",
        )
    )
    figure.update_xaxes(title_text=result.unit, showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    title = f"{result.method}, {result.routing} routing: what each {result.unit} adds to {as_text(result.metric)}"
    return styled(figure, height=140 + 32 * len(result.layers), title={"text": title, "font": {"size": 13}})


def attribution_agreement(fidelity: StudyResult | pd.DataFrame, domain: str = "all") -> "Figure":
    """Spearman correlation of each method with each knock-out over all layers of a domain, with its interval.

    Args:
        fidelity: the result of the study `attribution-fidelity`, or its table of that name.
        domain: one of its domains.
    """
    import plotly.graph_objects as go

    if isinstance(fidelity, StudyResult):
        fidelity = table_of(fidelity, "attribution-fidelity", "fidelity")
    of: Any = fidelity[(fidelity["domain"] == domain) & fidelity["layer"].isna()]
    figure = go.Figure()
    for number, (reference, label) in enumerate(REFERENCES.items()):
        rows = of[of["reference"] == reference]
        figure.add_trace(
            go.Bar(
                x=list(rows["method"]),
                y=list(rows["spearman"]),
                name=label,
                marker_color=colour(number),
                error_y=error_bars(rows["spearman"], rows["spearman_low"], rows["spearman_high"]),
                hovertemplate="%{x}: %{y:.2f}<extra>" + label + "</extra>",
            )
        )
    figure.update_yaxes(title_text="Spearman correlation", range=[min(0.0, float(of["spearman"].min())), 1])
    styled(figure, height=340, barmode="group", legend={"orientation": "h", "y": -0.15, "x": 0})
    return figure
