"""What is to be known beside a verdict, computed from the same studies: which cosine is which, and cautions."""

from collections.abc import Mapping
from typing import Any

from moe_lens.report.paper_quotes import QUOTED
from moe_lens.report.rendering import ranged
from moe_lens.report.section import Studies, rows_where
from moe_lens.report.verdict_words import shown
from moe_lens.studies import Verdicts


def notes_of(studies: Studies, found: Verdicts) -> Mapping[str, list[str]]:
    """Sentences beside each verdict, by its key."""
    return {"3": _cosines(studies, found), "6": _cautions(studies)}


def _cosines(studies: Studies, found: Verdicts) -> list[str]:
    study = studies.get("single_expert")
    row = next((row for row in found.rows if row.key == "3" and row.domains), None)
    if study is None or row is None:
        return []
    means = rows_where(study.tables["similarity"], measure="top").groupby("domain")["mean"]
    return [
        "Three cosines of u + g₀E₀ with u + S: the greatest layer's, which the verdict takes as the paper says “some "
        f"layers”, {shown(row).number[0].values}; the mean over layers, {ranged(means.mean(), '.3f')} (least layer "
        f"{ranged(means.min(), '.3f')}); and the authors' ({QUOTED['3'].authors}), of the last token of 50 prompts."
    ]


def _cautions(studies: Studies) -> list[str]:
    study = studies.get("localisation")
    if study is None:
        return []
    how, table = study.manifest["plan"]["settings"]["how"][0], study.tables["contrast"]
    matched = rows_where(table, how=how, control="matched").query("controls > 0")
    rows: list[dict[str, Any]] = matched.to_dict("records")
    if not rows:
        return []
    found = [
        f"Matched coalitions hold {ranged(matched['control_experts'], '.0f')} experts, the picked ones "
        f"{ranged(matched['experts'], '.0f')}; they cost the other domains {ranged(matched['control_others'], '.2f')} "
        f"nats a token, the picked ones {ranged(matched['others'], '.2f')}, and that is part of the contrast."
    ]
    own = ", ".join(f"{row['domain']} {row['own']:.2f} against {row['control_own']:.2f}" for row in rows)
    less = [row["domain"] for row in rows if row["own"] <= row["control_own"]]
    said = f"no greater than theirs in {', '.join(less)}" if less else "greater than theirs in every domain"
    found.append(f"Δ own, the cost to the domain itself, is {said} (picked against matched: {own}).")
    busiest = rows_where(table, how=how, control="busiest").to_dict("records")
    unclear = [row for row in busiest if not row["low"] > 0]
    if unclear:
        told = ", ".join(
            f"{row['domain']} {row['estimate']:.2f} "
            + ("(no interval)" if row["low"] != row["low"] else f"[{row['low']:.2f}, {row['high']:.2f}]")
            for row in unclear
        )
        found.append(f"Against as many of the busiest experts the contrast is not shown to be above 0: {told}.")
    return found
