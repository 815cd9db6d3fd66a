"""Sections of the page: functions from a model's studies to a part of it, or to nothing if it is not in them.

To add one, write such a function and put it into `SECTIONS`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pandas as pd
from markupsafe import Markup

from moe_lens import viz
from moe_lens.partial_sum import PartialSum
from moe_lens.report.published_numbers import Published, published, same_model
from moe_lens.report.rendering import ROWS, as_html, ranged, rendered, table_html
from moe_lens.stats import MEASURES, MIN_SOURCES
from moe_lens.studies import NULLS, PruningStudy, StudyResult, Verdicts, judge
from moe_lens.studies.frames import where
from moe_lens.studies.lens_examples import EXAMPLE_TOKENS, LensExample
from moe_lens.studies.matched_coalitions import PICKED, RANDOM
from moe_lens.studies.variant_losses import WHOLE
from moe_lens.viz.style import colour

Studies = Mapping[str, StudyResult]
"""Results of one model by the name of the study: "routing", "single_expert", "lens", …"""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    anchor: str
    title: str
    body: Markup

    def numbered(self, model: int) -> "Section":
        """With an anchor that no section of another model has."""
        return replace(self, anchor=self.anchor if model == 1 else f"{self.anchor}-{model}")


def section(anchor: str, title: str, **values: Any) -> Section:
    """A section from the template of its anchor's name in `sections/`."""
    return Section(anchor, title, Markup(rendered(f"sections/{anchor}.html.jinja", **values)))  # noqa: S704


def findings(studies: Studies) -> Section | None:
    """The headlines, each beside what it is to be compared with."""
    found: dict[str, Any] = {name: None for name in ("routing", "single", "lens")}
    if routing := studies.get("routing"):
        found["routing"] = _concentration(routing)
    if single := studies.get("single_expert"):
        found["single"] = _one_expert(single)
    if lens := studies.get("lens"):
        found["lens"] = _readings(lens)
    return section("findings", "Findings", **found) if any(found.values()) else None


def _concentration(result: StudyResult) -> dict[str, Any]:
    model, most = _facts(result), result.tables["most_specialised"]
    own, layers = where(most, routing="model"), where(result.tables["layers"], measure="experts_50")
    half = layers.pivot(index=["domain", "layer"], columns="routing", values="value")
    mean = layers.pivot_table(index="domain", columns="routing", values="value")
    nulls = [null for null in NULLS if null in half]
    return {
        "best": own.nlargest(1, "share").to_dict("records")[0],
        "pairs": len(own),
        "over": len(own.query("share > 0.5")),
        "wholly": len(own.query("low > 0.5")) if len(own.dropna(subset="low")) else None,
        "null_over": {null: len(where(most, routing=null).query("share > 0.5")) for null in nulls},
        "half": ranged(mean["model"], ".1f"),
        "null_half": {null: ranged(mean[null], ".1f") for null in nulls},
        "fewer": len(half.query("random_router < model")) if "random_router" in nulls else None,
        "top_k": model["top_k"],
        "experts": model["experts"],
        "baseline": model["top_k"] / model["experts"],
    }


def _one_expert(result: StudyResult) -> dict[str, Any]:
    frame = where(result.tables["perplexity"], layer=None)
    cost = {}
    for treatment, k in set(zip(frame["treatment"], frame["k"], strict=True)):
        ratio = where(frame, treatment=treatment, k=k)["ratio"]
        cost[treatment, k] = ranged(100 * (ratio - 1), "+.0f", " %") if k else ranged(ratio, ".2f")
    mean = result.tables["similarity"].pivot_table(index="domain", columns="measure", values="mean")
    shown = {"top": ".3f", "random": ".3f", "none": ".3f", "rest_top": ".2f", "rest_random": ".2f"}
    cosines = {measure: ranged(mean[measure], digits) for measure, digits in shown.items()}
    return {"cost": cost, **cosines, "unexplained": ranged(100 * mean["unexplained"], ".0f", " %")}


def _readings(result: StudyResult) -> dict[str, str]:
    model = _facts(result)
    frame = where(result.tables["lens"], quantity="agrees_layer")
    frame = frame.query("layer in @model['moe_layers']")
    mean = frame.pivot_table(index="domain", columns="sum", values="mean")
    none, random, *_ = PartialSum.controls(model["top_k"], seed=result.manifest["plan"]["settings"]["seed"])
    shown = {"top": PartialSum(ranks=[0]), "none": none, "random": random}
    return {name: ranged(100 * mean[which.label], ".0f", " %") for name, which in shown.items()}


def verdicts_of(studies: Studies) -> Verdicts | None:
    """The verdicts on the paper's claims; None if the studies read different texts."""
    plans = [result.manifest["plan"]["domains"] for result in studies.values()]
    return _judged(*studies.items()) if all(plan == plans[0] for plan in plans) else None


@lru_cache(maxsize=8)  # the page asks, and the file beside it, of every model
def _judged(*studies: tuple[str, StudyResult]) -> Verdicts:
    return judge(dict(studies))


def verdicts(studies: Studies) -> Section:
    """What the studies say about each claim of the paper."""
    found = verdicts_of(studies)
    values: dict[str, Any] = {"found": found, "same_model": same_model(_facts(next(iter(studies.values()))))}
    if found is not None:
        values |= {"rows": found.to_frame().to_dict("records"), "bounds": found.per_domain().to_dict("records")}
        values["sentences"] = [found.sentence(row) for row in found.rows]
    return section("verdicts", "Verdicts on the paper", **values)


def texts(studies: Studies) -> Section:
    """What was read, and how well the model predicts it."""
    rows = {row["name"]: row for result in studies.values() for row in result.manifest["read"]}
    whole: dict[str, dict[str, Any]] = {}
    if "single_expert" in studies:
        frame = where(studies["single_expert"].tables["perplexity"], treatment=WHOLE)
        whole = {row["domain"]: row for row in frame.to_dict("records")}
    return section(
        "texts",
        "Texts",
        rows=[{**row, "colour": colour(n), "whole": whole.get(row["name"])} for n, row in enumerate(rows.values())],
        few=[name for name, row in rows.items() if row["sources"] < MIN_SOURCES],
        least=MIN_SOURCES,
    )


def routing(studies: Studies) -> Section | None:
    """Which experts each domain is sent to."""
    result = studies.get("routing")
    if result is None:
        return None
    most = result.tables["most_specialised"]
    model, shares = _facts(result), most.pivot(index=["domain", "layer"], columns="routing", values="share")
    rows = where(most, routing="model").merge(shares.reset_index(), on=["domain", "layer"]).to_dict("records")
    figures = {"map": viz.specialisation_map, "most": viz.most_specialised, "half": viz.experts_for_half}
    return section(
        "routing",
        "Specialisation",
        figures={name: as_html(figure(result)) for name, figure in figures.items()},
        baseline=model["top_k"] / model["experts"],
        model=model,
        nulls={null: meaning for null, meaning in NULLS.items() if null in shares},
        rows=rows,
    )


def ensemble(studies: Studies) -> Section | None:
    """One expert against all active ones, in direction."""
    result = studies.get("single_expert")
    if result is None:
        return None
    means = result.tables["similarity"].pivot_table(index="measure", columns="domain", values="mean")
    return section(
        "ensemble",
        "One expert against the ensemble",
        with_residual=as_html(viz.similarity_by_layer(result, residual=True)),
        without_residual=as_html(viz.similarity_by_layer(result, residual=False)),
        domains=result.domains,
        means=means.to_dict("index"),
        measures={**MEASURES, "unexplained": "Var(S − a₀) / Var(S)"},
        top_k=_facts(result)["top_k"],
    )


def perplexity(studies: Studies) -> Section | None:
    """What fewer experts cost."""
    result = studies.get("single_expert")
    if result is None:
        return None
    frame = where(result.tables["perplexity"], layer=None)
    by_domain: dict[str, dict[str, dict[int, Any]]] = {}
    for row in frame.to_dict("records"):
        by_domain.setdefault(row["domain"], {}).setdefault(row["treatment"], {})[row["k"]] = row
    return section(
        "perplexity",
        "Fewer experts",
        figure=as_html(viz.perplexity_by_k(result)),
        by_domain=by_domain,
        ks=sorted(set(frame["k"].tolist()), reverse=True),
        top_k=_facts(result)["top_k"],
        alone=[row["name"] for row in result.manifest["read"] if row["sources"] == 1],
    )


def lens(studies: Studies) -> Section | None:
    """What a lens reads from layer to layer, and in one prompt of each domain."""
    result = studies.get("lens")
    if result is None:
        return None
    examples = []
    for domain, of in result.results.items():
        read = of["example"]
        assert isinstance(read, LensExample)
        one = {"domain": domain, "figure": as_html(viz.lens_table(read, read.positions[-1]))}
        tokens = {"prompt": read.prompt, "target": [read.target], "predicted": [read.predicted]}
        examples.append(one | {name: [viz.readable(read.text(t)) for t in of] for name, of in tokens.items()})
    by_layer = as_html(viz.lens_by_layer(result))
    return section("lens", "Lens", by_layer=by_layer, examples=examples, tokens=EXAMPLE_TOKENS)


def pruning(studies: Studies) -> Section | None:
    """What a domain loses with a part of the experts gone, beside random plans."""
    result = studies.get("pruning")
    if result is None:
        return None
    table, rows = result.tables["pruning"], []
    for domain in result.domains:
        random = where(table, domain=domain, kind=RANDOM)["ratio"]
        read = where(table, plan=domain, kind=PICKED).set_index("domain")["ratio"]
        own = where(table, domain=domain, plan=domain, kind=PICKED).to_dict("records")[0]
        beaten = float((random > own["ratio"]).mean())
        rows.append(
            {**own, "random": ranged(random, ".2f"), "beaten": beaten, "n": len(random), "read": read.to_dict()}
        )
    settings = result.manifest["plan"]["settings"]
    return section(
        "pruning",
        "Pruning",
        figure=as_html(viz.pruning_ratios(result)),
        rows=rows,
        domains=result.domains,
        gone=PruningStudy(**settings).gone(_facts(result)["experts"], _facts(result)["top_k"]),
        experts=_facts(result)["experts"],
        least=MIN_SOURCES,
    )


def localisation(studies: Studies) -> Section | None:
    """What taking out a domain's experts costs it, beyond what it costs others and what other experts would."""
    result = studies.get("localisation")
    if result is None:
        return None
    table = result.tables["contrast"]
    return section(
        "localisation",
        "Localisation",
        costs=as_html(viz.localisation_costs(result)),
        contrast=as_html(viz.localisation_contrast(result)),
        rows=where(table, control="matched").to_dict("records"),
        settings=result.manifest["plan"]["settings"],
        few=min(table["sources"]) < MIN_SOURCES,
        least=MIN_SOURCES,
    )


def paper(studies: Studies) -> Section | None:
    """Ours beside what the paper's authors measured, for domains that they have and a model with as many experts."""
    model = _facts(next(iter(studies.values())))
    rows = [row for result in studies.values() for row in _beside(result)] if model["top_k"] == 6 else []
    return section("paper", "Beside the paper", rows=rows, same_model=same_model(model)) if rows else None


def _beside(result: StudyResult) -> Iterator[dict[str, Any]]:
    for domain in result.domains:
        theirs = published(domain)
        if theirs is not None:
            for row in _quantities(result, domain, theirs):
                yield {"domain": domain, "name": theirs.name, "low": None, "high": None, **row}


def _quantities(result: StudyResult, domain: str, theirs: Published) -> Iterator[dict[str, Any]]:
    def of(table: str, **equal: Any) -> pd.DataFrame:
        return where(result.tables[table], domain=domain, **equal)

    if result.study == "single_expert":
        rows = of("perplexity", treatment="dropped", layer=None).query("k > 0")
        for row in rows.to_dict("records"):
            ours = {"ours": row["geometric_ratio"], **_ends(row, "geometric_ratio_")}
            yield {"quantity": f"perplexity, k = {row['k']} ÷ k = 6", "theirs": theirs.ratio(int(row["k"])), **ours}
        cosines = of("similarity", measure="top")["mean"]
        yield {"quantity": "cosine, mean over layers", "ours": cosines.mean(), "theirs": theirs.cosine}
        yield {"quantity": "cosine, smallest layer", "ours": cosines.min(), "theirs": theirs.smallest_cosine}
    if result.study == "routing":
        best = of("most_specialised", routing="model").nlargest(1, "share").to_dict("records")[0]
        ours = {"ours": best["share"], **_ends(best, "")}
        yield {"quantity": "share of the most specialised expert", "theirs": theirs.most_specialised, **ours}
        half = of("layers", routing="model", measure="experts_50")["value"]
        yield {"quantity": "experts for half, mean over layers", "ours": half.mean(), "theirs": theirs.half}


def _ends(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {end: row[f"{prefix}{end}"] for end in ("low", "high")}


def tables(studies: Studies) -> Section:
    """Every table of every study."""
    shown = {
        study: {name: {"rows": len(table), "html": table_html(table)} for name, table in result.tables.items()}
        for study, result in studies.items()
    }
    return section("tables", "Tables", studies=shown, most=ROWS)


def method(studies: Studies) -> Section:
    """How all of it was measured."""
    return section(
        "method", "Method", manifests=[dict(result.manifest) for result in studies.values()], least=MIN_SOURCES
    )


SECTIONS: tuple[Callable[[Studies], Section | None], ...] = (
    findings,
    verdicts,
    texts,
    routing,
    ensemble,
    perplexity,
    lens,
    pruning,
    localisation,
    paper,
    method,
    tables,
)


def _facts(result: StudyResult) -> dict[str, Any]:
    return result.manifest["plan"]["model"]
