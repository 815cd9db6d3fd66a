"""The section "Does routing depend on the domain?", and the families of tests on the page."""

from typing import Any

from moe_lens.report.section import Section, Studies, facts, rows_where, section
from moe_lens.stats.information_given_token import LEAST_SHARED, LEVEL
from moe_lens.stats.multiple_tests import smallest_holm
from moe_lens.studies import NULLS, StudyResult

COMPARED = ("model", "random_router", "token_unigram")
"""Routings that stand side by side: uniform routing depends on no domain."""


def domains(studies: Studies) -> Section | None:
    """Whether domains are routed differently, pair by pair; and whether the same token is."""
    result = studies.get("routing")
    if result is None or "domain_pairs" not in result.tables:
        return None
    routings = [routing for routing in COMPARED if routing in set(result.tables["domain_pairs"]["routing"])]
    return section(
        "domains",
        "Does routing depend on the domain?",
        pairs=_pairs(result, routings),
        layers=_layers(result, routings),
        routings=routings,
        nulls={null: NULLS[null] for null in routings if null in NULLS},
        top_k=facts(result)["top_k"],
        least_shared=LEAST_SHARED,
        level=LEVEL,
        families=families(studies),
    )


def _pairs(result: StudyResult, routings: list[str]) -> list[dict[str, Any]]:
    """Of each pair: the divergence of the layer where it is greatest, means over layers, and what the token leaves."""
    table, given = result.tables["domain_pairs"], result.tables["given_token_pairs"]
    rows = []
    for domain, other in rows_where(table, routing="model")[["domain", "other"]].drop_duplicates().to_numpy().tolist():
        own = rows_where(table, routing="model", domain=domain, other=other)
        beyond = rows_where(given, routing="model", domain=domain, other=other)
        of_pair = {"domain": domain, "other": other}
        rows.append(
            {
                **of_pair,
                "best": own.nlargest(1, "jsd").to_dict("records")[0],
                "told": (smallest_holm(own) or 0) <= LEVEL,
                "found": int((own["p_holm"] <= LEVEL).sum()),
                "layers": len(own),
                "excess": {r: float(rows_where(table, routing=r, **of_pair)["excess"].mean()) for r in routings},
                "given": {r: float(rows_where(given, routing=r, **of_pair)["excess"].mean()) for r in routings},
                "given_best": beyond.nlargest(1, "excess").to_dict("records")[:1],
                "findings": beyond["finding"].value_counts().to_dict(),
                "shared": float(beyond["shared"].mean()),
            }
        )
    return rows


def _layers(result: StudyResult, routings: list[str]) -> list[dict[str, Any]]:
    """Mutual information of expert and domain, layer by layer."""
    table = result.tables["domain_layers"]
    beside = {routing: rows_where(table, routing=routing).set_index("layer")["excess"] for routing in routings}
    return [
        {**row, "beside": {routing: float(beside[routing][row["layer"]]) for routing in routings}}
        for row in rows_where(table, routing="model").to_dict("records")
    ]


def families(studies: Studies) -> list[dict[str, Any]]:
    """The families that tests of the routing study are corrected in, each with the smallest p that it can reach."""
    result = studies.get("routing")
    if result is None:
        return []
    known = (family for family in _FAMILIES if family[0] in result.tables)
    return [_family(rows_where(result.tables[name], routing="model"), *said) for name, *said in known]


def _family(rows: Any, what: str, correction: str) -> dict[str, Any]:
    smallest = None
    if "smallest_p" in rows:  # tables of an earlier version may lack it
        alone = float(rows["smallest_p"].min())
        smallest = smallest_holm(rows) if correction == "Holm" else alone
    return {"what": what, "correction": correction, "tests": len(rows), "smallest": smallest}


_FAMILIES: tuple[tuple[str, str, str], ...] = (
    ("domain_experts", "experts, over domains, layers and experts", "maxT"),
    ("domain_layers", "mutual information of expert and domain, over layers", "Holm"),
    ("domain_pairs", "divergence of two domains, over pairs and layers", "Holm"),
    ("given_token_layers", "given the token, over layers", "Holm"),
    ("given_token_pairs", "given the token, over pairs and layers", "Holm"),
)
