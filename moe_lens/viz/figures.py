"""The figures that each result has, by name; and figures as files: PDF and SVG for print, HTML for the rest."""

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lens.checked import Positive
from moe_lens.errors import InputError, a_kind, near_miss
from moe_lens.interventions import ExpertAttribution
from moe_lens.interventions.patch_result import PatchResult
from moe_lens.interventions.trace_result import TraceResult
from moe_lens.lenses import LensResult
from moe_lens.pruning.frontier import Frontier
from moe_lens.storage import written_whole
from moe_lens.studies import StudyResult

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

OF_STUDIES: Mapping[str, tuple[str, ...]] = {
    "routing": ("specialisation_map", "most_specialised", "experts_for_half"),
    "single_expert": ("similarity_by_layer", "perplexity_by_k"),
    "lens": ("lens_by_layer",),
    "localisation": ("localisation_contrast", "localisation_costs"),
    "ablation": ("ablation_costs",),
    "pruning": ("pruning_ratios",),
    "attribution-fidelity": ("attribution_agreement",),
    "contrast": ("contrast_map", "contrast_steering"),
    "explain": ("choices_explained",),
    "probe": ("probe_accuracy",),
    "checkpoints": ("routing_overlap", "swapped_router_costs"),
}
"""Functions of `moe_lens.viz` that draw the result of a study, by its name; the first is drawn if none is named."""
OF_RESULTS: Mapping[type, tuple[str, ...]] = {
    LensResult: ("lens_trajectory", "lens_table"),
    ExpertAttribution: ("attribution_map",),
    PatchResult: ("patch_map",),
    TraceResult: ("trace_map",),
    Frontier: ("frontier", "specialists"),
}
"""Likewise, of other results."""
INSTEAD: Mapping[str, str] = {
    "atlas": "its .expert(layer, expert) is the card of an expert, and moe_lens.atlas.write_atlas(it, folder) its pages"
}
"""What to look at where a study has no figure and yet is shown."""
FORMATS = ("pdf", "svg", "png", "html")


def figures_of(result: Any) -> tuple[str, ...]:
    """Names of the functions of `moe_lens.viz` that draw a result; none for a result that has only tables.

    Args:
        result: Any result of moe_lens.
    """
    if isinstance(result, StudyResult):
        return OF_STUDIES.get(result.study, ())
    return next((drawn for kind, drawn in OF_RESULTS.items() if isinstance(result, kind)), ())


def figure(result: Any, name: str | None = None, **options: Any) -> "Figure":
    """A figure of a result: what its method `figure` gives.

    Args:
        result: Any that has figures; a saved study, too.
        name: Of the function of `moe_lens.viz`; the first one of `figures_of` if not given.
        options: Of that function, such as `position=` of `lens_table`.

    Raises:
        InputError: It has no figure, or none of that name; or options that are not of it.
    """
    known = figures_of(result)
    if not known and isinstance(result, StudyResult):
        instead = INSTEAD.get(result.study, f"its numbers are in its tables: {', '.join(result.tables)}")
        raise InputError(f"there is no figure of a study {result.study!r}; {instead}")
    if not known:
        drawn = ", ".join(kind.__name__ for kind in (StudyResult, *OF_RESULTS))
        raise InputError(f"there is no figure of {a_kind(result)}; there are figures of {drawn}")
    if name is not None and name not in known:
        raise InputError(f"there is no figure {name!r} of it; there are {', '.join(known)}{near_miss(name, known)}")
    name = known[0] if name is None else name
    draw = getattr(importlib.import_module("moe_lens.viz"), name)
    try:
        inspect.signature(draw).bind(result, **options)
    except TypeError as error:
        raise InputError(f"{name}: {error}") from None
    return draw(result, **options)


def save_figure(
    figure: "Figure", path: str | Path, *, width: Positive | None = None, height: Positive | None = None
) -> Path:
    """Write a figure as PDF, SVG, PNG or HTML, as the path ends; whole or not at all, and offline.

    All but HTML take `pip install 'moe-lens[figures]'` (kaleido), and Chrome or Chromium on the path.

    Args:
        figure: Of plotly.
        path: The file.
        width: In pixels; plotly's, 700, if not given.
        height: In pixels; the figure's own if not given.

    Raises:
        InputError: Another ending, no kaleido, no browser, or the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise InputError(f"{path}: expected a name that ends in {', '.join(f'.{one}' for one in FORMATS)}")
    with written_whole(path) as temporary:
        if kind == "html":
            temporary.write_text(figure.to_html(include_plotlyjs=True), encoding="utf-8")
        else:
            temporary.write_bytes(_drawn(figure, kind, width, height))
    return path


def _drawn(figure: "Figure", kind: str, width: int | None, height: int | None) -> bytes:
    try:
        kaleido = importlib.import_module("kaleido")  # an extra of ours
        no_browser = importlib.import_module("kaleido.errors").ChromeNotFoundError
    except ImportError:
        raise InputError(
            f"a figure as {kind.upper()} takes kaleido: pip install 'moe-lens[figures]'; .html needs nothing"
        ) from None
    size = {"width": width or figure.layout.width or 700, "height": height or figure.layout.height or 500}
    try:
        # Without MathJax, which would be asked of the network: our figures have no formulas.
        return kaleido.calc_fig_sync(figure.to_dict(), opts={"format": kind, **size}, kopts={"mathjax": False})
    except no_browser:
        raise InputError(
            f"a figure as {kind.upper()} is drawn by Chrome or Chromium, and there is none; install one, or put its "
            "path into BROWSER_PATH; .html needs nothing"
        ) from None
