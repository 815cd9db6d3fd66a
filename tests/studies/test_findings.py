"""What a study says when it ends: the numbers of its tables, with interval and control; and near misses of names."""

import contextlib
import copy
import io
import json
import re
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from moe_lens.cli import main
from moe_lens.cli.show import findings_in
from moe_lens.data import Domain, batch_windows, from_generator, shards
from moe_lens.errors import near_miss
from moe_lens.manifest import seal
from moe_lens.report.domains_section import domains
from moe_lens.report.findings_section import findings
from moe_lens.report.report_page import page_of
from moe_lens.studies import Checkpoints, Collected, RoutingStudy, SingleExpertStudy, StudyResult, collect, run
from moe_lens.studies.attribution_fidelity import AttributionFidelity
from moe_lens.studies.finding_sentences import MOST, findings_of
from moe_lens.studies.findings import Margin, across, told
from moe_lens.studies.texts_read import TextStats
from tests.studies.test_checkpoints import perturbed
from tests.studies.test_study import SMALL
from tests.studies.tiny import domain, tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("findings"), tiny_model()
    run(RoutingStudy(), model, [domain("a"), domain("b", seed=1)], reading=SMALL, out=folder / "routing")
    run(SingleExpertStudy(treatments=("dropped", "random")), model, [domain("few", sources=3)], reading=SMALL,
        out=folder / "single")  # fmt: skip
    collect(model, [domain("a")], folder / "collect", reading=SMALL)
    return folder


def test_a_finding_is_the_row_of_the_table_with_its_interval_and_null(saved):
    result = StudyResult.load(saved / "routing")
    found = result.findings()
    assert len(found.lines) <= MOST and not found.warnings and found.then
    best = result.tables["most_specialised"]
    top = best.loc[best["share"].idxmax()]
    uniform = result.manifest["plan"]["model"]["top_k"] / result.manifest["plan"]["model"]["experts"]
    said = found.lines[0]
    assert f"expert {top['expert']} of layer {top['layer']}" in said and f"of {top['domain']}'s" in said
    assert f"{top['share']:.1%} [{top['low']:.1%}, {top['high']:.1%}]" in said and f"uniform {uniform:.1%}" in said
    assert "(most_specialised)" in said

    # Negative control: another table says another thing.
    other = best.assign(share=1 - best["share"])
    changed = findings_of(result.manifest, {**result.tables, "most_specialised": other})
    assert changed.lines[0] != said and changed.lines[1:] == found.lines[1:]


def test_no_interval_is_said_and_so_is_why(saved):
    found = StudyResult.load(saved / "single").findings()
    assert "few (3)" in found.warnings[0] and "fewer than ten sources" in found.warnings[0]
    assert all("[no interval]" in line for line in found.lines) and "drawn at random" in found.lines[1]
    assert "warning: no interval" in str(found)


def test_across_domains_the_least_and_the_greatest_stand_with_their_own_intervals():
    rows: Any = pd.DataFrame({"domain": ["a", "b", "c"], "x": [2.0, 1.0, 3.0], "low": [1.5, 0.5, float("nan")],
                         "high": [2.5, 1.5, float("nan")]})  # fmt: skip
    assert across(rows, "x") == "1 [0.5, 1.5] (b) to 3 [no interval] (c)"
    assert across(rows[:1], "x") == "2 [1.5, 2.5] (a)"
    assert across(rows.assign(x=float("nan")), "x") == "not measured"


def test_no_effect_takes_intervals_inside_of_the_margin():
    near, margin = {"x": 0.001, "low": -0.004, "high": 0.006}, Margin(0.01, "nats")
    wide, there = {"x": 0.001, "low": -0.2, "high": 0.2}, {"x": 0.3, "low": 0.2, "high": 0.4}
    unknown, missing = (
        {"x": 0.0, "low": float("nan"), "high": float("nan")},
        dict.fromkeys(("x", "low", "high"), float("nan")),
    )
    for rows, said in (
        ([near], ": no effect within ± 0.01 nats"),
        ([near, missing], ": no effect within ± 0.01 nats"),
        ([{**near, "low": 0.0005}], ": no effect within ± 0.01 nats"),  # above 0, and still none to speak of
        ([wide], ": not distinguishable from 0"),  # the same number, and nothing known
        ([{**near, "low": -0.02}], ": not distinguishable from 0"),  # beyond the margin at either end
        ([{**near, "high": 0.02}], ": not distinguishable from 0"),
        ([near, wide, there], ": not distinguishable from 0 in 2 of 3"),
        ([there], ""),
        ([near, unknown], ""),
        ([missing], ""),
    ):
        assert told(pd.DataFrame(rows), "x", margin) == said


def test_show_prints_findings_and_tables_as_text(saved, capsys):
    assert main(["show", str(saved / "routing"), "--table", "layers", "--rows", "2"]) == 0
    said = capsys.readouterr().out
    assert str(StudyResult.load(saved / "routing").findings()).splitlines()[0] in said
    assert "layers: " in said and "gini" in said and "persistence" not in said.split("layers: ")[1]
    assert main(["show", str(saved / "collect")]) == 0
    assert str(Collected.load(saved / "collect").n_tokens) in re.sub(",", "", capsys.readouterr().out)
    assert main(["show", str(saved / "routing"), "--table", "layer"]) == 2
    assert "did you mean 'layers'?" in capsys.readouterr().err
    assert main(["show", str(saved / "nothing")]) == 2
    assert "holds no result of a study" in capsys.readouterr().err


def test_markup_and_control_characters_of_names_stay_text(saved, capsys):
    from moe_lens.cli import show

    frame = pd.DataFrame({"[bold]x[/bold]": ["[red]a[/red]", "\x1b[31mb"]})
    show._print(show._console(), "[blink]t", frame, 5)
    said = capsys.readouterr().out
    assert "[bold]x[/bold]" in said and "[red]a[/red]" in said and "[blink]t" in said and "\x1b[31m" not in said
    assert show.visible("o\u202eo") == r"o\u202eo"
    assert show.visible("é: \x1b[31m\r\x9b\n") == r"é: \x1b[31m\r\x9b" + "\n"


@pytest.mark.typed
def test_a_table_wider_than_the_terminal_is_shown_in_parts_with_no_number_cut():
    from moe_lens.cli import show

    measured = {f"measure_{i}": [0.5 + i / 1000, -12345.0] for i in range(12)}
    frame = pd.DataFrame({"layer": [1, 2], "expert": [30, 31], **measured, "ids": [list(range(9)), [7]]})
    said = io.StringIO()
    show._print(Console(width=60, file=said), "t", frame, 5)
    lines = said.getvalue().splitlines()
    heads = [line.strip("┃ ").split() for line in lines if line.startswith("┃")]
    assert all(head[:3:2] == ["layer", "expert"] for head in heads)
    assert [name for head in heads for name in head[4::2]] == list(frame.columns[2:])
    assert all(f"{value:.4g}" in said.getvalue() for values in measured.values() for value in values)
    assert "0, 1, 2, 3, 4, 5, … (9)" in said.getvalue() and max(map(len, lines)) <= 60


@pytest.mark.typed
def test_near_misses_are_named_and_others_are_not(tmp_path, capsys, saved):
    assert near_miss("Germn", ["english", "german"]) == "; did you mean 'german'?"
    assert near_miss("swahili", ["english", "german"]) == ""
    for arguments, meant in (
        (["routing", "--domain", "englsh"], "'english'"),
        (["routing", "--model", "tiny-deepseek-moe"], "'tiny-deepseekmoe'"),
        (["prune", "--specialist", "frnch"], "'french'"),
        (["compare", str(saved / "routing"), "--domain", "a", "--domain", "bb"], ""),
    ):
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert f"did you mean {meant}" in line if meant else "did you mean" not in line


def test_five_lines_at_most():
    frame = pd.DataFrame({"domain": [f"d{i}" for i in range(9)], "measure": "difference"})
    frame = frame.assign(picked=1.0, all=2.0, estimate=0.5, low=0.1, high=0.9)
    manifest = {"plan": {"study": "facts", "domains": [], "model": {"name": "m"}}, "read": []}
    assert len(findings_of(manifest, {"contrast": frame}).lines) == MOST


@pytest.mark.typed
def test_verdicts_of_several_reports_stand_side_by_side(tmp_path, capsys):
    for name, inference in (("one", "holds"), ("two", "contradicted")):
        row = {"key": "1a", "claim": "1a few", "number": "holds", "inference": inference, "sentence": ""}
        (tmp_path / name).mkdir()
        verdicts = {"format": 2, "model": name, "texts": ["a"], "verdicts": [row]}
        (tmp_path / name / "verdicts.json").write_text(json.dumps({**verdicts, "seal": seal(verdicts)}))
    assert main(["show", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    said = capsys.readouterr().out
    assert "one on a" in said and "two on a" in said and "holds / holds" in said and "holds / contradicted" in said
    assert "the inference contradicted: claim 1a" in findings_in(tmp_path / "two")
    path = tmp_path / "two" / "verdicts.json"
    sealed, row = json.loads(path.read_text()), {"key": "1", "claim": "c", "number": None, "inference": "holds"}
    earlier = {"format": 1, "model": "two", "texts": ["a"], "verdicts": [row]}  # had no seal

    def shown(content: Any) -> str:
        path.write_text(json.dumps(content))
        code = main(["show", str(tmp_path / "one"), str(tmp_path / "two")])
        said = capsys.readouterr().err
        assert (code, said.count("\n")) in ((0, 0), (2, 1))
        return said

    assert not shown(earlier)
    for content in (
        {**sealed, "verdicts": [{**sealed["verdicts"][0], "inference": "holds"}]},
        {**sealed, "model": "another"},
        *({**earlier, key: value} for key in ("model", "texts", "verdicts") for value in (None, 3, [3])),
        *({**earlier, "verdicts": [{**row, key: [3]}]} for key in row),
    ):
        assert "is not as the report wrote it" in shown(content)
    assert "has format 4" in shown({**sealed, "format": 4}) and "holds a list" in shown([])


def test_a_report_of_two_models_begins_with_their_verdicts_side_by_side(saved):
    result = StudyResult.load(saved / "routing")
    manifest = copy.deepcopy(dict(result.manifest))
    manifest["plan"]["model"]["name"] = "other <b>"
    page = page_of([result, StudyResult(manifest, result.tables, result.results)])
    shown = page[page.index('id="verdicts-together"') :].partition("</table>")[0]
    assert "<th>other &lt;b&gt; on a, b</th>" in shown and "1b" in shown
    assert 'id="verdicts-together"' not in page_of([result])


def test_sources_count_together_where_intervals_are_over_all_of_them():
    read = [{"name": "a", "sources": 6, "tokens": 30}, {"name": "b", "sources": 6, "tokens": 50}]
    layers = pd.DataFrame({"layer": [1], "feature": "token", "explained": 0.5, "explained_low": 0.4,
                           "explained_high": 0.6, "gain": 0.1, "gain_low": 0.0, "gain_high": 0.2,
                           "gain_shuffled": 0.0})  # fmt: skip
    manifest = {"plan": {"study": "explain", "domains": [], "model": {"name": "m"}}, "read": read}
    found = findings_of(manifest, {"layers": layers})
    assert not found.warnings and "0.5 [0.4, 0.6] (layer 1)" in found.lines[0]
    assert findings_of({**manifest, "read": read[:1]}, {"layers": layers}).warnings  # negative control
    assert len(found.lines) == 1, "features that were not asked about are not spoken of"
    named = findings_of(manifest, {"layers": pd.concat([layers, layers.assign(feature="domain")])})
    assert len(named.lines) == 2 and "domain adds to that 0.1 [0, 0.2]" in named.lines[1]


def test_the_headline_of_fewer_experts_is_there_where_they_were_left_out_in_all_layers(saved):
    result = StudyResult.load(saved / "single")
    each = result.tables["perplexity"].assign(layer=1)  # as of `--layers each`
    for perplexity, there in ((result.tables["perplexity"], True), (each, False)):
        tables = {**result.tables, "perplexity": perplexity}
        page = findings({"single_expert": StudyResult(result.manifest, tables, result.results)})
        assert page is not None and ("Fewer experts" in page.body) == there
        assert "One expert against the ensemble" in page.body


@pytest.mark.parametrize(("asked", "short"), [(None, ""), (30, ""), (31, "a (30)"), (51, "a (30), b (50)")])
def test_fewer_tokens_than_were_asked_for_are_said(asked, short):
    read = [{"name": "a", "sources": 16, "tokens": 30}, {"name": "b", "sources": 16, "tokens": 50}]
    plan = {"study": "another", "domains": [], "model": {"name": "m"}, "reading": {"tokens": asked}}
    found = findings_of({"plan": plan, "read": read}, {})
    said = f"{short}: all of its texts, which are fewer than the {asked:,} tokens asked for" if short else None
    assert found.warnings == ((said,) if said else ())


@pytest.mark.parametrize("streamed", [False, True])
def test_sources_with_one_and_the_same_text_are_said_not_to_be_independent(streamed):
    texts = [passage.text for passage in domain("d", n=6, sources=6).passages]
    model, said = tiny_model(), []
    for second in (range(6), range(6, 12)):
        rows = [
            {"text": text, "source": source}
            for of in (range(6), second)
            for text, source in zip(texts, of, strict=True)
        ]
        read = from_generator("d", lambda rows=rows: rows) if streamed else Domain.of("d", rows)
        found = run(RoutingStudy(), model, read, reading=SMALL)
        said.append([line for line in found.findings().warnings if "word for word: d (12); these" in line])
    assert [len(lines) for lines in said] == [0, 1]


def test_equal_texts_are_found_in_parts_that_were_read_apart_and_kept_meanwhile():
    model, parts = tiny_model(), []
    for number in range(3):
        texts = Domain.of("d", ["The old man looked at the sea.", f"Text {number} alone."], sources=[number] * 2)
        (shard,) = shards(texts, model, SMALL)
        parts.append(TextStats().update(*batch_windows(shard.windows, model, batch_tokens=2048)))
    assert [part.result().repeated for part in parts] == [0, 0, 0]  # of one source
    whole = TextStats().load_state_dict(parts[0].merge(parts[1]).state_dict()).merge(parts[2]).merge(parts[2])
    assert whole.result().repeated == 3


def test_a_study_under_keep_top_says_that_it_counts_what_was_selected():
    model, texts = tiny_model(), domain("d")
    said, shares = [], []
    for inside in (
        contextlib.nullcontext(),
        model.use_experts(model.top_k),
        model.ablate(ranks=[1]),
        model.keep_top(1),
    ):
        with inside:
            found = run(RoutingStudy(), model, texts, reading=SMALL)
        said.append([line.split()[0] for line in found.findings().warnings if "left experts out" in line])
        result: Any = found.results["d"]["model routing"]
        shares.append(int(result.assignments.sum()) / result.n_tokens / len(result.layers))
    assert said == [[], [], ["ablate"], ["keep_top"]] and shares == [model.top_k] * 4


def test_a_single_source_has_no_share_that_was_picked_on_others():
    texts = [domain("one", n=2, sources=1)]
    result = run(RoutingStudy(), tiny_model(), texts, reading=SMALL)
    said = str(result.findings())
    assert "most specialised: expert" in said and "cross-fitted" not in said


@pytest.mark.parametrize("sources", [2, 12])
def test_what_so_few_sources_cannot_tell_is_not_said_to_be_the_same(sources: int):
    texts = [domain(name, n=12, sources=sources, seed=seed) for seed, name in enumerate("ab")]
    result = run(RoutingStudy(), tiny_model(), texts, reading=SMALL)
    page = "".join(str(part({"routing": result})) for part in (findings, domains))
    line = next(line for line in result.findings().lines if "domain_layers" in line)
    few = sources == 2  # control: with 12 it can be told
    assert line.startswith("whether domains are routed differently cannot be told from so few sources; most in") == few
    assert line.startswith("domains are routed differently in") != few
    assert ("<td>cannot be told</td>" in page) == ("With so few sources it cannot be told" in page) == few
    assert ("Experts depend on the domain in" in page) != few


def test_checkpoints_and_fidelity_end_with_their_numbers_and_nulls():
    texts = [domain("a", n=12), domain("b", n=12, seed=1)]
    found = run(Checkpoints(perturbed(tiny_model(), "gate.weight")), tiny_model(), texts, reading=SMALL)
    lines, overlap = found.findings().lines, found.tables["overlap"]
    assert len(lines) == MOST and "tables" not in lines[0]
    own: Any = overlap[overlap["pair"] == "checkpoints"]
    least = own.loc[own["overlap"].idxmin()]
    assert f"{least['overlap']:.3g} [{least['low']:.3g}, {least['high']:.3g}] ({least['domain']}, layer" in lines[0]
    assert f"by load alone {own['by_load'].min():.3g} to" in lines[0] and "1 [1, 1]" in lines[2]
    losses = found.tables["losses"].set_index(["run", "domain"])["added"]
    assert all(f"{value:.3g} [" in lines[3] for value in losses["first with the other's routers"])

    found = run(AttributionFidelity(steps=1), tiny_model(), texts[0], reading=SMALL)
    lines, fidelity = found.findings().lines, found.tables["fidelity"]
    rows = fidelity[fidelity["layer"].isna() & (fidelity["reference"] == "knockout")].set_index("method")
    for line, method in zip(lines, ("direct", "gradient", "integrated"), strict=False):
        assert line.startswith(method) and f"Spearman {rows['spearman'][method]:.3g} [" in line
    assert f"frequency {rows['spearman']['frequency']:.3g}" in lines[3] and "rerouting" in lines[4]

    always = tiny_model(n_routed_experts=4, num_experts_per_tok=4)
    said = str(run(AttributionFidelity(steps=1), always, texts[0], reading=SMALL).findings())
    assert "frequency not measured and norm " in said and "nan" not in said  # all are chosen alike
