"""Figures of what is predicted on held-out sources: choices of experts, and labels from experts."""

from typing import TYPE_CHECKING, Any

from moe_lens.checked import Positive
from moe_lens.errors import InputError
from moe_lens.studies import StudyResult
from moe_lens.studies.frames import where
from moe_lens.viz.of_study import add_by_layer, panels, table_of
from moe_lens.viz.style import MUTED
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
        value = "explained" if both else "gain"
        ends, name = (f"{value}_low", f"{value}_high"), as_text(str(feature))
        add_by_layer(figure, rows, value, ends, name=name, number=number, column=1 if both else 2)
        if not both:
            shuffled = f"{name}, shuffled"
            add_by_layer(figure, rows, "gain_shuffled", name=shuffled, number=number, column=2, legend=False)
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
            rows = where(table, label=label, kind=kind, k=k)
            how: dict[str, Any] = {"number": number, "column": column, "legend": column == 1}
            add_by_layer(figure, rows, "accuracy", ("low", "high"), name=str(kind), **how)
            add_by_layer(figure, rows, "shuffled", name=f"{kind}, shuffled labels", **how)
    figure.add_hline(y=0.5, line={"color": MUTED, "width": 1})
    return figure
