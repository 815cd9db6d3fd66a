"""One look for all figures."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, MUTED, GRID = "#1f2933", "#697586", "#e4e7eb"
PALETTE = ("#2563a8", "#d1495b", "#3b8f5a", "#b7791f", "#7a4fa3", "#0f8b8d", "#8a5a44", "#5b6770")
"""Of domains, in their order; used again from the start when there are more."""
SCALE = [[0.0, "#f7fafc"], [0.25, "#c6dbef"], [0.5, "#6baed6"], [0.75, "#2b7bba"], [1.0, "#0b3c6f"]]


def colour(number: int) -> str:
    """Of the domain with this number."""
    return PALETTE[number % len(PALETTE)]


def rgba(hexadecimal: str, opacity: float) -> str:
    """`#2563a8` at some opacity."""
    red, green, blue = (int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def error_bars(middle: Iterable[float], low: Iterable[float | None], high: Iterable[float | None]) -> dict[str, Any]:
    """Plotly's error bars from intervals; none where there is no interval."""
    bounds = [
        (m, m if lo is None else lo, m if hi is None else hi) for m, lo, hi in zip(middle, low, high, strict=True)
    ]
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, hi - m) if hi == hi else 0.0 for m, _, hi in bounds],
        "arrayminus": [max(0.0, m - lo) if lo == lo else 0.0 for m, lo, _ in bounds],
        "thickness": 1.2,
        "width": 2,
    }


FEW_LAYERS = 12
"""Whose numbers stand side by side on a telephone, too."""


def by_layer(figure: "Figure", layers: Iterable[int]) -> None:
    """An x axis of layers, from the first to the last, with as many numbers as there is room for and a tick for each.

    Args:
        figure: What it is the axis of.
        layers: Their numbers.
    """
    numbers = sorted(set(layers))
    many = len(numbers) > FEW_LAYERS
    each: dict[str, Any] = {"tickvals": numbers}
    ticks = {"minor": {"dtick": 1, "ticks": "outside", "ticklen": 3}} if many else each
    # Texts beside points take room, which plotly would find for them anyway.
    around = [numbers[0] - 0.7, numbers[-1] + 1.2] if numbers else None
    figure.update_xaxes(title_text="layer", showgrid=False, range=around, **ticks)


def least_width(figure: "Figure", pixels: int) -> None:
    """Do not draw a figure narrower than this on a page: it then scrolls sideways in its place.

    Args:
        figure: One with many columns.
        pixels: Of all of it.
    """
    figure.update_layout(meta={"least_width": pixels})


def styled(figure: "Figure", **layout: Any) -> "Figure":
    """The common look. Names on an axis are names, also where they look like dates ("2021-01")."""
    figure.update_layout(
        template="plotly_white",
        font={"family": FONT, "size": 12, "color": INK},
        margin={"l": 56, "r": 16, "t": 36, "b": 44},
        paper_bgcolor="white",
        plot_bgcolor="white",
        hoverlabel={"font": {"family": FONT, "size": 12}},
        **layout,
    )
    figure.update_annotations(font_size=12)
    figure.update_xaxes(gridcolor=GRID, zeroline=False)
    figure.update_yaxes(gridcolor=GRID, zeroline=False)
    traces: Any = figure.data
    for trace in traces:
        for axis in ("x", "y"):
            if trace[axis] is not None and any(isinstance(value, str) for value in trace[axis]):
                number = (trace[f"{axis}axis"] or axis)[1:]
                figure.layout[f"{axis}axis{number}"].type = "category"
    return figure
