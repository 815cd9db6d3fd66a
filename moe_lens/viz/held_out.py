"""Figures of what is predicted on held-out sources: choices of experts, and labels from experts."""

from typing import TYPE_CHECKING

from moe_lens.checked import Positive
from moe_lens.errors import InputError
from moe_lens.studies import StudyResult
from moe_lens.studies.frames import where
from moe_lens.viz.of_study import panels, table_of
from moe_lens.viz.style import MUTED, colour, error_bars
from moe_lens.viz.token_text import as_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

TOKEN, ALL = "token", "all"


def choices_explained(result: StudyResult) -> "Figure":
    """Share of experts' choices that is explained, by layer: by the token, by everything, and what each feature adds.

    Dotted is what a feature adds when it is shuffled over tokens.

    Args:
        result: Of an `Explain` study.
    """
    table = table_of(result, "explain", "layers")
    figure = panels(["explained", "added to the token"], "layer", "share of the squared error")
    for number, feature in enumerate(dict.fromkeys(table["feature"])):
        rows, both = where(table, feature=feature), feature in (TOKEN, ALL)
        name, ends = ("explained", "explained_") if both else ("gain", "gain_")
        look = {"color": colour(number), "width": 2}
        figure.add_scatter(
            x=rows["layer"],
            y=rows[name],
            error_y=error_bars(rows[name], rows[f"{ends}low"], rows[f"{ends}high"]),
            mode="lines+markers",
            line=look,
            name=as_text(str(feature)),
            hovertemplate="layer %{x}: %{y:.3f}",
            row=1,
            col=1 if both else 2,
        )
        if not both:
            figure.add_scatter(
                x=rows["layer"],
                y=rows["gain_shuffled"],
                mode="lines",
                line={**look, "dash": "dot", "width": 1.5},
                name=f"{as_text(str(feature))}, shuffled",
                showlegend=False,
                hovertemplate="layer %{x}: %{y:.3f}",
                row=1,
                col=2,
            )
    return figure


def probe_accuracy(result: StudyResult, k: Positive | None = None) -> "Figure":
    """Balanced accuracy of probes of k experts and of k neurons, by layer: a panel for each label.

    Dotted are probes of shuffled labels; .5 is chance.

    Args:
        result: Of a `Probe` study.
        k: How many components a probe sees; the fewest that were tried if not given.

    Raises:
        InputError: There are no probes of k.
    """
    table = table_of(result, "probe", "probes")
    tried = sorted(set(table["k"]))
    k = tried[0] if k is None else k
    if k not in tried:
        raise InputError(f"there are no probes of k = {k}; there are those of {tried}")
    labels = list(dict.fromkeys(table["label"]))
    figure = panels([str(label) for label in labels], "layer", f"balanced accuracy, k = {k}")
    for column, label in enumerate(labels, start=1):
        for number, kind in enumerate(dict.fromkeys(table["kind"])):
            rows, look = where(table, label=label, kind=kind, k=k), {"color": colour(number), "width": 2}
            figure.add_scatter(
                x=rows["layer"],
                y=rows["accuracy"],
                error_y=error_bars(rows["accuracy"], rows["low"], rows["high"]),
                mode="lines+markers",
                line=look,
                name=str(kind),
                legendgroup=str(kind),
                showlegend=column == 1,
                hovertemplate="layer %{x}: %{y:.3f}",
                row=1,
                col=column,
            )
            figure.add_scatter(
                x=rows["layer"],
                y=rows["shuffled"],
                mode="lines",
                line={**look, "dash": "dot", "width": 1.5},
                name=f"{kind}, shuffled labels",
                legendgroup=f"{kind} shuffled",
                showlegend=column == 1,
                hovertemplate="layer %{x}: %{y:.3f}",
                row=1,
                col=column,
            )
    figure.add_hline(y=0.5, line={"color": MUTED, "width": 1})
    return figure
