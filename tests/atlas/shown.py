"""An atlas of the planted model, in which tokens would like to be more than text, and what a browser shows of it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_lens.atlas.pages import DATA
from moe_lens.studies import StudyResult
from tests.browser import Page
from tests.planted import LAYER, PLANTED

HOSTILE = (
    "</script><script>document.title='ran'</script>",
    '<img/src="x"/onerror="document.title=\'ran\'">',
    "'\"`${document.title='ran'}\\",
    "line\u2028separator\u2029&amp;<!--",
    "\u202eright to left\u0634\u0645\u0633",
)


def hostile(result: StudyResult) -> StudyResult:
    """The same with tokens, sources and a domain's name that would like to be more than text."""
    words: Any = result.tables["words"].copy()
    sea: Any = result.tables["tokens"].query(f"layer == {LAYER} and expert == {PLANTED['sea']}")
    for token, text in zip(sea["token"], HOSTILE, strict=False):
        words.loc[words["token"] == token, "text"] = text
    tables = {name: table.replace({"source": {"book/sea/1": HOSTILE[0]}}) for name, table in result.tables.items()}
    return replace(result, tables={**tables, "words": words})


def show(page: Page, folder: Path, place: str) -> None:
    page.requests.clear()
    page.complaints.clear()
    page.open(folder / "index.html", place)
    page.until(f"document.getElementById('view').dataset.shown === {json.dumps(place)}")


def text(page: Page, selector: str = "main") -> str:
    return page.ask(f"document.querySelector({json.dumps(selector)}).innerText")


def given(folder: Path, name: str) -> Any:
    found = re.fullmatch(r"atlas\.put\((\".*?\"), (.*)\);\n", (folder / DATA / f"{name}.js").read_text("utf-8"))
    assert found and json.loads(found[1]) == name
    return json.loads(found[2])
