"""Results know their figures, saved or not; figures and tables become files."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_lens import viz
from moe_lens.errors import InputError
from moe_lens.report.rendering import as_html
from moe_lens.studies import AblationStudy, RoutingStudy, SingleExpertStudy, StudyResult, run
from moe_lens.studies.frames import latex
from moe_lens.viz import figures
from tests.browser import chromium
from tests.studies.test_study import SMALL
from tests.studies.tiny import domain, tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder, model = tmp_path_factory.mktemp("drawn"), tiny_model()
    studies = {
        "routing": RoutingStudy(),
        "single": SingleExpertStudy(treatments=("dropped",), k=(1,)),
        "ablation": AblationStudy({1: [0]}, matched=2, how=("zero",)),
    }
    for name, study in studies.items():
        run(study, model, [domain("a"), domain("b_%", seed=1)], reading=SMALL, out=folder / name)
    return folder


@pytest.mark.parametrize("name", ["routing", "single", "ablation"])
def test_a_saved_study_draws_what_its_functions_draw(saved, name):
    result = StudyResult.load(saved / name)
    first, *others = [getattr(viz, each)(result).to_json() for each in viz.figures_of(result)]
    assert result.figure().to_json() == first
    for figure, drawn in zip(viz.figures_of(result)[1:], others, strict=True):
        assert result.figure(figure).to_json() == drawn != first


@pytest.mark.typed
def test_the_figure_of_an_ablation_has_the_numbers_of_its_table(saved):
    result = StudyResult.load(saved / "ablation")
    table = result.tables["ablation"]
    figure: Any = result.figure()
    for trace, kind in zip(figure.data, ("picked", "matched", "random"), strict=True):
        assert list(trace.y) == pytest.approx(list(table[table["coalition"] == kind]["added"]), nan_ok=True)


def test_domains_called_like_dates_are_names(saved):
    """Plotly would make a calendar of the axis, and leave out what is no date."""
    result = StudyResult.load(saved / "ablation")
    tables = {"ablation": result.tables["ablation"].replace({"domain": {"a": "2021-01", "b_%": "web"}})}
    drawn: Any = replace(result, tables=tables).figure()
    assert set(drawn.data[0].x) == {"2021-01", "web"} and drawn.layout.xaxis.type == "category"
    assert drawn.layout.yaxis.type is None, "the control: numbers stay numbers"


def test_figures_of_many_layers_and_experts_stay_legible(saved):
    """As many as Qwen3-30B has: 48 layers, 128 experts."""
    few = StudyResult.load(saved / "routing")
    tables: dict[str, Any] = dict(few.tables)
    for name, column, size in (
        ("most_specialised", "layer", 48),
        ("layers", "layer", 48),
        ("specialisation", "expert", 128),
    ):
        step = int(tables[name][column].max()) + 1
        parts = [tables[name].assign(**{column: tables[name][column] + step * i}) for i in range(size // step)]
        tables[name] = pd.concat(parts, ignore_index=True)
    many = replace(few, tables=tables)
    for of, legible in ((few, True), (many, False)):
        most: Any = viz.most_specialised(of)
        layers = sorted(set(of.tables["most_specialised"]["layer"]))
        assert (most.data[0].mode == "markers+text") is legible
        assert (list(most.layout.xaxis.tickvals or ()) == layers) is legible, "a number for a layer that is none"
        last = layers[-1]
        assert last < most.layout.xaxis.range[1] < last + 2, "no layers that are none"
        if not legible:
            assert most.layout.xaxis.minor.dtick == 1
        figure: Any = viz.specialisation_map(of)
        experts = len(figure.data[0].z[0])
        assert figure.layout.meta["least_width"] == 4 * experts + 160 and (experts == 128) is not legible
        assert f'<div class="scroll"><div style="min-width:{4 * experts + 160}px">' in as_html(figure)


def test_every_figure_that_is_named_is_offered():
    for names in (*figures.OF_STUDIES.values(), *figures.OF_RESULTS.values()):
        assert names and all(callable(getattr(viz, name)) for name in names)


@pytest.mark.typed
def test_unknown_figures_tables_and_columns_name_the_near_miss(saved):
    result = StudyResult.load(saved / "routing")
    with pytest.raises(InputError, match="did you mean 'most_specialised'"):
        result.figure("most_specialized")
    with pytest.raises(InputError, match="specialisation_map: got an unexpected keyword argument 'layer'"):
        result.figure(layer=3)
    frame = pd.DataFrame({"a": [1]})
    for study, instead in (
        ("facts", r"its numbers are in its tables: effects$"),
        ("atlas", r"its .expert\(layer, expert"),
    ):
        other = StudyResult({"plan": {"study": study}}, {"effects": frame}, {})
        with pytest.raises(InputError, match=f"^there is no figure of a study '{study}'; {instead}"):
            other.figure()
    assert all(callable(getattr(other, name)) for name in re.findall(r"its \.(\w+)", figures.INSTEAD["atlas"]))
    assert not set(figures.INSTEAD) & set(figures.OF_STUDIES), "what has a figure has it"
    with pytest.raises(InputError, match="no figure of a DataFrame; there are figures of StudyResult, LensResult"):
        figures.figure(frame)
    with pytest.raises(InputError, match="did you mean 'layers'"):
        result.to_latex("layer")
    with pytest.raises(InputError, match="did you mean 'share'"):
        result.to_latex("most_specialised", columns=["shares"])


def test_latex_has_numbers_with_their_intervals_and_escapes_names():
    nan = float("nan")
    frame = pd.DataFrame({"domain": ["b_%", "a\n~"], "share": [0.25, 1.5e-7], "low": [0.125, nan], "high": [0.5, nan]})
    frame = frame.assign(x=[1.0, nan])
    frame.insert(1, "layer", pd.array([1, None], dtype="Int64"))
    assert latex(frame).splitlines() == [
        r"\begin{tabular}{lrrr}", r"\toprule", r"domain & layer & share & x \\", r"\midrule",
        r"b\_\% & 1 & $0.25$ $[0.125, 0.5]$ & $1$ \\",
        r"a\textbackslash{}n\textasciitilde{} &  & $1.5\times10^{-7}$ &  \\",
        r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
    assert latex(frame, ["share"], layer=1).splitlines()[4] == r"$0.25$ $[0.125, 0.5]$ \\"
    assert latex(frame, ["x", "low"]).splitlines()[4] == r"$1$ & $0.125$ \\", "without its number"
    twice = pd.concat([frame, frame.assign(layer=2)])
    assert latex(twice, layer=[1, 2], domain="b_%").splitlines()[4:6] == latex(twice, domain="b_%").splitlines()[4:6]


@pytest.mark.parametrize("kind", [list, np.array])  # as they are made, and as parquet gives them back
def test_latex_prints_lists_in_a_cell_and_does_not_choose_by_them(kind):
    frame = pd.DataFrame({"experts": [kind([3]), kind([1, 2])], "weights": [kind([0.12345]), kind([])], "n": [7, 8]})
    assert latex(frame).splitlines()[4:6] == [r"3 & $0.123$ & 7 \\", r"1, 2 &  & 8 \\"]
    assert latex(frame, n=8).splitlines()[4] == r"1, 2 &  & 8 \\"
    with pytest.raises(InputError, match="^experts is a list in each row; choose rows by another column$"):
        latex(frame, experts=3)


def test_latex_prints_tokens_as_they_are():
    """LaTeX's default encoding prints < > | " as others, its ends of lines take [ and *, and it drops spaces."""
    said = {
        "<s>": r"\textless{}s\textgreater{}",
        '|"': r"\textbar{}\texttt{\char34}",
        "[": "{}[",
        "*a": "{}*a",
        " many": r"\textvisiblespace{}many",
        "many": "many",
        "a  b ": r"a\textvisiblespace{}\textvisiblespace{}b\textvisiblespace{}",
        "--": "-{}-",
        "?``": "?{}`{}`",
        "'it's', 'a b'": "'it's', 'a b'",
    }
    frame = pd.DataFrame({"text": list(said), "[x": "[", "y": 0.5})
    body = latex(frame).splitlines()[4:-2]
    assert body == [rf"{cell} & [ & $0.5$ \\" for cell in said.values()] and len(set(body)) == len(said)
    assert latex(frame, ["[x", "y"]).splitlines()[2] == r"{}[x & y \\"


@pytest.mark.parametrize(
    ("equal", "says"),
    [
        ({"domain": "bb"}, "no row has domain 'bb'; there are 'b', 'a'"),
        ({"layer": "1"}, "no row has layer '1'; there are 1"),
        ({"layer": [1, 99]}, "no row has layer 99; there are 1"),
        ({"domain": "a", "layer": 1}, "no row has layer 1; there are 2"),
    ],
)
def test_rows_that_there_are_not_are_no_empty_table(equal, says):
    frame = pd.DataFrame({"domain": ["b", "a"], "layer": [1, 2], "share": [0.5, 0.25]})
    with pytest.raises(InputError, match=says):
        latex(frame, **equal)


def test_saved_latex_is_the_table(saved):
    said = StudyResult.load(saved / "routing").to_latex("most_specialised", columns=["domain", "share"], layer=1)
    assert said.count(r"\\") == 1 + 2 and r"b\_\%" in said and "$[" in said


@pytest.mark.typed
def test_a_figure_that_cannot_be_written_says_what_it_takes(saved, tmp_path, monkeypatch):
    figure = StudyResult.load(saved / "routing").figure()
    with pytest.raises(InputError, match=r"expected a name that ends in \.pdf, \.svg"):
        viz.save_figure(figure, tmp_path / "figure.eps")
    assert viz.save_figure(figure, tmp_path / "figure.html").read_text().count("plotly") > 1
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(InputError, match=r"pip install 'moe-lens\[figures\]'"):
        viz.save_figure(figure, tmp_path / "figure.pdf")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.html"]


@pytest.mark.slow  # kaleido starts a browser for each file
def test_pdf_and_svg_are_drawn_offline(saved, tmp_path):
    pytest.importorskip("kaleido")
    chromium()
    figure = StudyResult.load(saved / "routing").figure()
    assert viz.save_figure(figure, tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    drawn = viz.save_figure(figure, tmp_path / "figure.svg", width=640).read_text()
    assert drawn.startswith("<svg") and 'width="640"' in drawn and ">b_%<" in drawn
