"""The verdicts on the page: the table that it begins with, and each verdict again where it was measured."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from markupsafe import Markup

from moe_lens.report.paper_quotes import QUOTED
from moe_lens.report.published_numbers import same_model
from moe_lens.report.rendering import rendered
from moe_lens.report.section import Section, Studies, facts, section
from moe_lens.report.verdict_notes import notes_of
from moe_lens.report.verdict_words import shown
from moe_lens.studies import StudyResult, Verdicts, judge


def verdicts_of(studies: Studies) -> Verdicts | None:
    """The verdicts on the paper's claims; None if the studies read different texts."""
    plans = [result.manifest["plan"]["domains"] for result in studies.values()]
    return _judged(*studies.items()) if all(plan == plans[0] for plan in plans) else None


@lru_cache(maxsize=8)  # the page asks, and the file beside it, of every model
def _judged(*studies: tuple[str, StudyResult]) -> Verdicts:
    return judge(dict(studies))


def verdicts(studies: Studies) -> Section:
    """What the studies say about each claim of the paper."""
    found, model = verdicts_of(studies), facts(next(iter(studies.values())))
    values: dict[str, Any] = {"found": found, "same_model": same_model(model), "model": model}
    if found is not None:
        values |= {"rows": [shown(row) for row in found.rows], "notes": notes_of(studies, found), "quoted": QUOTED}
        values["sentences"] = [found.sentence(row) for row in found.rows]
    return section("verdicts", "Verdicts on the paper", **values)


def served_by(studies: Studies) -> Mapping[str, Markup]:
    """By anchor: the verdicts that a section serves, with every bound, for its beginning."""
    found = verdicts_of(studies)
    if found is None:
        return {}
    notes, boxes = notes_of(studies, found), {}
    for row in found.rows:
        if row.domains:
            quoted = QUOTED[row.key]
            box = rendered("sections/served.html.jinja", row=shown(row), quoted=quoted, notes=notes.get(row.key, []))
            boxes[quoted.section] = boxes.get(quoted.section, Markup()) + Markup(box)  # noqa: S704
    return boxes
