"""Figures of the specialisation study."""

from typing import TYPE_CHECKING

from moe_lens.studies import Specialisation
from moe_lens.viz.style import MUTED, SCALE, colour, error_bars, styled
from moe_lens.viz.token_text import as_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def specialisation_map(result: Specialisation) -> "Figure":
    """Share of a domain's tokens that have each expert among their active ones: layers × experts, a map per domain."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    domains = list(result.domains.items())
    titles = [as_text(name) for name, _ in domains]
    row_height = max(110, 16 * len(domains[0][1].layers) + 30)
    height = row_height * len(domains) + 80
    figure = make_subplots(
        rows=len(domains), cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=34 / height
    )
    for row, (name, routing) in enumerate(domains, start=1):
        shares = routing.specialisation.numpy()
        figure.add_trace(
            go.Heatmap(
                z=shares,
                y=[str(layer) for layer in routing.layers],
                customdata=shares / routing.baseline,
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
    baseline = domains[0][1].baseline
    styled(figure, height=height)
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


def most_specialised(result: Specialisation) -> "Figure":
    """The most specialised expert of each layer and domain, with its interval over sources and the uniform baseline."""
    import plotly.graph_objects as go

    frame = result.most_specialised()
    figure = go.Figure()
    n_domains = len(result.domains)
    for number, (name, rows) in enumerate(frame.groupby("domain", sort=False)):
        offset = (number - (n_domains - 1) / 2) * 0.6 / n_domains
        figure.add_trace(
            go.Scatter(
                x=rows["layer"] + offset,
                y=rows["share"],
                error_y=error_bars(rows["share"], rows["low"], rows["high"]),
                mode="markers+text",
                text=rows["expert"].astype(str),
                textposition="middle right",
                textfont={"size": 9, "color": MUTED},
                marker={"color": colour(number), "size": 8},
                name=as_text(str(name)),
                customdata=rows[["layer", "expert"]],
                hovertemplate="layer %{customdata[0]}, expert %{customdata[1]}: %{y:.1%} of tokens",
            )
        )
    baseline = next(iter(result.domains.values())).baseline
    figure.add_hline(y=baseline, line={"dash": "dash", "color": MUTED, "width": 1.2})
    figure.add_annotation(
        xref="paper", x=1, y=baseline, yanchor="bottom", xanchor="right", showarrow=False,
        text=f"uniform {baseline:.1%}", font={"color": MUTED},
    )  # fmt: skip
    styled(figure, height=340, legend={"orientation": "h", "y": 1.08, "x": 0})
    figure.update_yaxes(title_text="share of the domain's tokens", tickformat=".0%", rangemode="tozero")
    figure.update_xaxes(title_text="layer", dtick=1, showgrid=False)
    return figure


def experts_for_half(result: Specialisation) -> "Figure":
    """How many experts of a layer together take half of a domain's assignments."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for number, (name, rows) in enumerate(result.coverage().groupby("domain", sort=False)):
        figure.add_trace(
            go.Scatter(
                x=rows["layer"],
                y=rows["experts"],
                mode="lines+markers",
                line={"color": colour(number), "width": 2},
                name=as_text(str(name)),
                hovertemplate="layer %{x}: %{y} experts",
            )
        )
    half = -(-next(iter(result.domains.values())).n_experts // 2)
    figure.add_hline(y=half, line={"dash": "dash", "color": MUTED, "width": 1.2})
    figure.add_annotation(
        xref="paper", x=1, y=half, yanchor="top", xanchor="right", showarrow=False,
        text=f"uniform {half}", font={"color": MUTED},
    )  # fmt: skip
    styled(figure, height=300, legend={"orientation": "h", "y": 1.1, "x": 0})
    figure.update_yaxes(title_text="experts that take half", rangemode="tozero")
    figure.update_xaxes(title_text="layer", dtick=1, showgrid=False)
    return figure
