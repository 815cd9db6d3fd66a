"""Figures of the study of one expert against the ensemble."""

from typing import TYPE_CHECKING

from moe_lens.stats import MIN_SOURCES
from moe_lens.studies import SingleExpert
from moe_lens.viz.style import MUTED, error_bars, rgba, styled
from moe_lens.viz.token_text import as_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

WITH_RESIDUAL = {
    "top": ("top expert", "#2563a8", "solid"),
    "random": ("random active expert", "#3b8f5a", "solid"),
    "last": ("last active expert", "#b7791f", "solid"),
    "none": ("no expert (u alone)", "#d1495b", "solid"),
    "independent": ("if directions were independent", "#697586", "dash"),
}
WITHOUT_RESIDUAL = {
    "sum_top": ("cos(a₀, S)", "#2563a8", "solid"),
    "sum_independent": ("… if directions were independent", "#697586", "dash"),
    "centred_sum_top": ("cos(a₀, S), centred", "#7a4fa3", "solid"),
    "rest_top": ("cos(a₀, S − a₀)", "#0f8b8d", "solid"),
    "rest_random": ("cos(a_r, S − a_r), random r", "#3b8f5a", "solid"),
    "unexplained": ("variance of S left unexplained", "#d1495b", "dot"),
}


def similarity_by_layer(result: SingleExpert, *, residual: bool) -> "Figure":
    """Cosines by layer, a panel for each domain: one expert against the ensemble, beside the controls.

    Args:
        result: Of the study.
        residual: Whether the residual stream is on both sides, as in the paper, or on none.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    frame, curves = result.similarity_frame(), WITH_RESIDUAL if residual else WITHOUT_RESIDUAL
    domains = list(result.similarity)
    figure = make_subplots(
        rows=1,
        cols=len(domains),
        shared_yaxes=True,
        subplot_titles=[as_text(name) for name in domains],
        horizontal_spacing=0.015,
    )
    for column, domain in enumerate(domains, start=1):
        for measure, (label, colour, dash) in curves.items():
            rows = frame[(frame["domain"] == domain) & (frame["measure"] == measure)]
            figure.add_trace(
                go.Scatter(
                    x=rows["layer"],
                    y=rows["mean"],
                    error_y=error_bars(rows["mean"], rows["low"], rows["high"]),
                    mode="lines+markers",
                    line={"color": colour, "width": 1.8, "dash": dash},
                    marker={"size": 4},
                    name=label,
                    legendgroup=measure,
                    showlegend=column == 1,
                    hovertemplate=f"layer %{{x}}: %{{y:.4f}}<extra>{label}</extra>",
                ),
                row=1,
                col=column,
            )
        figure.update_xaxes(title_text="layer", showgrid=False, row=1, col=column)
    styled(figure, height=360, legend={"orientation": "h", "y": -0.22, "x": 0})
    figure.update_layout(margin={"b": 90})
    title = "cosine with u + S" if residual else "cosine, or share of variance"
    figure.update_yaxes(title_text=title, row=1, col=1)
    return figure


def perplexity_by_k(result: SingleExpert) -> "Figure":
    """Perplexity with k active experts divided by that with all, a panel for each domain; log scale, not normalised."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    frame, domains = result.perplexity_frame(), list(result.dropped)
    figure = make_subplots(
        rows=1,
        cols=len(domains),
        shared_yaxes=True,
        subplot_titles=[as_text(name) for name in domains],
        horizontal_spacing=0.015,
    )
    looks = {"dropped": ("others dropped", "#2563a8"), "replaced": ("others replaced by their mean", "#b7791f")}
    for column, domain in enumerate(domains, start=1):
        for others, (label, colour) in looks.items():
            rows = frame[(frame["domain"] == domain) & (frame["others"] == others)]
            low, high = list(rows["ratio_low"]), list(rows["ratio_high"])
            if len(result.dropped[domain][0].sources) >= MIN_SOURCES:
                figure.add_trace(
                    go.Scatter(
                        x=[*rows["k"], *rows["k"][::-1]],
                        y=[*high, *low[::-1]],
                        fill="toself",
                        mode="lines",
                        fillcolor=rgba(colour, 0.16),
                        line={"width": 0},
                        hoverinfo="skip",
                        showlegend=False,
                    ),
                    row=1,
                    col=column,
                )
            figure.add_trace(
                go.Scatter(
                    x=rows["k"],
                    y=rows["ratio"],
                    mode="lines+markers",
                    line={"color": colour, "width": 2},
                    marker={"size": 5},
                    name=label,
                    legendgroup=others,
                    showlegend=column == 1,
                    customdata=rows["perplexity"],
                    hovertemplate=f"k = %{{x}}: × %{{y:.3f}}, perplexity %{{customdata:.2f}}<extra>{label}</extra>",
                ),
                row=1,
                col=column,
            )
        figure.add_hline(y=1, line={"color": MUTED, "width": 1}, row=1, col=column)  # pyright: ignore[reportArgumentType]
        figure.update_xaxes(title_text="active experts k", dtick=1, showgrid=False, row=1, col=column)
    styled(figure, height=360, legend={"orientation": "h", "y": -0.22, "x": 0})
    figure.update_layout(margin={"b": 90})
    figure.update_yaxes(type="log")
    figure.update_yaxes(title_text="perplexity ÷ that with all experts", row=1, col=1)
    return figure
