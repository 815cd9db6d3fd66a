"""One page of any studies that were saved, with their tables beside it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moe_lens import viz
from moe_lens.report.published_numbers import Published, published, same_model
from moe_lens.report.report_files import OutputFolder
from moe_lens.stats import RoutingResult, SimilarityResult
from moe_lens.studies import SingleExpert, Specialisation, StudyResult
from moe_lens.studies.variant_losses import WHOLE, VariantLosses
from moe_lens.viz.style import styled

SHOWN = 200
"""Rows of a table that the page holds; the parquet file holds all."""
CONFIG = {"displayModeBar": False, "responsive": True}


def write_saved(
    results: Mapping[str, StudyResult] | Mapping[Path, StudyResult], folder: OutputFolder, *, version: str
) -> Path:
    """Write `report.html` and a parquet file for every table of every study; the path of the page.

    Args:
        results: By the folder that each was saved in.
        folder: Where to, entered.
        version: Of moe_lens.
    """
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("moe_lens.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["number"] = _number
    studies = [_shown(Path(path), result) for path, result in results.items()]
    page = environment.get_template("saved.html.jinja").render(
        version=version, plotly=Markup(get_plotlyjs()), studies=studies
    )

    def everything(into: Path) -> None:
        (into / "report.html").write_text(page, encoding="utf-8")
        for number, result in enumerate(results.values(), start=1):
            for name, table in result.tables.items():
                table.to_parquet(into / f"{number}-{result.study}-{name}.parquet", index=False)

    folder.fill(everything)
    return folder.path / "report.html"


def _shown(path: Path, result: StudyResult) -> dict[str, Any]:
    plan = result.manifest["plan"]
    return {
        "folder": path.name,
        "kind": result.study,
        "model": plan["model"],
        "reading": plan["reading"],
        "settings": plan["settings"] or "the usual ones",
        "command": result.manifest["command"],
        "read": result.manifest.get("read", []),
        "figures": [{"html": _html(figure), "caption": caption} for figure, caption in _figures(result)],
        "same_model": same_model(plan["model"]),
        "paper": list(_beside(result)),
        "tables": {name: _table(table) for name, table in result.tables.items()},
    }


def _html(figure: Any) -> Markup:
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG))


def _table(table: pd.DataFrame) -> dict[str, Any]:
    head = table.head(SHOWN)
    html = head.to_html(index=False, border=0, na_rep="–", float_format=lambda value: f"{value:.4g}")
    return {"rows": len(table), "shown": len(head), "html": Markup(html)}  # pandas escapes what it writes


def _number(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.4g}"


def _figures(result: StudyResult) -> Iterator[tuple[Any, str]]:
    if result.study == "routing":
        counts = {name: of["model routing"] for name, of in result.results.items()}
        special = Specialisation({name: of for name, of in counts.items() if isinstance(of, RoutingResult)})
        yield viz.specialisation_map(special), "Share of tokens that are sent to each expert."
        yield viz.most_specialised(special), "The most specialised expert of each layer; bars are 95 % intervals."
        yield viz.experts_for_half(special), "How many experts take half of a domain's assignments."
    if result.study == "single_expert":
        single = _single(result)
        for residual in (True, False):
            yield viz.similarity_by_layer(single, residual=residual), "Cosines, beside their controls."
        if all(len(by_k) > 1 for by_k in (*single.dropped.values(), *single.replaced.values())):
            yield viz.perplexity_by_k(single), "Perplexity by number of active experts, all layers at once."
    if result.study == "lens":
        for domain in result.domains:
            yield _lens(result.tables["lens"], domain), f"{domain}: what partial sums lack of the model's prediction."


def _single(result: StudyResult) -> SingleExpert:
    """The saved losses as the figures take them; without curves where not every k was run."""
    similarity, curves = {}, {"dropped": {}, "replaced": {}}
    for domain, of in result.results.items():
        cosines, losses = of["similarity"], of["losses"]
        assert isinstance(cosines, SimilarityResult) and isinstance(losses, VariantLosses)
        similarity[domain] = cosines
        top_k = losses.variants[0][2]
        for treatment, curve in curves.items():
            wanted = [(treatment, None, k) for k in range(top_k)]
            whole = losses.of(WHOLE, top_k)
            known = set(wanted) <= set(losses.variants)
            curve[domain] = (*(losses.of(treatment, k) for k in range(top_k)), whole) if known else (whole,)
    return SingleExpert(similarity, curves["dropped"], curves["replaced"], dict.fromkeys(similarity, True))


def _lens(table: pd.DataFrame, domain: str) -> Any:
    from plotly import graph_objects

    rows = table[(table["domain"] == domain) & (table["quantity"] == "kl_final")]
    figure = graph_objects.Figure()
    for which, line in rows.groupby("sum", sort=False):
        figure.add_scatter(x=line["layer"], y=line["mean"], name=str(which), mode="lines+markers")
    return styled(figure, xaxis_title="layer", yaxis_title="KL(final ‖ lens), nats", height=420)


def _beside(result: StudyResult) -> Iterator[dict[str, Any]]:
    """Ours and the authors', for domains that they have, and a model with as many active experts."""
    if result.manifest["plan"]["model"]["top_k"] != 6:
        return
    for domain in result.domains:
        theirs = published(domain)
        if theirs is not None:
            for row in _quantities(result, domain, theirs):
                yield {"domain": domain, "name": theirs.name, "low": None, "high": None, **row}


def _quantities(result: StudyResult, domain: str, theirs: Published) -> Iterator[dict[str, Any]]:
    tables = {name: table[table["domain"] == domain] for name, table in result.tables.items() if "domain" in table}
    if result.study == "single_expert":
        rows = tables["perplexity"].query("treatment == 'dropped' and layer.isna() and k > 0")
        for row in rows.to_dict("records"):
            ours = {
                "ours": row["geometric_ratio"],
                "low": row["geometric_ratio_low"],
                "high": row["geometric_ratio_high"],
            }
            yield {"quantity": f"perplexity, k = {row['k']} ÷ k = 6", "theirs": theirs.ratio(int(row["k"])), **ours}
        cosines = tables["similarity"].query("measure == 'top'")["mean"]
        yield {"quantity": "cosine, mean over layers", "ours": cosines.mean(), "theirs": theirs.cosine}
        yield {"quantity": "cosine, smallest layer", "ours": cosines.min(), "theirs": theirs.smallest_cosine}
    if result.study == "routing":
        most = tables["most_specialised"].query("routing == 'model'")
        best = most.loc[most["share"].idxmax()]
        ours = {"ours": best["share"], "low": best["low"], "high": best["high"]}
        yield {"quantity": "share of the most specialised expert", "theirs": theirs.most_specialised, **ours}
        half = tables["layers"].query("routing == 'model' and measure == 'experts_50'")["value"]
        yield {"quantity": "experts for half, mean over layers", "ours": half.mean(), "theirs": theirs.half}
