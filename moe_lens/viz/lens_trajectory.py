"""What a lens reads from layer to layer: how far from the model's prediction, how sure, how near the target."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from moe_lens.checked import Natural
from moe_lens.lenses import LensResult
from moe_lens.viz.lens_cells import place
from moe_lens.viz.style import MUTED, PALETTE, styled
from moe_lens.viz.token_text import as_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLOURS = PALETTE[:-1]
"""Of what is no control: the last one is nearly their grey."""
DASHES = ("dash", "dot", "dashdot")
"""Of controls, in their order."""


class _Panel(NamedTuple):
    name: str
    quantity: str
    shown: str
    """d3's number format on hovering."""


PANELS = (
    _Panel("KL(final ‖ lens), nats", "kl_final", ".3f"),
    _Panel("KL(ensemble ‖ lens), nats", "kl_ensemble", ".3f"),
    _Panel("entropy, nats", "entropy", ".3f"),
    _Panel("rank of the target", "target_rank", ".1~f"),
)


def lens_trajectory(result: LensResult, *, position: int | None = None, batch: Natural = 0) -> "Figure":
    """KL to the final prediction and to the ensemble, entropy and target rank over layers, one line for each sum.

    Controls (u alone, u + an expert drawn at random) are grey and dashed: a line that stays with them says nothing
    about its experts. Over several tokens a line is the mean, and for the target's rank the median; sums of experts
    that a token did not select, and tokens without a target, do not count. The axis of the target's rank is
    logarithmic in rank + 1.

    Args:
        result: What a lens read, in at least one layer.
        position: One of `result.positions`; all tokens that were read if not given.
        batch: Which row of the batch, for a position.

    Raises:
        InputError: The result does not have that position or row.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    where = None if position is None else place(result, position, batch)
    figure = make_subplots(
        rows=2, cols=2, shared_xaxes=True, subplot_titles=[panel.name for panel in PANELS], vertical_spacing=0.12
    )
    looks = _looks(result)
    for number, panel in enumerate(PANELS):
        values = getattr(result, panel.quantity)
        values = values if where is None else values[:, :, where[0], where[1], None, None]
        middle, counted = _middle(values.flatten(2), ranks=panel.quantity == "target_rank")
        for j, which in enumerate(result.sums):
            rank = panel.quantity == "target_rank"
            figure.add_trace(
                go.Scatter(
                    x=list(result.layers),
                    y=[None if value != value else value + rank for value in middle[:, j].tolist()],
                    customdata=list(zip(middle[:, j].tolist(), counted[:, j].tolist(), strict=True)),
                    name=as_text(which.label),
                    legendgroup=str(j),
                    showlegend=number == 0,
                    mode="lines+markers",
                    hovertemplate=f"layer %{{x}}: %{{customdata[0]:{panel.shown}}}"
                    f"<br>%{{customdata[1]}} tokens<extra>{as_text(which.label)}</extra>",
                    **looks[j],
                ),
                row=1 + number // 2,
                col=1 + number % 2,
            )
    styled(figure, height=560, legend={"orientation": "h", "y": -0.12})
    figure.update_xaxes(tickvals=list(result.layers), title_text="layer", row=2)
    figure.update_yaxes(rangemode="tozero")
    _logarithmic(figure)
    return figure


def _middle(
    values: Shaped[Tensor, "layer sum tokens"], *, ranks: bool
) -> tuple[Float[Tensor, "layer sum"], Float[Tensor, "layer sum"]]:
    """Mean over the tokens that have a value, or median of ranks, and how many they are."""
    there = values >= 0 if ranks else ~values.isnan()
    wide = values.double().where(there, torch.nan)
    lower, upper = wide.nanmedian(-1).values, -(-wide).nanmedian(-1).values  # torch takes the lower of two
    return (lower + upper) / 2 if ranks else wide.nanmean(-1), there.sum(-1).double()


def _looks(result: LensResult) -> list[dict[str, Any]]:
    """A colour for each sum, in order; grey and a dash of its own for each control."""
    looks: list[dict[str, Any]] = []
    controls = others = 0
    for which in result.sums:
        if which.control:
            line = {"color": MUTED, "dash": DASHES[controls % len(DASHES)], "width": 1.5}
            controls += 1
        else:
            line = {"color": COLOURS[others % len(COLOURS)], "width": 2}
            others += 1
        looks.append({"line": line, "marker": {"size": 5}})
    return looks


def _logarithmic(figure: "Figure") -> None:
    """The rank axis: rank + 1 on a logarithmic scale, labelled with the rank."""
    marks = [0, 1, 3, 9, 29, 99, 299, 999, 2999, 9999, 29999, 99999]
    figure.update_yaxes(
        type="log",
        rangemode="normal",
        tickvals=[mark + 1 for mark in marks],
        ticktext=[f"{mark}" for mark in marks],
        row=2,
        col=2,
    )
