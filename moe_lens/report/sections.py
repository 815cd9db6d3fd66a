"""Sections of the page: functions from a model's studies to a part of it, or to nothing if it is not in them.

To add one, write such a function and put it into `SECTIONS`.
"""

from collections.abc import Callable
from typing import Any

import torch

from moe_lens import viz
from moe_lens.partial_sum import PartialSum
from moe_lens.report.beside_paper_section import paper
from moe_lens.report.domains_section import domains, families
from moe_lens.report.findings_section import findings
from moe_lens.report.rendering import ROWS, as_html, ranged, table_html
from moe_lens.report.section import Section, Studies, facts, section
from moe_lens.report.verdict_section import verdicts
from moe_lens.stats import MEASURES, MIN_SOURCES
from moe_lens.studies import NULLS, PruningStudy, StudyResult
from moe_lens.studies.claim_rules import RESAMPLES
from moe_lens.studies.frames import where
from moe_lens.studies.lens import NONE
from moe_lens.studies.lens_examples import EXAMPLE_TOKENS, LensExample
from moe_lens.studies.matched_coalitions import PICKED, RANDOM, beaten
from moe_lens.studies.variant_losses import WHOLE
from moe_lens.viz.specialisation import NAMED
from moe_lens.viz.style import colour


def texts(studies: Studies) -> Section:
    """What was read, by which studies: not all read as much; and how well the model predicts it."""
    whole: dict[str, dict[str, Any]] = {}
    if "single_expert" in studies:
        frame = where(studies["single_expert"].tables["perplexity"], treatment=WHOLE)
        whole = {row["domain"]: row for row in frame.to_dict("records")}
    readings: list[dict[str, Any]] = []
    for name, result in studies.items():
        rows, context = list(result.manifest["read"]), _context(result)
        same = next((each for each in readings if (each["rows"], each["context"]) == (rows, context)), None)
        if same is None:
            readings.append(same := {"rows": rows, "context": context, "studies": [], "whole": {}})
        same["studies"].append(name)
        if name == "single_expert":
            same["whole"] = whole
    readings.sort(key=lambda each: -sum(row["tokens"] for row in each["rows"]))
    for each in readings:
        each["few"] = [row["name"] for row in each["rows"] if row["sources"] < MIN_SOURCES]
    names = dict.fromkeys(row["name"] for each in readings for row in each["rows"])
    colours = {name: colour(n) for n, name in enumerate(names)}
    return section("texts", "Texts", readings=readings, colours=colours, least=MIN_SOURCES)


def _context(result: StudyResult) -> int | None:
    return result.manifest["plan"]["reading"].get("context")


def _read(result: StudyResult) -> str:
    """How much a study read."""
    tokens = ranged([row["tokens"] for row in result.manifest["read"]], ",.0f")
    context = _context(result)
    return f"{tokens} tokens of each domain" + (f", in windows of at most {context} tokens" if context else "")


def routing(studies: Studies) -> Section | None:
    """Which experts each domain is sent to."""
    result = studies.get("routing")
    if result is None:
        return None
    most = result.tables["most_specialised"]
    model, shares = facts(result), most.pivot(index=["domain", "layer"], columns="routing", values="share")
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
        named=len(rows) <= NAMED,
    )


def ensemble(studies: Studies) -> Section | None:
    """One expert against all active ones, in direction."""
    result = studies.get("single_expert")
    if result is None:
        return None
    means = result.tables["similarity"].pivot_table(index="measure", columns="domain", values="mean", dropna=False)
    return section(
        "ensemble",
        "One expert against the ensemble",
        with_residual=as_html(viz.similarity_by_layer(result, residual=True)),
        without_residual=as_html(viz.similarity_by_layer(result, residual=False)),
        domains=result.domains,
        means=means.to_dict("index"),
        measures={**MEASURES, "unexplained": "Var(S − a₀) / Var(S)"},
        top_k=facts(result)["top_k"],
    )


def perplexity(studies: Studies) -> Section | None:
    """What fewer experts cost."""
    result = studies.get("single_expert")
    if result is None:
        return None
    frame = where(result.tables["perplexity"], layer=None)
    if not set(frame["treatment"]) - {WHOLE}:
        return None  # of each layer by itself
    by_domain: dict[str, dict[str, dict[int, Any]]] = {}
    for row in frame.to_dict("records"):
        by_domain.setdefault(row["domain"], {}).setdefault(row["treatment"], {})[row["k"]] = row
    return section(
        "perplexity",
        "Fewer experts",
        figure=as_html(viz.perplexity_by_k(result)),
        by_domain=by_domain,
        ks=sorted(set(frame["k"].tolist()), reverse=True),
        top_k=facts(result)["top_k"],
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
    sums = _five_sums(result)
    return section("lens", "Lens", by_layer=by_layer, sums=sums, examples=examples, tokens=EXAMPLE_TOKENS)


def _five_sums(result: StudyResult) -> list[dict[str, str]]:
    """What the verdict reads of u + one expert, and of what it is compared with: means over layers with experts."""
    model, seed = facts(result), result.manifest["plan"]["settings"].get("seed", 0)
    frame: Any = result.tables["lens"].query("layer in @model['moe_layers']")
    none, active, last, unselected = PartialSum.controls(model["top_k"], seed=seed)
    said = {none: "u alone", PartialSum(ranks=[0]): "u + rank 0, the top expert", active: "u + a random active expert"}
    said.setdefault(last, "u + the last active expert")  # of a single active one it is rank 0
    said[unselected] = "u + an expert that was not selected"
    distance: Any = where(frame, quantity="kl_ensemble").pivot(index=["domain", "layer"], columns="sum", values="mean")
    left = distance.div(distance[NONE.label], axis=0).groupby("domain").mean()
    rows = []
    for which, label in said.items():
        own: Any = where(frame, sum=which.label).groupby(["quantity", "domain"])["mean"].mean()
        shares = {
            name: ranged(100 * own[name], ".0f", " %") if name in own else "–"
            for name in ("agrees_ensemble", "agrees_final", "agrees_where_it_matters")
        }
        rows.append({"sum": label, "left": ranged(left[which.label], ".2f"), **shares})
    return rows


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
        others = where(table, domain=domain).query("kind not in (@PICKED, @RANDOM)").to_dict("records")
        rows.append(
            {
                **own,
                "others": others,
                "random": ranged(random, ".2f"),
                "beaten": beaten(-torch.tensor(random.to_numpy()), -own["ratio"]),
                "n": len(random),
                "read": read.to_dict(),
            }
        )
    settings = result.manifest["plan"]["settings"]
    return section(
        "pruning",
        "Pruning",
        figure=as_html(viz.pruning_ratios(result)),
        rows=rows,
        others=[one["gone"] for one in rows[0]["others"]],
        domains=result.domains,
        read=_read(result),
        gone=PruningStudy(**settings).gone(facts(result)["experts"], facts(result)["top_k"]),
        experts=facts(result)["experts"],
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
        read=_read(result),
        settings=result.manifest["plan"]["settings"],
        few=min(table["sources"]) < MIN_SOURCES,
        least=MIN_SOURCES,
    )


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
        "method",
        "Method",
        manifests=[dict(result.manifest) for result in studies.values()],
        families=families(studies),
        resamples=RESAMPLES,
        least=MIN_SOURCES,
    )


SECTIONS: tuple[Callable[[Studies], Section | None], ...] = (
    verdicts,
    findings,
    texts,
    routing,
    domains,
    ensemble,
    perplexity,
    lens,
    pruning,
    localisation,
    paper,
    method,
    tables,
)
