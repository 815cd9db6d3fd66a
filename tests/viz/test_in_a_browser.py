"""What a browser does with hostile tokens and names: it shows them. Needs Chromium (Debian: chromium)."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from moe_lens import viz
from moe_lens.viz import coloured_tokens
from moe_lens.viz.token_text import as_text, readable
from tests.browser import OFFLINE, QUIET, chromium
from tests.viz.test_viz import routing

RUNS = '<img/src="x"/onerror="document.title=\'ran\'">'
TOKENS = [RUNS, "<s>", "</script><script>document.title='ran'</script>"]


def shown(page: Path) -> str:
    """The page as the browser has it after its scripts have run."""
    profile = f"--user-data-dir={page.parent / 'profile'}"
    asked = [chromium(), *QUIET, OFFLINE, profile, "--virtual-time-budget=10000", "--dump-dom", page.as_uri()]
    return subprocess.run(asked, capture_output=True, text=True, timeout=120, check=True).stdout


def page_of(folder: Path, *parts: Any) -> Path:
    page = folder / "page.html"
    body = "\n".join(map(str, parts))
    page.write_text(
        f'<!doctype html><meta charset="utf-8"><title>calm</title>\n{body}\n<p id="after">after</p>', "utf-8"
    )
    return page


def test_tokens_are_shown_and_do_not_run(tmp_path: Path) -> None:
    dom = shown(page_of(tmp_path, viz.routing_tokens(TOKENS, routing())))
    assert "<title>calm</title>" in dom
    drawn = dom[dom.index('class="colored-tokens"') :]
    assert "&lt;s&gt;" in drawn and "&lt;img/src=" in drawn and "&lt;/script&gt;" in drawn
    assert "<img" not in drawn
    # The element ends where it should: what follows on the page is beside it, not inside of what was drawn over.
    assert re.search(r'<p id="after">after</p>\s*</body>', dom)


def test_negative_control_unescaped_tokens_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coloured_tokens, "html", type("Plain", (), {"escape": staticmethod(lambda text: text)}))
    monkeypatch.setattr(coloured_tokens, "readable", lambda token: readable(token).replace("</script>", ""))
    dom = shown(page_of(tmp_path, viz.routing_tokens(TOKENS, routing())))
    assert "<title>ran</title>" in dom


def test_names_in_figures_are_shown_letter_by_letter(tmp_path: Path) -> None:
    import plotly.graph_objects as go

    name = f"<b>bold</b> $x$ %{{y}} &amp; {RUNS}"
    figure = go.Figure(go.Bar(x=[as_text(name)], y=[1], name="one"), {"title": {"text": as_text(name)}})
    dom = shown(page_of(tmp_path, figure.to_html(full_html=False, include_plotlyjs=True)))
    assert "<title>calm</title>" in dom
    texts = re.findall(r"<text[^>]*>(.*?)</text>", dom)
    right = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert sum(right in text for text in texts) == 2, texts
