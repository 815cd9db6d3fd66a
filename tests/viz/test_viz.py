"""Figures show the numbers of the results, and tokens cannot break out of them."""

import json
import re
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from moe_lens import viz
from moe_lens.errors import InputError
from moe_lens.routing import LayerRouting
from moe_lens.stats import RoutingResult, RoutingStats
from moe_lens.studies import StudyResult
from moe_lens.studies.frames import by_domain, where
from moe_lens.viz.token_text import as_text, escaped
from moe_lens.viz.tokens_html import UNTRUSTED
from tests.stats.routed import routed

NASTY = "</script><b>&amp;[red]"


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "␣the"),
        ("\n\t", "↵⇥"),
        ("", "∅"),
        ("\n" + 9 * " ", "↵␣×9"),
        ("   ", "␣␣␣"),
        ("\x00", "\\x00"),
        ("\u200b", "\\u200b"),
        ("\u2028", "\\u2028"),
        ("é中", "é中"),
        ("\ufffd", "\ufffd"),
    ],
)
def test_every_token_can_be_read(token, shown):
    assert viz.readable(token) == shown


def test_markup_is_escaped():
    assert escaped("<b> & </b>") == "&lt;b&gt;␣&amp;␣&lt;/b&gt;"


def specialisation() -> StudyResult:
    """A result of the study `routing`, of the model's own routing and of one null."""
    generator = torch.Generator().manual_seed(0)
    domains = {}
    for name in ("one", NASTY):
        stats = RoutingStats((1, 2), 8, 3)
        for i in range(12 if name == "one" else 2):
            indices = torch.rand(2, 1, 6, 8, generator=generator).topk(3).indices
            stats.update(routed(indices, sources=[f"s{i}"], n_experts=8, layers=(1, 2)))
        domains[name] = stats.result()
    made = {"specialisation": "to_frame", "most_specialised": "most_specialised", "layers": "per_layer"}
    tables = {}
    for table, method in made.items():
        frame = by_domain({name: getattr(of, method)() for name, of in domains.items()})
        null = frame.assign(routing="random_router", **{"share" if "share" in frame else "value": 0.25})
        tables[table] = pd.concat([frame.assign(routing="model"), null], ignore_index=True)
    plan = {"study": "routing", "model": {"experts": 8, "top_k": 3}}
    return StudyResult({"plan": plan}, tables, {name: {"model routing": of} for name, of in domains.items()})


def test_map_shows_the_shares():
    result = specialisation()
    figure: Any = viz.specialisation_map(result)
    assert len(figure.data) == 2
    for trace, of in zip(figure.data, result.results.values(), strict=True):
        routing = of["model routing"]
        assert isinstance(routing, RoutingResult) and torch.equal(torch.tensor(trace.z), routing.specialisation)
        assert list(trace.y) == ["1", "2"]


def test_most_specialised_has_bars_where_there_are_sources_enough_and_nulls_beside():
    result = specialisation()
    figure: Any = viz.most_specialised(result)
    enough, null, few, _ = figure.data
    assert list(enough.y) == list(where(result.tables["most_specialised"], domain="one", routing="model")["share"])
    assert (null.name, list(null.y)) == ("random router", [0.25, 0.25])
    assert max(enough.error_y.array) > 0 and max(few.error_y.array) == 0
    assert [annotation.text for annotation in figure.layout.annotations] == ["uniform 37.5%"]
    half: Any = viz.experts_for_half(result)
    assert [trace.name for trace in half.data][::2] == ["one", escaped(NASTY).replace("␣", " ")]


def test_figures_of_one_study_refuse_another():
    other = StudyResult({"plan": {"study": "lens"}}, {}, {})
    with pytest.raises(InputError, match="this figure is of a study 'routing'; got the result of 'lens'"):
        viz.specialisation_map(other)


def test_tokens_cannot_break_out_of_a_figure():
    html = viz.specialisation_map(specialisation()).to_html(full_html=False, include_plotlyjs=False)
    assert html.count("</script>") == html.count("<script")


def routing(batch: bool = True) -> LayerRouting:
    indices = torch.tensor([[[3, 1], [1, 0], [2, 3]]])
    weights = torch.tensor([[[0.6, 0.2], [0.5, 0.5], [0.3, 0.1]]])
    return LayerRouting(
        layer=1, n_experts=4, indices=indices if batch else indices[0], weights=weights if batch else weights[0]
    )


def values_of(rendered) -> list[float]:
    return json.loads(re.findall(r'"values": (\[.*?\])', rendered.local_src)[0])


@pytest.mark.parametrize("batch", [True, False])
def test_text_is_coloured_by_an_expert_or_by_the_first_ones_share(batch):
    tokens = ["a", NASTY, " c"]
    assert values_of(viz.routing_tokens(tokens, routing(batch), expert=1)) == pytest.approx([0.2, 0.5, 0.0])
    assert values_of(viz.routing_tokens(tokens, routing(batch))) == pytest.approx([0.75, 0.5, 0.75])


def test_tokens_cannot_break_out_of_circuitsvis():
    rendered = viz.routing_tokens(["a", NASTY, " c"], routing())
    source = rendered.local_src
    assert source.count("</script>") == 1
    (tokens,) = re.findall(r'"tokens": (\[.*?\]), "values"', source)
    assert json.loads(tokens) == ["a", escape(NASTY), "␣c"]


@pytest.mark.typed
def test_what_is_shown_and_saved_is_offline_and_leaves_the_page_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    rendered = viz.routing_tokens(["a", "b", "c"], routing())
    rendered.save(tmp_path / "page.html")
    saved = (tmp_path / "page.html").read_text(encoding="utf-8")
    for source in (rendered._repr_html_(), rendered.__html__(), str(rendered), saved):
        assert not re.search(r"<script[^>]*src=|<link|unpkg.com/circuitsvis", source)
    opened = re.match(r'<style>#([\w-]+) span[^<]*</style><div id="\1"[^>]*>', rendered.local_src)
    assert (
        opened and not opened[0].endswith("/>") and rendered.local_src[opened.end() :].startswith(f"{UNTRUSTED}</div>")
    )
    assert len(repr(rendered)) < 80


def test_one_text_is_not_tokens():
    with pytest.raises(InputError, match="tokens is 'abc'; expected several"):
        viz.routing_tokens("abc", routing())


def test_names_are_no_formulas_and_no_places_of_a_template():
    assert as_text("$x$ <b> %{y} 5%") == "&#36;x&#36; &lt;b&gt; &#37;{y} 5%"


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="2 tokens, and routing of 3"):
        viz.routing_tokens(["a", "b"], routing())
    with pytest.raises(InputError, match="expert 4; the layer has 0 to 3"):
        viz.routing_tokens(["a", "b", "c"], routing(), expert=4)
