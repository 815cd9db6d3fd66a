"""What patching and causal tracing found, place by place."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_lens.interventions.patch_result import PatchResult
from moe_lens.interventions.trace_result import TraceResult
from moe_lens.viz.style import styled
from moe_lens.viz.token_text import escaped

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

DIVERGING = [[0.0, "#b2182b"], [0.25, "#ef8a62"], [0.5, "#f7f7f7"], [0.75, "#67a9cf"], [1.0, "#2166ac"]]
"""Harm red, nothing white, help blue."""
PAIRS = 24
"""Experts that are shown where there are positions too: those with the greatest effect."""
GAP = 130
"""Pixels below a panel: its slanted tokens, the name of its axis, and the title of the next."""
PANELS = {
    "resid": "residual stream",
    "attn": "attention",
    "mlp": "MLP",
    "expert": "single experts",
    "coalition": "top experts together",
}


def patch_map(result: PatchResult) -> "Figure":
    """The effect of patching each place: 0 leaves the base as it is, 1 makes it the source. Layers × the other axis.

    Over layer, expert (or rank) and position, a row is an expert; those with the greatest effect are shown.

    Args:
        result: What `patch` gave.
    """
    import plotly.graph_objects as go

    axes = dict(result.axes)
    effect = result.effect.numpy()
    x = next((name for name in ("pos", "expert", "rank") if name in axes), "")
    columns = _labels(x, axes[x], result.tokens) if x else ["all"]
    rows, shown = [str(layer) for layer in axes["layer"]], effect.reshape(len(axes["layer"]), -1)
    unit = next((name for name in axes if name not in ("layer", "pos")), "")
    if effect.ndim == 3:
        pairs = [f"{layer}.{number}" for layer in axes["layer"] for number in axes[unit]]
        flat = effect.reshape(len(pairs), -1)
        best = sorted(np.argsort(-np.abs(flat).max(1), kind="stable")[:PAIRS].tolist())
        rows, shown = [pairs[i] for i in best], flat[best]
    title = f"layer.{unit}" if effect.ndim == 3 else "layer"
    cells = _heatmap(shown, columns, title, x, "effect", coloraxis="coloraxis", y=rows)
    figure = go.Figure(cells)
    styled(figure, height=max(240, 22 * len(rows) + 110))
    _plain_axes(figure, columns, x)
    figure.update_yaxes(title_text=title, type="category", autorange="reversed", showgrid=False)
    what = "restored" if result.direction == "denoising" else "destroyed"
    figure.update_layout(
        coloraxis=_colours(np.nanmax(np.abs(shown), initial=0.0), f"{what}<br>(1 = all)"),
        title={"text": f"{result.site}: {result.direction}, {escaped(result.metric)}", "font": {"size": 13}},
    )
    return figure


def trace_map(result: TraceResult) -> "Figure":
    """Mean effect of restoring each site on the answer's score, one panel per kind of site; hovering shows intervals.

    The subject's tokens, whose embeddings were corrupted, bear a star.

    Args:
        result: What `trace` gave.
    """
    from plotly.subplots import make_subplots

    shown = [name for name in PANELS if name in result.sites]
    heights = [22 * len(result.sites[name].axes["layer"]) + 10 for name in shown]
    whole = sum(heights) + GAP * (len(shown) - 1)
    figure = make_subplots(
        rows=len(shown), cols=1, subplot_titles=[PANELS[name] for name in shown],
        row_heights=heights, vertical_spacing=min(1.0, GAP / whole),
    )  # fmt: skip
    largest = 0.0
    for row, name in enumerate(shown, start=1):
        effects = result.sites[name]
        x = next(axis for axis in effects.axes if axis != "layer")
        columns = _labels(x, effects.axes[x], result.tokens, result.subject)
        low, high = (bound.numpy() for bound in effects.interval)
        mean = effects.mean.numpy()
        largest = max(largest, float(np.abs(mean).max(initial=0.0)))
        rows = [str(layer) for layer in effects.axes["layer"]]
        cells: Any = _heatmap(mean, columns, "layer", x, "effect", coloraxis="coloraxis", y=rows)
        cells.customdata = np.stack([low, high], -1)
        cells.hovertemplate = (
            f"layer %{{y}}, {x} %{{text}}<br>%{{z:.3f}} [%{{customdata[0]:.3f}}, %{{customdata[1]:.3f}}]<extra></extra>"
        )
        figure.add_trace(cells, row=row, col=1)
        _plain_axes(figure, columns, x, row=row, col=1)
        figure.update_yaxes(title_text="layer", type="category", autorange="reversed", showgrid=False, row=row, col=1)
    styled(figure, height=whole + 70 + GAP)
    floor = result.corrupted.mean().item()
    figure.update_layout(
        coloraxis=_colours(largest, f"effect on the<br>{escaped(result.score)}<br>({result.n} draws)"),
        title={
            "text": f"{escaped(result.score)}: {result.clean:.3f} clean, {floor:.3f} corrupted",
            "font": {"size": 13},
        },
        margin={"t": 70, "b": GAP},
    )
    return figure


def _heatmap(
    values: NDArray[Any], columns: Sequence[str], row_name: str, column_name: str, what: str, **options: Any
) -> Any:
    import plotly.graph_objects as go

    hover = f"{row_name} %{{y}}, {column_name} %{{text}}<br>{what} %{{z:.3f}}<extra></extra>"
    names = [list(columns)] * len(values)  # not x: of a column without a tick that is its place, not its name
    at = list(range(len(columns)))
    return go.Heatmap(z=values, x=at, text=names, xgap=1, ygap=1, hovertemplate=hover, **options)


def _labels(axis: str, at: Sequence[int], tokens: Sequence[str], starred: Sequence[int] = ()) -> list[str]:
    """Of the columns: positions bear their tokens where these are known."""
    if axis != "pos" or not tokens:
        return [str(number) for number in at]
    return [f"{escaped(tokens[number])}{'*' if number in starred else ''}" for number in at]


def _plain_axes(figure: "Figure", columns: Sequence[str], name: str, **where: Any) -> None:
    every = -(-len(columns) // 40)
    ticks = list(range(0, len(columns), every))
    figure.update_xaxes(
        title_text=name, tickmode="array", tickvals=ticks, ticktext=[columns[i] for i in ticks], showgrid=False, **where
    )


def _colours(largest: float, title: str) -> dict[str, Any]:
    bound = largest or 1.0
    bar = {"title": {"text": title, "font": {"size": 11}}, "thickness": 12}
    return {"colorscale": DIVERGING, "cmin": -bound, "cmax": bound, "colorbar": bar}
