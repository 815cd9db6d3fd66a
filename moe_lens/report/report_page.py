"""The HTML page: numbers and figures into a template, everything inside one file."""

from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moe_lens import viz
from moe_lens.report.published_numbers import published as published_of
from moe_lens.report.run_report import Report
from moe_lens.stats import MEASURES, MIN_SOURCES
from moe_lens.viz.style import colour

CONFIG = {"displayModeBar": False, "responsive": True}


def render(report: Report, tables: dict[str, pd.DataFrame], *, version: str) -> str:
    """The page as HTML that needs no network: plotly.js is inside, once.

    Args:
        report: What to show.
        tables: `report.tables()`.
        version: Of moe_lens.
    """
    from plotly.offline import get_plotlyjs

    domains = [_domain(report, number) for number in range(len(report.domains))]
    return (
        environment()
        .get_template("page.html.jinja")
        .render(
            version=version,
            report=report,
            model=report.model,
            settings=report.settings,
            plotly=Markup(get_plotlyjs()),
            domains=domains,
            findings=_findings(report, tables),
            few_sources=[domain["name"] for domain in domains if domain["sources"] < MIN_SOURCES],
            min_sources=MIN_SOURCES,
            baseline=report.model["top_k"] / report.model["experts"],
            measures=MEASURES,
            most_specialised=_by_domain(tables["most_specialised"]),
            perplexity=_by_domain(tables["perplexity"]),
            similarity=_similarity(report),
            examples=_examples(report),
            paper=_paper(report, tables),
            figures={
                "map": as_html(viz.specialisation_map(report.specialisation)),
                "most": as_html(viz.most_specialised(report.specialisation)),
                "half": as_html(viz.experts_for_half(report.specialisation)),
                "with_residual": as_html(viz.similarity_by_layer(report.single_expert, residual=True)),
                "without_residual": as_html(viz.similarity_by_layer(report.single_expert, residual=False)),
                "perplexity": as_html(viz.perplexity_by_k(report.single_expert)),
            },
        )
    )


def environment() -> Environment:
    """Templates of this package; everything that is put into them is escaped."""
    made = Environment(
        loader=PackageLoader("moe_lens.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    made.filters |= {"percent": _percent, "number": _number, "span": _span}
    return made


def as_html(figure: Any) -> Markup:
    """A figure as part of a page that has plotly.js."""
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG))


def _missing(value: float | None) -> bool:
    return value is None or value != value


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or _missing(value) else f"{100 * value:.{digits}f} %"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or _missing(value) else f"{value:,.{digits}f}"


def _span(low: float | None, high: float | None, digits: int = 2, percent: bool = False) -> str:
    if low is None or high is None or _missing(low) or _missing(high):
        return "–"
    scale = 100 if percent else 1
    return f"{scale * low:.{digits}f}–{scale * high:.{digits}f}"


def _by_domain(table: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    return {str(name): rows.to_dict("records") for name, rows in table.groupby("domain", sort=False)}


def _domain(report: Report, number: int) -> dict[str, Any]:
    tokens = report.domains[number]
    whole = report.single_expert.dropped[tokens.domain][-1]
    interval = whole.interval()
    return {
        "name": tokens.domain,
        "windows": tokens.n_rows,
        "sources": len(tokens.sources),
        "tokens": tokens.n_tokens,
        "loss": whole.loss,
        "perplexity": whole.perplexity,
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
        "apart": report.single_expert.apart[tokens.domain],
        "colour": colour(number),
    }


def _similarity(report: Report) -> dict[str, dict[str, float]]:
    """Mean over layers of each measure, by domain."""
    return {
        name: {measure: float(result.mean(measure).mean()) for measure in MEASURES}
        | {"smallest": float(result.mean("top").min()), "unexplained": float(result.unexplained.mean())}
        for name, result in report.single_expert.similarity.items()
    }


def _examples(report: Report) -> list[dict[str, Any]]:
    shown = []
    for example in report.lens:
        position = example.result.positions[0]
        shown.append(
            {
                "domain": example.domain,
                "prompt": [viz.readable(example.texts[token]) for token in example.prompt],
                "target": viz.readable(example.texts[example.target]),
                "predicted": viz.readable(example.texts[example.predicted]),
                "figure": as_html(viz.lens_table(example.result, position)),
            }
        )
    return shown


def _range(values: list[float], shown: str, unit: str = "") -> str:
    low, high = (format(value, shown) for value in (min(values), max(values)))
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def _findings(report: Report, tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    most, single = tables["most_specialised"], report.single_expert
    top_k = report.model["top_k"]
    best = max(most.to_dict("records"), key=lambda row: row["share"])
    cosines = _similarity(report).values()
    dropped = {k: [by_k[k].ratio(by_k[-1]) for by_k in single.dropped.values()] for k in (0, 1)}
    replaced = [by_k[1].ratio(by_k[-1]) for by_k in single.replaced.values()]
    return {
        "best": best,
        "pairs": len(most),
        "over_half": sum(share > 0.5 for share in most["share"]),
        "half": _range(tables["experts_for_half"]["experts"].astype(float).tolist(), ".0f"),
        "one": _range([100 * (ratio - 1) for ratio in dropped[1]], "+.0f", " %"),
        "one_replaced": _range([100 * (ratio - 1) for ratio in replaced], "+.0f", " %"),
        "none": _range(dropped[0], ".2f"),
        "top": _range([values["top"] for values in cosines], ".3f"),
        "alone": _range([values["none"] for values in cosines], ".3f"),
        "rest": _range([values["rest_top"] for values in cosines], ".2f"),
        "unexplained": _range([100 * values["unexplained"] for values in cosines], ".0f", " %"),
        "top_k": top_k,
    }


def _paper(report: Report, tables: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """The authors' numbers beside ours, for the embedded domains and a model with as many active experts."""
    if report.model["top_k"] != 6:
        return []
    most, half, similarity = tables["most_specialised"], tables["experts_for_half"], _similarity(report)
    rows = []
    for tokens in report.domains:
        published = published_of(tokens.domain)
        if published is None:
            continue
        by_k = report.single_expert.dropped[tokens.domain]
        whole = by_k[-1].geometric_perplexity
        rows.append(
            {
                "domain": tokens.domain,
                "published": published,
                "most": float(most.loc[most["domain"] == tokens.domain, "share"].max()),
                "half": float(half.loc[half["domain"] == tokens.domain, "experts"].mean()),
                "cosine": similarity[tokens.domain]["top"],
                "smallest": similarity[tokens.domain]["smallest"],
                "one": by_k[1].geometric_perplexity / whole,
                "three": by_k[3].geometric_perplexity / whole,
            }
        )
    return rows
