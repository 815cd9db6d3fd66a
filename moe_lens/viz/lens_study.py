"""The figure of the study `lens`: what partial sums of a layer lack of the model's prediction."""

from typing import TYPE_CHECKING

from moe_lens.partial_sum import PartialSum
from moe_lens.studies import StudyResult
from moe_lens.studies.frames import where
from moe_lens.viz.of_study import panels, table_of
from moe_lens.viz.style import MUTED, PALETTE, error_bars

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

DASHES = ("dash", "dot", "dashdot", "longdash")


def lens_by_layer(result: StudyResult) -> "Figure":
    """KL(final ‖ lens) by layer, a panel for each domain: the layer, all its experts, and one of them beside controls.

    Args:
        result: Of a `LensStudy`.
    """
    frame = where(table_of(result, "lens", "lens"), quantity="kl_final")
    plan = result.manifest["plan"]
    controls = PartialSum.controls(plan["model"]["top_k"], seed=plan["settings"]["seed"])
    shown = (PartialSum(shared=True), PartialSum(), PartialSum(ranks=[0]), *controls)
    figure = panels(result.domains, "layer", "KL(final ‖ lens), nats")
    for column, domain in enumerate(result.domains, start=1):
        for number, which in enumerate(shown):
            rows = where(frame, domain=domain, sum=which.label)
            control = which in controls
            dash = DASHES[controls.index(which)] if control else "solid"
            figure.add_scatter(
                x=rows["layer"],
                y=rows["mean"],
                error_y=error_bars(rows["mean"], rows["low"], rows["high"]),
                mode="lines+markers",
                line={"color": MUTED if control else PALETTE[number], "width": 1.5 if control else 2, "dash": dash},
                marker={"size": 4},
                name=which.label,
                legendgroup=which.label,
                showlegend=column == 1,
                hovertemplate=f"layer %{{x}}: %{{y:.3f}} nats<extra>{which.label}</extra>",
                row=1,
                col=column,
            )
    figure.update_yaxes(rangemode="tozero")
    return figure
