"""Figures of patching and tracing show the results' numbers, under the right layers, experts and tokens."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from moe_lens.interventions.patch_result import PatchResult
from moe_lens.interventions.trace_result import SiteEffects, TraceResult
from moe_lens.viz.patching import GAP, PAIRS, patch_map, trace_map

NASTY = "<b>x</b>"


def patched(**axes: tuple[int, ...]) -> PatchResult:
    values = torch.rand([len(at) for at in axes.values()], dtype=torch.float64)
    return PatchResult(
        values=values, axes=axes, site="expert_weighted", metric="LogProb", direction="denoising", routing="free",
        clean=1.0, corrupted=0.2, n=1, tokens=("a", NASTY, " c", "d"),
    )  # fmt: skip


def traced(sites: dict[str, SiteEffects]) -> TraceResult:
    return TraceResult(
        sites=sites, clean=0.9, corrupted=torch.rand(10, dtype=torch.float64), score="probability",
        tokens=("a", NASTY, "c"), subject=(1,), at=(1,), noise_std=1.0, seed=0, routing="free", level=0.95,
    )  # fmt: skip


@pytest.mark.parametrize(
    "axes",
    [{"layer": (1, 2)}, {"layer": (1, 2), "pos": (1, 3)}, {"layer": (1, 2), "rank": (0, 1, 2)}],
)
def test_cells_are_effects(axes: dict[str, tuple[int, ...]]):
    result = patched(**axes)
    figure: Any = patch_map(result)
    (cells,) = figure.data
    assert np.array_equal(np.asarray(cells.z), result.effect.numpy().reshape(2, -1))
    assert list(cells.y) == ["1", "2"]
    if "pos" in axes:
        assert list(figure.layout.xaxis.ticktext) == ["&lt;b&gt;x&lt;/b&gt;", "d"]
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax
    assert figure.layout.coloraxis.cmax == result.effect.abs().max().item()


@pytest.mark.typed
def test_the_strongest_experts_are_shown_over_positions():
    result = patched(layer=(1, 2), expert=tuple(range(40)), pos=(0, 1, 2))
    figure: Any = patch_map(result)
    (cells,) = figure.data
    strength = {
        f"{layer}.{expert}": result.effect[i, expert].abs().max().item()
        for i, layer in enumerate((1, 2))
        for expert in range(40)
    }
    strongest = sorted(strength, key=lambda name: -strength[name])[:PAIRS]
    assert set(cells.y) == set(strongest)
    row = list(cells.y).index(strongest[0])
    layer, expert = map(int, strongest[0].split("."))
    assert np.array_equal(np.asarray(cells.z)[row], result.effect[layer - 1, expert].numpy())


def test_a_trace_has_a_panel_for_each_site():
    sites = {
        "resid": SiteEffects(torch.rand(10, 2, 3, dtype=torch.float64), {"layer": (0, 1), "pos": (0, 1, 2)}),
        "expert": SiteEffects(torch.rand(10, 1, 5, dtype=torch.float64), {"layer": (1,), "expert": tuple(range(5))}),
    }
    figure: Any = trace_map(traced(sites))
    assert [annotation.text for annotation in figure.layout.annotations] == ["residual stream", "single experts"]
    for cells, effects in zip(figure.data, sites.values(), strict=True):
        assert np.array_equal(np.asarray(cells.z), effects.mean.numpy())
        assert np.array_equal(np.asarray(cells.customdata)[..., 0], effects.interval[0].numpy())
    assert list(figure.layout.xaxis.ticktext) == ["a", "&lt;b&gt;x&lt;/b&gt;*", "c"]
    assert "0.900 clean" in figure.layout.title.text
    layout = figure.layout  # a name of a token or an axis under one panel is not upon the next
    pixels = layout.height - layout.margin.t - layout.margin.b
    assert (layout.yaxis.domain[0] - layout.yaxis2.domain[1]) * pixels == pytest.approx(GAP)
    assert layout.margin.b == GAP


def test_names_of_columns_do_not_crowd():
    for columns in (24, 64, 128):
        figure: Any = patch_map(patched(layer=(1, 2), expert=tuple(range(columns))))
        assert 20 <= len(figure.layout.xaxis.ticktext) <= 40


def hovered(figure: Any, cells: Any, row: int, column: int) -> str:
    """What plotly shows of a cell: for x the name of its tick, and of a column without one its place."""
    ticks = dict(zip(figure.layout.xaxis.tickvals, figure.layout.xaxis.ticktext, strict=True))
    shown = {"x": str(ticks.get(column, column)), "y": cells.y[row]}
    if cells.text is not None:
        shown["text"] = cells.text[row][column]
    return re.sub(r"%{(\w+)}", lambda found: shown[found[1]], cells.hovertemplate.split("<br>")[0])


def test_hovering_names_every_column_that_was_patched():
    figure: Any = patch_map(patched(layer=(1, 2), expert=tuple(range(10, 64))))
    (cells,) = figure.data
    assert len(figure.layout.xaxis.ticktext) < 54  # control: some columns have no tick
    assert [hovered(figure, cells, 1, i) for i in range(54)] == [f"layer 2, expert {i + 10}" for i in range(54)]


def test_hovering_names_every_column_that_was_traced():
    experts = SiteEffects(torch.rand(10, 1, 54, dtype=torch.float64), {"layer": (1,), "expert": tuple(range(10, 64))})
    figure: Any = trace_map(traced({"expert": experts}))
    (cells,) = figure.data
    assert [hovered(figure, cells, 0, i) for i in range(54)] == [f"layer 1, expert {i + 10}" for i in range(54)]
