"""The page: sections of saved studies in one self-contained HTML file."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moe_lens.manifest import model_of, verdict_files
from moe_lens.report.rendering import rendered, table_html
from moe_lens.report.report_files import PAGE, REPORT, check_place
from moe_lens.report.section import Section, Studies, facts
from moe_lens.report.sections import SECTIONS
from moe_lens.report.verdict_section import served_by, verdicts_of
from moe_lens.storage import written_whole
from moe_lens.studies import StudyResult
from moe_lens.studies.verdicts import side_by_side


@dataclass(frozen=True)
class _Model:
    """What was measured of one model, and the sections that show it."""

    facts: dict[str, Any]
    studies: Studies
    sections: tuple[Section, ...]


def write_page(folders: Iterable[str | Path], out: str | Path) -> Path:
    """Write `report.html`, which needs no network, and `verdicts.json` from saved studies; the path of the page.

    Of several models each has verdicts of its own, `verdicts-2.json` and so on in the order of the page. Those of an
    earlier page are removed.

    Args:
        folders: Of the studies, of any kinds and models.
        out: The folder that the page goes to; made if it does not exist.

    Raises:
        InputError: A folder holds no result of a study, or the page cannot be written.
    """
    page = Path(out) / PAGE
    check_place(out, REPORT)
    results = [StudyResult.load(folder) for folder in folders]
    content = page_of(results)
    with written_whole(page) as temporary:
        temporary.write_text(content, encoding="utf-8")
    judged = [found for studies in by_model(results) if (found := verdicts_of(studies)) is not None]
    for old in verdict_files(page.parent)[len(judged) :]:
        old.unlink()
    for number, found in enumerate(judged, start=1):
        found.save(page.with_name("verdicts.json" if number == 1 else f"verdicts-{number}.json"))
    return page


def page_of(results: Iterable[StudyResult]) -> str:
    """The page as HTML, with plotly.js inside, once; the same for the same results."""
    groups = list(by_model(results))
    models = [_shown(number, studies) for number, studies in enumerate(groups, start=1)]
    judged = [found.to_json() for studies in groups if (found := verdicts_of(studies)) is not None]
    together = table_html(side_by_side(judged)) if len(judged) > 1 else None
    body = rendered("report.html.jinja", models=models, together=together)
    found = dict.fromkeys(re.findall(r'<div id="([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"', body))
    for number, drawn in enumerate(found, start=1):
        body = body.replace(drawn, f"figure-{number}")  # plotly draws these names at random
    title = f"{REPORT}{', '.join(dict.fromkeys(str(model.facts['name']) for model in models))}"
    return framed(title, Markup(body))  # noqa: S704  # its templates have escaped it


def framed(title: str, body: Markup) -> str:
    """A page of this look around its body."""
    from plotly.offline import get_plotlyjs

    import moe_lens

    plotly = Markup(get_plotlyjs())  # noqa: S704
    return rendered("page.html.jinja", title=title, body=body, plotly=plotly, version=moe_lens.__version__)


def by_model(results: Iterable[StudyResult]) -> Iterator[Studies]:
    """Results of one model go together, each kind of study once; what is left over is shown after them."""
    groups: list[dict[str, StudyResult]] = []
    for result in results:
        model = model_of(result.manifest)
        fits = (g for g in groups if model_of(next(iter(g.values())).manifest) == model and result.study not in g)
        group = next(fits, None)
        if group is None:
            groups.append(group := {})
        group[result.study] = result
    yield from groups


def _shown(number: int, studies: Studies) -> _Model:
    served = served_by(studies)
    made = (section(studies) for section in SECTIONS)
    sections = tuple(
        replace(one, body=served.get(one.anchor, Markup()) + one.body).numbered(number)
        for one in made
        if one is not None
    )
    return _Model(facts(next(iter(studies.values()))), studies, sections)
