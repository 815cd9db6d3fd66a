"""Figures of the study `routing`: which experts the domains are sent to, beside what routing without meaning gives."""

from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.studies import StudyResult
from moe_lens.studies.frames import where
from moe_lens.viz.of_study import table_of
from moe_lens.viz.style import MUTED, SCALE, by_layer, colour, error_bars, least_width, styled
from moe_lens.viz.token_text import as_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

NULLS = {"random_router": ("random router", "x-thin-open"), "token_unigram": ("token alone", "line-ew-open")}
"""What is drawn beside the model's own routing, where the study measured it."""
NAMED = 60
"""Points at most beside which the number of the expert stands: of more, the numbers would cover one another."""


def specialisation_map(result: StudyResult) -> "Figure":
    """Share of a domain's tokens that have each expert among their active ones: layers × experts, a map per domain.

    Args:
        result: Of a `RoutingStudy`.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    frame, domains = _of(result, "specialisation", routing="model"), result.domains
    titles = [as_text(name) for name in domains]
    layers = frame["layer"].unique()
    row_height = max(110, 16 * len(layers) + 30)
    height = row_height * len(domains) + 80
    figure = make_subplots(
        rows=len(domains), cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=34 / height
    )
    baseline = _baseline(result)
    for row, name in enumerate(domains, start=1):
        shares = where(frame, domain=name).pivot(index="layer", columns="expert", values="share").to_numpy()
        figure.add_trace(
            go.Heatmap(
                z=shares,
                y=[str(layer) for layer in layers],
                customdata=shares / baseline,
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
                hovertemplate="layer %{y}, expert %{x}<br>%{z:.1%} of tokens, %{customdata:.1f} × uniform"
                f"<extra>{as_text(name)}</extra>",
            ),
            row=row,
            col=1,
        )
        figure.update_yaxes(type="category", autorange="reversed", title_text="layer", showgrid=False, row=row, col=1)
    styled(figure, height=height)
    least_width(figure, 4 * len(set(frame["expert"])) + 160)
    figure.update_xaxes(showgrid=False)
    figure.update_xaxes(title_text="expert", row=len(domains), col=1)
    figure.update_layout(
        coloraxis={
            "colorscale": SCALE,
            "cmin": 0,
            "colorbar": {
                "title": {"text": f"share of tokens<br>(uniform {baseline:.1%})", "font": {"size": 11}},
                "tickformat": ".0%",
                "len": min(1.0, 320 / height),
                "y": 1,
                "yanchor": "top",
                "thickness": 12,
            },
        }
    )
    return figure


def most_specialised(result: StudyResult) -> "Figure":
    """The most specialised expert of each layer and domain, with its interval over sources, beside the nulls.

    Args:
        result: Of a `RoutingStudy`.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    n_domains = len(result.domains)
    shown = _of(result, "most_specialised", routing="model")["layer"]
    for number, name in enumerate(result.domains):
        offset = (number - (n_domains - 1) / 2) * 0.6 / n_domains
        rows = _of(result, "most_specialised", routing="model", domain=name)
        figure.add_scatter(
            x=rows["layer"] + offset,
            y=rows["share"],
            error_y=error_bars(rows["share"], rows["low"], rows["high"]),
            mode="markers+text" if len(shown) <= NAMED else "markers",
            cliponaxis=False,
            text=rows["expert"].astype(str),
            textposition="middle right",
            textfont={"size": 9, "color": MUTED},
            marker={"color": colour(number), "size": 8},
            name=as_text(name),
            customdata=rows[["layer", "expert"]],
            hovertemplate="layer %{customdata[0]}, expert %{customdata[1]}: %{y:.1%} of tokens",
        )
        for null, (label, symbol) in NULLS.items():
            rows = _of(result, "most_specialised", routing=null, domain=name)
            if len(rows):
                figure.add_scatter(
                    x=rows["layer"] + offset,
                    y=rows["share"],
                    mode="markers",
                    marker={"color": colour(number), "size": 9, "symbol": symbol, "line": {"width": 1.6}},
                    name=label,
                    legendgroup=null,
                    showlegend=number == 0,
                    customdata=rows["expert"],
                    hovertemplate=f"{label}, expert %{{customdata}}: %{{y:.1%}}<extra>{as_text(name)}</extra>",
                )
    _line(figure, _baseline(result), f"uniform {_baseline(result):.1%}", above=True)
    styled(figure, height=360, legend={"orientation": "h", "y": 1.1, "x": 0})
    figure.update_yaxes(title_text="share of the domain's tokens", tickformat=".0%", rangemode="tozero")
    by_layer(figure, shown)
    return figure


def experts_for_half(result: StudyResult) -> "Figure":
    """How many experts of a layer together receive half of a domain's assignments, beside the nulls.

    Args:
        result: Of a `RoutingStudy`.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for number, name in enumerate(result.domains):
        for routing, label in (("model", as_text(name)), ("random_router", NULLS["random_router"][0])):
            rows = _of(result, "layers", routing=routing, domain=name, measure="experts_50")
            own = routing == "model"
            told = as_text(name) if own else f"{as_text(name)}, {label}"
            if len(rows):
                figure.add_scatter(
                    x=rows["layer"],
                    y=rows["value"],
                    mode="lines+markers",
                    line={"color": colour(number), "width": 2 if own else 1.2, "dash": "solid" if own else "dot"},
                    marker={"size": 6 if own else 4},
                    name=label,
                    legendgroup=None if own else routing,
                    showlegend=own or number == 0,
                    hovertemplate=f"layer %{{x}}: %{{y}} experts<extra>{told}</extra>",
                )
    half = -(-int(result.manifest["plan"]["model"]["experts"]) // 2)
    _line(figure, float(half), f"uniform {half}", above=False)
    styled(figure, height=320, legend={"orientation": "h", "y": 1.1, "x": 0})
    figure.update_yaxes(title_text="experts for half of the assignments", rangemode="tozero")
    by_layer(figure, _of(result, "layers", routing="model", measure="experts_50")["layer"])
    return figure


def _of(result: StudyResult, table: str, **equal: Any) -> pd.DataFrame:
    return where(table_of(result, "routing", table), **equal)


def _baseline(result: StudyResult) -> float:
    model = result.manifest["plan"]["model"]
    return model["top_k"] / model["experts"]


def _line(figure: "Figure", y: float, text: str, *, above: bool) -> None:
    figure.add_hline(y=y, line={"dash": "dash", "color": MUTED, "width": 1.2})
    figure.add_annotation(
        xref="paper", x=1, y=y, yanchor="bottom" if above else "top", xanchor="right", showarrow=False,
        text=text, font={"color": MUTED},
    )  # fmt: skip
