"""What a lens read, as the paper's Figure 2 and as curves over layers: the numbers of the result, and no markup."""

import re
from typing import Any, cast

import numpy as np
import pytest
import torch
from rich.console import Console

from moe_lens import PartialSum, viz
from moe_lens.errors import InputError
from moe_lens.lenses import LensResult
from moe_lens.lenses.lens_result import QUANTITIES, blank
from moe_lens.viz.lens import _wrapped

NASTY = "</script><b>&amp;[red]"
TEXTS = {token: f" w{token}" for token in range(16)} | {12: NASTY}
DRAWN = PartialSum(drawn="active")


def lens_result() -> LensResult:
    """Two layers, the first dense, of a model with two active experts; expert 3 was not selected."""
    sums = (*PartialSum.figure2(2), PartialSum(ranks=[]), DRAWN, PartialSum(experts=[3]))
    cells = blank(2, len(sums), 1, 2, 2, torch.float32)
    cells["top_tokens"][:, :4, 0, 1] = torch.arange(16).view(2, 4, 2)
    cells["top_tokens"][:, 4:6, 0, 1] = torch.tensor([1, 2])
    probs = torch.rand(cells["top_probs"].shape).sort(-1, descending=True).values
    for j in (2, 3, 5):
        cells["top_tokens"][0, j] = -1
    cells["top_tokens"][:, 6] = -1
    cells["top_probs"][:] = probs.masked_fill(cells["top_tokens"] < 0, torch.nan)
    cells["top_logits"][:] = 10 * cells["top_probs"]
    cells["expert"][1, 2:4, 0, 1], cells["weight"][1, 2:4, 0, 1] = torch.tensor([7, 4]), torch.tensor([0.6, 0.3])
    cells["expert"][1, 5, 0, 1], cells["weight"][1, 5, 0, 1] = 4, 0.3
    read = cells["top_tokens"][..., 0] >= 0
    for number, name in enumerate(QUANTITIES):
        values = torch.arange(read.numel()).view(read.shape) + 100 * number
        cells[name][read] = values[read].to(cells[name].dtype)
    return LensResult(
        layers=(0, 1),
        sums=sums,
        positions=(4, 5),
        dense=(0,),
        never_selected=((1, 3),),
        texts=TEXTS,
        targets=torch.tensor([[3, 5]]),
        **cells,
    )


def test_table_places_token_expert_and_weight():
    result = lens_result()
    figure: Any = viz.lens_table(result, 5)
    (heat,) = figure.data
    assert heat.text[1][0] == "␣w8"
    assert heat.text[0][2] == "" and heat.z[0][2] is None  # a dense layer has no ranks
    assert heat.z[1][3] == pytest.approx(float(result.top_probs[1, 3, 0, 1, 0]))
    notes = [(round(note.x), round(note.y), note.text) for note in figure.layout.annotations]
    experts = [(2, 1, "7"), (2, 1, "0.60"), (3, 1, "4"), (3, 1, "0.30"), (5, 1, "4"), (5, 1, "0.30")]
    assert notes == [*experts, (6, 1, "not selected")]
    left, right = figure.layout.annotations[:2]
    assert left.x < 2 < right.x and left.y > 1 > right.y  # inside the cell; layers count downwards
    assert figure.layout.yaxis.autorange == "reversed"
    assert "expert 7, weight 0.600" in heat.customdata[1][2]
    assert heat.customdata[1][0].count("<br>") == 2  # both tokens that were kept
    assert list(figure.layout.yaxis.ticktext) == ["0 (dense)", "1"]
    assert figure.layout.xaxis.ticktext[:2] == ("u<br>+ routed<br>+ shared", "u<br>+ routed")
    assert figure.layout.xaxis.tickangle == 0  # slanted names would take the height of the rows
    random = _wrapped("u + random active expert")
    assert random == ["u", "+ random", "active", "expert"] and _wrapped("u + ranks 0-2") == ["u", "+ ranks 0-2"]
    by_logit: Any = viz.lens_table(result, 5, colour_by="logit")
    assert by_logit.data[0].z[1][3] == pytest.approx(float(result.top_logits[1, 3, 0, 1, 0]))


def test_tokens_cannot_break_out_of_the_table():
    figure: Any = viz.lens_table(lens_result(), 5)
    assert figure.data[0].text[1][2].startswith("&lt;/script&gt;")
    assert "<b>" not in figure.data[0].customdata[1][2]
    html = figure.to_html(full_html=False, include_plotlyjs=False)
    assert html.count("</script>") == html.count("<script")


def test_text_has_the_same_cells():
    console = Console(width=160, record=True, file=None)
    with console.capture() as captured:
        console.print(viz.lens_text(lens_result(), 5))
    text = captured.get()
    assert "7·0.60" in text and text.count("4·0.30") == 2
    assert "</script><b…" in text  # rich takes nothing for markup
    assert len(re.findall(r"␣w\d+ \d+%", text)) == 8
    assert "u + routed" in text and text.count("not selected") == 1


def test_what_was_not_read_cannot_be_shown():
    for show in (viz.lens_table, viz.lens_text):
        with pytest.raises(InputError, match=r"position 3 was not read; the result has \[4, 5\]"):
            show(lens_result(), 3)
        with pytest.raises(InputError, match="there is no row 1 of the batch; the result has 0 to 0"):
            show(lens_result(), 5, batch=1)
    last, fifth = (cast(Any, viz.lens_table(lens_result(), position)).data[0].text for position in (-1, 5))
    assert np.array_equal(last, fifth), "the last that was read"
    empty: Any = viz.lens_table(lens_result(), 4)  # padding: nothing to see, and nothing to go wrong
    assert not empty.layout.annotations and set(empty.data[0].text[1]) == {""}


def test_curves_are_means_and_medians_of_what_was_read():
    result = lens_result()
    figure: Any = viz.lens_trajectory(result)
    assert len(figure.data) == 4 * len(result.sums)
    by_axis = {axis: [trace for trace in figure.data if trace.yaxis == axis] for axis in ("y", "y2", "y3", "y4")}
    for axis, name in (("y", "kl_final"), ("y2", "kl_ensemble"), ("y3", "entropy"), ("y4", "target_rank")):
        for j, trace in enumerate(by_axis[axis]):
            for i in range(2):
                value = getattr(result, name)[i, j, 0, 1]  # the only token that was read
                if result.top_tokens[i, j, 0, 1, 0] < 0:
                    assert trace.y[i] is None and trace.customdata[i][1] == 0
                else:
                    assert trace.y[i] == float(value) + (axis == "y4")
                    assert list(trace.customdata[i]) == [float(value), 1]
    assert [trace.name for trace in by_axis["y"]][4:6] == ["u", "u + random active expert"]
    assert [trace.line.dash for trace in by_axis["y"]] == [None] * 4 + ["dash", "dot", None]
    one: Any = viz.lens_trajectory(result, position=5)
    assert [trace.y for trace in one.data] == [trace.y for trace in figure.data]
    none: Any = viz.lens_trajectory(result, position=4)
    assert all(value is None for trace in none.data for value in trace.y)
    with pytest.raises(InputError, match="position 3 was not read"):
        viz.lens_trajectory(result, position=3)


def test_several_tokens_are_averaged():
    result = lens_result()
    for name in ("kl_final", "target_rank"):
        getattr(result, name)[1, 0, 0] = torch.tensor([2.0, 6.0]).to(getattr(result, name).dtype)
    result.target_rank[1, 1, 0] = torch.tensor([-1, 8])
    figure: Any = viz.lens_trajectory(result)
    traces = {(trace.yaxis, trace.name): trace for trace in figure.data}
    assert traces["y", "u + routed + shared"].y[1] == 4
    assert traces["y4", "u + routed + shared"].y[1] == 4 + 1  # between both, plus one for the logarithm
    assert list(traces["y4", "u + routed"].customdata[1]) == [8, 1]  # what has no target does not count
