"""The headlines of the page, each beside what it is to be compared with."""

from typing import Any

from moe_lens.partial_sum import PartialSum
from moe_lens.report.domains_section import COMPARED
from moe_lens.report.rendering import ranged
from moe_lens.report.section import Section, Studies, facts, rows_where, section
from moe_lens.stats.multiple_tests import smallest_holm
from moe_lens.studies import NULLS, PruningStudy, StudyResult
from moe_lens.studies.matched_coalitions import PICKED, RANDOM


def findings(studies: Studies) -> Section | None:
    """The headlines, each beside what it is to be compared with."""
    of = {
        "routing": _concentration,
        "single_expert": _one_expert,
        "lens": _readings,
        "pruning": _smaller,
        "localisation": _localised,
    }
    found = {name: headline(studies[name]) if name in studies else None for name, headline in of.items()}
    found["domains"] = _dependence(studies["routing"]) if "routing" in studies else None
    return section("findings", "Findings", **found) if any(found.values()) else None


def _concentration(result: StudyResult) -> dict[str, Any]:
    model, most = facts(result), result.tables["most_specialised"]
    own, layers = rows_where(most, routing="model"), rows_where(result.tables["layers"], measure="experts_50")
    half = layers.pivot(index=["domain", "layer"], columns="routing", values="value")
    mean = layers.pivot_table(index="domain", columns="routing", values="value")
    nulls = [null for null in NULLS if null in half]
    return {
        "best": own.nlargest(1, "share").to_dict("records")[0],
        "pairs": len(own),
        "over": len(own.query("share > 0.5")),
        "wholly": len(own.query("low > 0.5")) if len(own.dropna(subset="low")) else None,
        "null_over": {null: len(rows_where(most, routing=null).query("share > 0.5")) for null in nulls},
        "half": ranged(mean["model"], ".1f"),
        "null_half": {null: ranged(mean[null], ".1f") for null in nulls},
        "fewer": len(half.query("random_router < model")) if "random_router" in nulls else None,
        "top_k": model["top_k"],
        "experts": model["experts"],
        "baseline": model["top_k"] / model["experts"],
    }


def _dependence(result: StudyResult) -> dict[str, Any] | None:
    """Tests between domains, of the model and of each null: how many of them find that experts depend on it."""
    if "domain_layers" not in result.tables:
        return None
    layers, given = result.tables["domain_layers"], result.tables["given_token_pairs"]
    found = {}
    for routing in (name for name in COMPARED if name in set(layers["routing"])):
        of, told = (
            rows_where(layers, routing=routing),
            rows_where(given, routing=routing).query("finding != 'cannot be told'"),
        )
        found[routing] = {
            "layers": int((of["p_holm"] <= 0.05).sum()),
            "excess": ranged(of["excess"], ".3f"),
            "given": int((told["finding"] == "depends on the domain").sum()),
            "told": len(told),
        }
    model = rows_where(layers, routing="model")
    can_tell = (smallest_holm(model) or 0) <= 0.05
    return {"of": found, "layers": len(model), "tests": len(rows_where(given, routing="model")), "can_tell": can_tell}


def _one_expert(result: StudyResult) -> dict[str, Any]:
    frame = rows_where(result.tables["perplexity"], layer=None)
    cost = {}
    for treatment, k in set(zip(frame["treatment"], frame["k"], strict=True)):
        ratio = rows_where(frame, treatment=treatment, k=k)["ratio"]
        cost[treatment, k] = ranged(100 * (ratio - 1), "+.0f", " %") if k else ranged(ratio, ".2f")
    mean = result.tables["similarity"].pivot_table(index="domain", columns="measure", values="mean", dropna=False)
    digits = {"top": ".3f", "random": ".3f", "none": ".3f", "rest_top": ".2f", "rest_random": ".2f"}
    cosines = {measure: ranged(mean[measure], form) for measure, form in digits.items()}
    greatest = rows_where(result.tables["similarity"], measure="top").groupby("domain")["mean"].max()
    return {
        "cost": cost,
        **cosines,
        "greatest": ranged(greatest, ".3f"),
        "several": facts(result)["top_k"] > 1,
        "unexplained": ranged(100 * mean["unexplained"], ".0f", " %"),
    }


def _readings(result: StudyResult) -> dict[str, str]:
    model = facts(result)
    frame = rows_where(result.tables["lens"], quantity="agrees_layer")
    frame = frame.query("layer in @model['moe_layers']")
    mean = frame.pivot_table(index="domain", columns="sum", values="mean")
    none, random, *_ = PartialSum.controls(model["top_k"], seed=result.manifest["plan"]["settings"]["seed"])
    sums = {"top": PartialSum(ranks=[0]), "none": none, "random": random}
    return {name: ranged(100 * mean[which.label], ".0f", " %") for name, which in sums.items()}


def _smaller(result: StudyResult) -> dict[str, Any]:
    table, model = result.tables["pruning"], facts(result)
    picked = rows_where(table, kind=PICKED)
    costs = {
        "own": picked[picked["plan"] == picked["domain"]],
        "others": picked[picked["plan"] != picked["domain"]],
        "random": rows_where(table, kind=RANDOM),
    }
    gone = PruningStudy(**result.manifest["plan"]["settings"]).gone(model["experts"], model["top_k"])
    percents = {
        name: ranged(100 * (rows["ratio"] - 1), "+.0f", " %") if len(rows) else None for name, rows in costs.items()
    }
    return {**percents, "gone": gone, "experts": model["experts"], "plans": len(costs["random"]) // len(result.domains)}


def _localised(result: StudyResult) -> dict[str, Any] | None:
    how = result.manifest["plan"]["settings"]["how"][0]
    rows = rows_where(result.tables["contrast"], how=how, control="matched").query("controls > 0")
    if not len(rows):
        return None
    numbers = ("own", "others", "control_own", "control_others", "estimate")
    untold = rows["low"].isna().any() or "beyond_low" not in rows  # too few sources, or saved by an earlier version
    above = None if untold else int(rows["starred"].sum())
    return {
        **{name: ranged(rows[name], ".2f") for name in numbers},
        "experts": ranged(rows["experts"], ".0f"),
        "control_experts": ranged(rows["control_experts"], ".0f"),
        "above": above,
        "domains": len(rows),
        "how": how,
    }
