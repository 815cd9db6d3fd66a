"""Ours beside what the paper's authors measured."""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from moe_lens.report.published_numbers import Published, published, same_model
from moe_lens.report.section import Section, Studies, facts, section
from moe_lens.studies import StudyResult
from moe_lens.studies.frames import where


def paper(studies: Studies) -> Section | None:
    """Ours beside what the paper's authors measured, for domains that they have and a model with as many experts."""
    model = facts(next(iter(studies.values())))
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
