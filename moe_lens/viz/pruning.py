"""Figures of smaller models."""

from typing import TYPE_CHECKING, Any, Literal

from moe_lens.checked import Positive
from moe_lens.pruning.frontier import ALL, Frontier
from moe_lens.studies import StudyResult
from moe_lens.studies.matched_coalitions import PICKED, RANDOM
from moe_lens.viz.of_study import table_of
from moe_lens.viz.style import MUTED, PALETTE, colour, error_bars, styled
from moe_lens.viz.token_text import as_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def pruning_ratios(result: StudyResult) -> "Figure":
    """Perplexity ÷ that of the whole model in each domain: its own plan, random ones, and those of other domains.

    Args:
        result: Of a `PruningStudy`.
    """
    import plotly.graph_objects as go

    table = table_of(result, "pruning", "pruning")
    random = table["kind"] == RANDOM
    table = table[random | (table["kind"] == PICKED)]  # of the study's own share
    random = table["kind"] == RANDOM
    own = (table["plan"] == table["domain"]) & ~random
    figure = go.Figure()
    for name, which, marker in (
        ("random", random, {"color": MUTED, "size": 5, "opacity": 0.5}),
        ("made for another domain", ~own & ~random, {"color": PALETTE[1], "size": 8, "symbol": "circle-open"}),
        ("made for this domain", own, {"color": PALETTE[1], "size": 10, "symbol": "diamond"}),
    ):
        rows = table[which]
        figure.add_scatter(
            x=[as_text(domain) for domain in rows["domain"]],
            y=rows["ratio"],
            error_y=error_bars(rows["ratio"], rows["low"], rows["high"]) if which is own else None,
            mode="markers",
            marker=marker,
            name=name,
            customdata=[as_text(plan) for plan in rows["plan"]],
            hovertemplate=f"%{{x}}: × %{{y:.3f}}<extra>{name}{'' if which is random else ' (%{customdata})'}</extra>",
        )
    styled(figure, height=360, legend={"orientation": "h", "y": -0.15, "x": 0})
    figure.add_hline(y=1, line={"color": MUTED, "width": 1})
    figure.update_yaxes(title_text="perplexity ÷ the unpruned model's", type="log")
    return figure


def frontier(result: Frontier) -> "Figure":
    """Perplexity ÷ that of the whole model against the share of experts kept: a panel per domain, a line per method.

    Calibrated on all domains; log scale. Bars are 95 % intervals over sources, paired with the whole model.

    Args:
        result: What `pruning.frontier` gave.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    frame: Any = result.to_frame()
    everything, *_, top_k = result.points[0]
    pruned = frame[(frame["calibrated"] == ALL) & (frame["method"] != everything)]
    active = int(pruned["top_k"].max())  # lines end at the whole model with as many active experts, if it was measured
    whole = frame[frame["method"] == everything]
    whole = whole[whole["top_k"] == (active if active in set(whole["top_k"]) else top_k)]
    figure = make_subplots(
        rows=1,
        cols=len(result.domains),
        shared_yaxes=True,
        subplot_titles=[as_text(name) for name in result.domains],
        horizontal_spacing=0.015,
    )
    lines = pruned.groupby(["method", "treatment"], sort=False)
    for number, ((method, treatment), rows) in enumerate(lines):
        label = str(method) if treatment == "dropped" else f"{method}, merged"
        label += f", {active} active" * (active != top_k)
        for column, domain in enumerate(result.domains, start=1):
            own = rows[rows["domain"] == domain].sort_values("share")
            end = whole[whole["domain"] == domain]
            figure.add_trace(
                go.Scatter(
                    x=[*own["share"], *end["share"]],
                    y=[*own["ratio"], *end["ratio"]],
                    error_y=error_bars(own["ratio"], own["ratio_low"], own["ratio_high"]),
                    mode="lines+markers",
                    line={
                        "color": MUTED if method == "random" else colour(number),
                        "dash": "dot" if treatment == "merged" else "solid",
                    },
                    name=label,
                    legendgroup=label,
                    showlegend=column == 1,
                    customdata=[*own["perplexity"], *end["perplexity"]],
                    hovertemplate=f"%{{x:.0%}}: × %{{y:.3f}}, perplexity %{{customdata:.2f}}<extra>{label}</extra>",
                ),
                row=1,
                col=column,
            )
        figure.update_xaxes(tickformat=".0%", showgrid=False)
    figure.update_xaxes(title_text="experts kept")
    styled(figure, height=380, legend={"orientation": "h", "y": -0.22, "x": 0})
    figure.update_layout(margin={"b": 90})
    figure.update_yaxes(type="log")
    figure.update_yaxes(title_text="perplexity ÷ the unpruned model's", row=1, col=1)
    return figure


def specialists(result: Frontier, kept: Positive, *, treatment: Literal["dropped", "merged"] = "dropped") -> "Figure":
    """What models for one domain cost in all of them: rows calibrated on, columns measured in, perplexity ÷ whole.

    Args:
        result: What `pruning.frontier(…, specialists=…)` gave.
        kept: How many experts each layer keeps: one of the numbers that were measured.
        treatment: What became of the others; merged where that was measured.
    """
    import plotly.graph_objects as go

    frame: Any = result.to_frame()
    method = next(point[0] for point in result.points if point[1] != ALL)
    rows = frame[(frame["method"] == method) & (frame["kept"] == kept) & (frame["treatment"] == treatment)]
    order = [ALL, *result.domains]
    table = rows.pivot(index="calibrated", columns="domain", values="ratio").reindex(
        index=[name for name in order if name in set(rows["calibrated"])], columns=list(result.domains)
    )
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy(),
            x=[as_text(name) for name in table.columns],
            y=[as_text(name) for name in table.index],
            text=[[f"× {value:.2f}" for value in row] for row in table.to_numpy()],
            texttemplate="%{text}",
            colorscale="RdBu_r",
            zmid=1.0,
            showscale=False,
            hovertemplate="pruned for %{y}, on %{x}: %{text}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", title_text="calibrated on")
    figure.update_xaxes(title_text="measured in", side="top")
    return styled(figure, height=120 + 42 * len(table))
