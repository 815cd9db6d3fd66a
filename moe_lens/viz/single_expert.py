"""Figures of the study `single_expert`: one expert against the ensemble."""

from typing import TYPE_CHECKING

import pandas as pd

from moe_lens.errors import InputError
from moe_lens.studies import StudyResult
from moe_lens.studies.frames import where
from moe_lens.studies.variant_losses import WHOLE
from moe_lens.viz.of_study import panels, table_of
from moe_lens.viz.style import MUTED, error_bars, rgba

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
TREATED = {
    "dropped": ("others dropped", "#2563a8"),
    "random": ("k at random, others dropped", "#3b8f5a"),
    "renormalised": ("dropped, the rest rescaled", "#7a4fa3"),
    "replaced": ("others replaced by their mean", "#b7791f"),
}


def similarity_by_layer(result: StudyResult, *, residual: bool = True) -> "Figure":
    """Cosines by layer, a panel for each domain: one expert against the ensemble, beside the controls.

    Args:
        result: Of a `SingleExpertStudy`.
        residual: Whether the residual stream is on both sides, as in the paper, or on none.
    """
    frame, curves = table_of(result, "single_expert", "similarity"), WITH_RESIDUAL if residual else WITHOUT_RESIDUAL
    figure = panels(result.domains, "layer", "cosine with u + S" if residual else "cosine, or share of variance")
    for column, domain in enumerate(result.domains, start=1):
        for measure, (label, colour, dash) in curves.items():
            rows = where(frame, domain=domain, measure=measure)
            figure.add_scatter(
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
                row=1,
                col=column,
            )
    return figure


def perplexity_by_k(result: StudyResult) -> "Figure":
    """Perplexity with k active experts divided by that with all, a panel for each domain; log scale, not normalised.

    Args:
        result: Of a `SingleExpertStudy`; what was done in all layers at once is shown.

    Raises:
        InputError: Each layer was treated by itself alone.
    """
    frame = where(table_of(result, "single_expert", "perplexity"), layer=None)
    if not set(frame["treatment"]) - {WHOLE}:
        raise InputError("the study left experts out of one layer at a time (layers='each'): see its table perplexity")
    figure = panels(result.domains, "active experts k", "perplexity ÷ that with all experts")
    for column, domain in enumerate(result.domains, start=1):
        whole = where(frame, domain=domain, treatment=WHOLE)
        for treatment, (label, colour) in TREATED.items():
            fewer = where(frame, domain=domain, treatment=treatment)
            if not len(fewer):
                continue
            rows = pd.concat([fewer, whole]).sort_values("k")
            if not rows["ratio_low"].isna().to_numpy().any():
                figure.add_scatter(
                    x=[*rows["k"], *rows["k"][::-1]],
                    y=[*rows["ratio_high"], *rows["ratio_low"][::-1]],
                    fill="toself",
                    mode="lines",
                    fillcolor=rgba(colour, 0.16),
                    line={"width": 0},
                    hoverinfo="skip",
                    showlegend=False,
                    row=1,
                    col=column,
                )
            figure.add_scatter(
                x=rows["k"],
                y=rows["ratio"],
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"size": 5},
                name=label,
                legendgroup=treatment,
                showlegend=column == 1,
                customdata=rows["perplexity"],
                hovertemplate=f"k = %{{x}}: × %{{y:.3f}}, perplexity %{{customdata:.2f}}<extra>{label}</extra>",
                row=1,
                col=column,
            )
        figure.add_hline(y=1, line={"color": MUTED, "width": 1}, row=1, col=column)  # pyright: ignore[reportArgumentType]
    figure.update_xaxes(dtick=1)
    figure.update_yaxes(type="log")
    return figure
