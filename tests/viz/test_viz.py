"""Figures show the numbers of the results, and tokens cannot break out of them."""

import json
import re
from typing import Any

import pytest
import torch
from rich.console import Console

from moe_lens import PartialSum, viz
from moe_lens.errors import InputError
from moe_lens.lenses import LensResult
from moe_lens.routing import LayerRouting
from moe_lens.stats import RoutingStats
from moe_lens.studies import Specialisation, figure2
from moe_lens.viz.text import escaped

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


def specialisation() -> Specialisation:
    generator = torch.Generator().manual_seed(0)
    domains = {}
    for name in ("one", NASTY):
        stats = RoutingStats((1, 2), 8, 3)
        for i in range(12 if name == "one" else 2):
            indices = torch.rand(2, 1, 6, 8, generator=generator).topk(3).indices
            stats.update(indices, torch.ones(1, 6).bool(), [f"s{i}"])
        domains[name] = stats.result()
    return Specialisation(domains)


def test_map_shows_the_shares():
    result = specialisation()
    figure: Any = viz.specialisation_map(result)
    assert len(figure.data) == 2
    for trace, routing in zip(figure.data, result.domains.values(), strict=True):
        assert torch.equal(torch.tensor(trace.z), routing.specialisation)
        assert list(trace.y) == ["1", "2"]


def test_most_specialised_has_bars_where_there_are_sources_enough():
    result = specialisation()
    figure: Any = viz.most_specialised(result)
    enough, few = figure.data
    frame = result.most_specialised()
    assert list(enough.y) == list(frame[frame["domain"] == "one"]["share"])
    assert max(enough.error_y.array) > 0 and max(few.error_y.array) == 0
    assert [annotation.text for annotation in figure.layout.annotations] == ["uniform 37.5%"]
    half: Any = viz.experts_for_half(result)
    assert [trace.name for trace in half.data] == ["one", escaped(NASTY).replace("␣", " ")]


def lens_result() -> LensResult:
    sums = figure2(2)
    shape = 2, len(sums), 1, 1, 2
    top_tokens = torch.arange(16).view(shape).clone()
    probs = torch.rand(shape).sort(-1, descending=True).values
    top_tokens[0, 2:] = -1
    probs[0, 2:] = torch.nan
    experts = torch.tensor([[-1, -1], [7, 4]]).view(2, 1, 1, 2)
    weights = torch.tensor([[torch.nan, torch.nan], [0.6, 0.3]]).view(2, 1, 1, 2)
    return LensResult((0, 1), sums, (5,), (0,), top_tokens, probs * 10, probs, experts, weights)


TEXTS = {token: f" w{token}" for token in range(16)} | {12: NASTY}


def test_lens_table_places_token_expert_and_weight():
    result = lens_result()
    figure: Any = viz.lens_table(result, 5, TEXTS)
    (heat,) = figure.data
    assert heat.text[1][0] == "␣w8"
    assert heat.text[0][2] == "" and heat.z[0][2] is None  # a dense layer has no ranks
    assert heat.z[1][3] == pytest.approx(float(result.top_probs[1, 3, 0, 0, 0]))
    notes = [(note.x, note.y, note.text) for note in figure.layout.annotations]
    assert notes == [(2, 1, "7"), (2, 1, "0.60"), (3, 1, "4"), (3, 1, "0.30")]
    assert "expert 7, weight 0.600" in heat.customdata[1][2]
    assert list(figure.layout.yaxis.ticktext) == ["0 (dense)", "1"]
    by_logit: Any = viz.lens_table(result, 5, TEXTS, colour_by="logit")
    assert by_logit.data[0].z[1][3] == pytest.approx(float(result.top_logits[1, 3, 0, 0, 0]))


def test_tokens_cannot_break_out_of_a_figure():
    figure: Any = viz.lens_table(lens_result(), 5, TEXTS)
    assert figure.data[0].text[1][2].startswith("&lt;/script&gt;")
    html = figure.to_html(full_html=False, include_plotlyjs=False)
    assert html.count("</script>") == html.count("<script")
    html = viz.specialisation_map(specialisation()).to_html(full_html=False, include_plotlyjs=False)
    assert html.count("</script>") == html.count("<script")


def test_lens_text_has_the_same_cells():
    console = Console(width=120, record=True, file=None)
    with console.capture() as captured:
        console.print(viz.lens_text(lens_result(), 5, TEXTS))
    text = captured.get()
    probs = lens_result()
    assert "7·0.60" in text and "4·0.30" in text
    assert "</script><b…" in text  # rich takes nothing for markup
    assert len(re.findall(r"␣w\d+ \d+%", text)) == 5
    assert probs.sums[0] == PartialSum(shared=True) and "layer output" in text


def routing(batch: bool = True) -> LayerRouting:
    indices = torch.tensor([[[3, 1], [1, 0], [2, 3]]])
    weights = torch.tensor([[[0.6, 0.2], [0.5, 0.5], [0.3, 0.1]]])
    return LayerRouting(
        layer=1, n_experts=4, indices=indices if batch else indices[0], weights=weights if batch else weights[0]
    )


def values_of(rendered) -> list[float]:
    return json.loads(re.findall(r'"values": (\[.*?\])', rendered.cdn_src)[0])


@pytest.mark.parametrize("batch", [True, False])
def test_text_is_coloured_by_an_expert_or_by_the_first_ones_share(batch):
    tokens = ["a", NASTY, " c"]
    assert values_of(viz.routing_tokens(tokens, routing(batch), expert=1)) == pytest.approx([0.2, 0.5, 0.0])
    assert values_of(viz.routing_tokens(tokens, routing(batch))) == pytest.approx([0.75, 0.5, 0.75])


def test_tokens_cannot_break_out_of_circuitsvis():
    rendered = viz.routing_tokens(["a", NASTY, " c"], routing())
    for source in (rendered.local_src, rendered.cdn_src):
        assert source.count("</script>") == 1
        (tokens,) = re.findall(r'"tokens": (\[.*?\]), "values"', source)
        assert json.loads(tokens) == ["a", NASTY, "␣c"]


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="2 tokens, and routing of 3"):
        viz.routing_tokens(["a", "b"], routing())
    with pytest.raises(InputError, match="expert 4; the layer has 0 to 3"):
        viz.routing_tokens(["a", "b", "c"], routing(), expert=4)
