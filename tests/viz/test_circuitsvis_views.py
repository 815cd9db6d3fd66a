"""Texts coloured by routing: what is drawn is the routing, in a browser too, offline and escaped."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_lens import viz
from moe_lens.atlas.card import ExpertCard
from moe_lens.errors import InputError
from moe_lens.routing import Routing
from moe_lens.viz.tokens_html import UNTRUSTED
from tests.browser import browser

RUNS = '<img/src="x"/onerror="document.title=\'ran\'">'
TOKENS = [RUNS, " the", "</script><script>document.title='ran'</script>", "é"]
LAYERS, EXPERTS, TOP_K = (1, 3), 6, 2


def routing(seed: int = 0, n: int = len(TOKENS)) -> Routing:
    draw = torch.Generator().manual_seed(seed)
    indices = torch.rand(len(LAYERS), 1, n, EXPERTS, generator=draw).topk(TOP_K).indices
    weights = torch.rand(len(LAYERS), 1, n, TOP_K, generator=draw).sort(-1, descending=True).values
    return Routing(layers=LAYERS, n_experts=EXPERTS, indices=indices, weights=weights)


def props(drawing: viz.TokensHTML, name: str) -> Any:
    (call,) = drawing.calls
    return json.JSONDecoder().raw_decode(call[call.index(f'"{name}": ') + len(name) + 4 :])[0]


def test_selectors_have_the_weight_that_each_token_gives_each_expert():
    given = routing()
    values = torch.tensor(props(viz.expert_activations(TOKENS, given), "activations"))
    dense = torch.zeros(len(LAYERS), len(TOKENS), EXPERTS)
    dense.scatter_(2, given.indices[:, 0], given.weights[:, 0])
    assert torch.allclose(values, dense.permute(1, 0, 2), atol=5e-4)  # rounded to three digits
    one = torch.tensor(props(viz.expert_activations(TOKENS, given, layers=[3]), "activations"))
    assert torch.equal(one, values[:, 1:])
    assert not torch.equal(one, values[:, :1])  # negative control


@pytest.mark.typed
def test_more_data_than_a_notebook_bears_is_refused_with_what_to_do():
    many = torch.zeros(8, 1, 3000, TOP_K, dtype=torch.long) + torch.arange(TOP_K)
    given = Routing(layers=tuple(range(8)), n_experts=64, indices=many, weights=torch.ones(8, 1, 3000, TOP_K))
    with pytest.raises(InputError, match=r"3,000 tokens × 8 layers × 64 experts .* 6.1 MB; at most 5 MB .*fewer"):
        viz.expert_activations(["a"] * 3000, given)
    drawn = viz.expert_activations(["a"] * 3000, given, layers=[0])
    assert len(drawn.calls[0]) < 5_000_000


def test_the_colour_and_number_of_a_token_are_its_experts():
    given = routing().layer(3)
    for rank in range(TOP_K):
        said = viz.expert_tokens(TOKENS, given, rank=rank).body
        found = re.findall(r"background:(rgb\([^)]*\));\" title=\"[^\"]*\">[^<]*<sub[^>]*>(\d+)</sub>", said)
        experts = given.indices[0, :, rank].tolist()
        assert [int(number) for _, number in found] == experts
        assert len({shade for shade, _ in found}) == len(set(experts))
        assert RUNS not in said and "</script>" not in said
    with pytest.raises(InputError, match="there is no rank 2"):
        viz.expert_tokens(TOKENS, given, rank=2)


def test_contexts_are_around_the_largest_weights():
    texts, routings = [[f"t{i}" for i in range(30)], [f"u{i}" for i in range(30)]], [routing(1, 30), routing(2, 30)]
    drawing = viz.top_expert_contexts(texts, routings, layers=[3], experts=[4], most=3, around=2)
    values, words = props(drawing, "activations")[0][0], props(drawing, "tokens")[0][0]
    weights = [
        (float(weight), texts[text][at])
        for text, of in enumerate(routings)
        for at, (experts, row) in enumerate(
            zip(of.layer(3).indices[0].tolist(), of.layer(3).weights[0].tolist(), strict=True)
        )
        for expert, weight in zip(experts, row, strict=True)
        if expert == 4
    ]
    best = sorted(weights, reverse=True)[:3]
    assert [max(one) for one in values] == pytest.approx([weight for weight, _ in best], abs=5e-4)
    assert [of[one.index(max(one))] for of, one in zip(words, values, strict=True)] == [word for _, word in best]
    assert all(len(of) <= 5 for of in words)


def test_small_weights_are_told_apart_and_their_tokens_have_selected():
    indices, weights = np.array([[[[0, 1]] * 3]]), np.array([[[[0.9, 0.00041], [0.9, 0.00039], [0.8, 0.00045]]]])
    given = Routing.from_arrays(indices, weights, 4)
    words = props(viz.top_expert_contexts([["a", "b", "c"]], [given], most=1, around=1), "tokens")[0]
    assert words[1] == [["b", "c"]]
    assert words[2] == [["no token selected this expert"]]  # the control
    order = props(viz.top_expert_tokens([["a", "b", "c"]], [given], most=3), "topkIdxs")[0][0]
    assert [row[1] for row in order] == [2, 0, 1]


def test_log_probabilities_stand_side_by_side_with_their_differences():
    one = torch.tensor([float("nan"), -1.0, -2.0, -3.0])
    said = viz.token_log_probs(TOKENS, {"model": one, "without <3:17>": one - 0.5}).body
    rows = re.findall(r"<tr>(.*?)</tr>", said)
    assert [re.findall(r">(-?[\d.]+)</td>", row) for row in rows[1:]] == [
        [], ["-1.000", "-1.500", "-0.500"], ["-2.000", "-2.500", "-0.500"], ["-3.000", "-3.500", "-0.500"],
        ["-2.000", "-2.500", "-0.500"],
    ]  # fmt: skip
    assert "without &lt;3:17&gt; − model" in said and RUNS not in said
    with pytest.raises(InputError, match=r"without: log-probabilities of shape \(3,\), and 4 tokens"):
        viz.token_log_probs(TOKENS, {"without": one[:3]})
    with pytest.raises(InputError, match="model holds 3; expected log-probabilities, .*: of losses, their negatives"):
        viz.token_log_probs(TOKENS, {"model": -one})


@pytest.mark.typed
@pytest.mark.parametrize("columns", [[0, 1, 2], [1, 2, 3]])
def test_padding_is_never_shown_as_routed(columns: list[int]):
    """Tokens may come with padding or without: what is shown of the real ones is what their text shows alone."""
    whole, mask = routing(), torch.zeros(1, len(TOKENS), dtype=torch.bool)
    mask[0, columns] = True
    padded = replace(whole, mask=mask)
    alone = replace(whole, indices=whole.indices[:, :, columns], weights=whole.weights[:, :, columns])
    some = [TOKENS[at] for at in columns]
    assert viz.expert_tokens(some, padded.layer(1)).body == viz.expert_tokens(some, alone.layer(1)).body
    assert viz.expert_tokens(TOKENS, padded.layer(1)).body.count("<sub") == 3
    found, expected = (
        torch.tensor(props(viz.expert_activations(tokens, of), "activations"))
        for tokens, of in ((TOKENS, padded), (some, alone))
    )
    assert torch.equal(found[columns], expected) and expected.any()
    assert not found[~mask[0]].any()
    assert viz.expert_tokens(TOKENS, whole.layer(1)).body.count("<sub") == 4, "without a mask all are tokens"


def test_what_does_not_go_together_is_said():
    given = routing()
    with pytest.raises(InputError, match="2 tokens, and routing of 4"):
        viz.expert_activations(TOKENS[:2], given)
    with pytest.raises(InputError, match="no routing of layer 2"):
        viz.expert_activations(TOKENS, given, layers=[2])
    with pytest.raises(InputError, match="1 texts, and routing of 2"):
        viz.top_expert_tokens([TOKENS], [given, given])
    with pytest.raises(InputError, match="there is no expert 6"):
        viz.top_expert_contexts([TOKENS], [given], experts=[6])
    with pytest.raises(InputError, match=r"attention has shape \(2, 3, 3\)"):
        viz.attention_beside_routing(TOKENS, torch.ones(2, 3, 3), given.layer(1))


@pytest.mark.typed
def test_all_are_drawn_on_one_page_with_one_script_and_nothing_runs_or_is_asked_for(tmp_path: Path):
    given = routing()
    attention = torch.rand(2, len(TOKENS), len(TOKENS)).softmax(-1)
    page = viz.beside(
        activations=viz.expert_activations(TOKENS, given),
        experts=viz.expert_tokens(TOKENS, given.layer(1)),
        tokens=viz.top_expert_tokens([TOKENS, TOKENS], [given, routing(1)]),
        contexts=viz.top_expert_contexts([TOKENS], [given]),
        losses=viz.token_log_probs(TOKENS, {"model": torch.full((4,), -1.0)}),
        attention=viz.attention_beside_routing(TOKENS, attention, given.layer(3)),
    )
    page.save(tmp_path / "page.html")
    assert page._repr_html_().count("var CircuitsVis") == 1 and "unpkg" not in page.local_src.rpartition("render(")[2]
    with browser(tmp_path / "profile") as opened:
        opened.open(tmp_path / "page.html")
        opened.until("document.querySelectorAll('section [id^=circuits-vis] > *').length === 4")
        shown = opened.ask("document.body.innerText")
        assert shown.count("<img/src=") >= 5 and "Layer" in shown and "Head 1" in shown
        assert opened.ask("document.title") == "tokens" and opened.ask("document.querySelectorAll('img').length") == 0

        # The selector of experts draws other weights: those of the routing.
        drawn = "[...document.querySelectorAll('section:first-of-type .colored-tokens > span')]"
        before = opened.ask(f"{drawn}.map((one) => one.style.backgroundColor || one.firstChild.style.backgroundColor)")
        opened.ask(
            "(() => { const list = document.querySelectorAll('section:first-of-type select')[1];"
            "Object.getOwnPropertyDescriptor(HTMLSelectElement.prototype, 'value').set.call(list, '4');"
            "list.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )
        after = opened.ask(f"{drawn}.map((one) => one.style.backgroundColor || one.firstChild.style.backgroundColor)")
        white = [colour == "rgb(255, 255, 255)" for colour in after]
        assert white == [4 not in experts for experts in given.layer(1).indices[0].tolist()] and before != after
        assert UNTRUSTED not in opened.ask("document.body.innerText")  # drawings stand where it stood
        assert all(asked.startswith("file:") for asked in opened.requests)
        assert not [said for said in opened.complaints if "WebGL" not in said]  # circuitsvis' script looks for a GPU


def test_outputs_of_one_notebook_run_the_script_once(tmp_path: Path):
    """Each holds it, but a second run would register all of it again, and complain."""
    one, other = (viz.expert_activations(TOKENS, routing(seed)) for seed in range(2))
    (tmp_path / "page.html").write_text(f"<!doctype html>{one._repr_html_()}{other._repr_html_()}", "utf-8")
    with browser(tmp_path / "profile") as opened:
        opened.open(tmp_path / "page.html")
        opened.until("document.querySelectorAll('[id^=circuits-vis] > *').length === 2")
        assert not [said for said in opened.complaints if "WebGL" not in said]  # circuitsvis' script looks for a GPU


def test_a_text_of_which_no_token_selected_the_expert_can_be_read(tmp_path: Path):
    """circuitsvis alone draws it white on white."""
    given = routing()
    unused = next(expert for expert in range(EXPERTS) if expert not in given.layer(1).indices)
    drawn = [
        viz.expert_activations(TOKENS, given),
        viz.top_expert_contexts([TOKENS], [given], layers=[1], experts=[unused]),
    ]
    viz.beside(activations=drawn[0], contexts=drawn[1]).save(tmp_path / "page.html")
    inks = "[...document.querySelectorAll('{} span')].filter((of) => !of.children.length).map((of) => [of.innerText, "
    inks += "getComputedStyle(of).color, getComputedStyle(of).backgroundColor])"
    with browser(tmp_path / "profile") as opened:
        opened.open(tmp_path / "page.html")
        opened.until("document.querySelectorAll('section [id^=circuits-vis] > *').length === 2")
        opened.ask(
            "(() => { const list = document.querySelectorAll('section:first-of-type select')[1];"
            f"Object.getOwnPropertyDescriptor(HTMLSelectElement.prototype, 'value').set.call(list, '{unused}');"
            "list.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )
        texts, said = (opened.ask(inks.format(f"section:nth-of-type({part})")) for part in (1, 2))
        plain = ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
        assert len(texts) == len(TOKENS) and all(ink == plain for _, *ink in texts)
        assert said == [["no token selected this expert".replace(" ", "\xa0"), *plain]]


class Untrusted(HTMLParser):
    """What JupyterLab leaves of an output that it does not trust: no script, and of a frame its text."""

    def __init__(self, page: str):
        super().__init__()
        self.shown, self._inside = "", 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._inside += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._inside -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        self.shown += "" if self._inside else data


def test_what_an_untrusted_notebook_leaves_of_a_drawing_says_what_to_do():
    assert "Trust Notebook" in Untrusted(viz.expert_activations(TOKENS, routing())._repr_html_()).shown
    without = viz.expert_tokens(TOKENS, routing().layer(1))._repr_html_()  # needs no script
    assert "Trust Notebook" not in Untrusted(without).shown and "the" in Untrusted(without).shown
    frame = ExpertCard(1, 2, "<p>page</p>")._repr_html_()
    assert "Layer 1, expert 2" in Untrusted(frame).shown and "Trust Notebook" in Untrusted(frame).shown


def test_ink_is_legible_whatever_lies_behind_it():
    """A dark notebook is seen through a translucent colour, and JupyterLab removes one in the notation of today."""
    values = torch.tensor([float("nan"), -0.01, -6.0, -20.0])
    said = viz.token_log_probs(TOKENS, {"one": values, "other": values - 1}).body
    said += viz.expert_tokens(TOKENS, routing().layer(1)).body
    inked = re.findall(r"color:#10212e;[^\"]*background:([^;\"]*)", said)
    assert len(inked) == 9 + len(TOKENS)
    for colour in inked:
        levels = re.fullmatch(r"rgb\((\d+),(\d+),(\d+)\)", colour)
        assert levels and min(map(int, levels.groups())) >= 107, colour
