"""The folder of the atlas: its files, and what a browser that opens them shows, asks for and refuses to run."""

import html
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_lens.atlas import AtlasFolder, expert_card, run, write_atlas
from moe_lens.atlas.knocked_out import OVER
from moe_lens.atlas.pages import DATA, SHARD, SHIPPED
from moe_lens.atlas.script_files import script, sharded
from moe_lens.cli import main
from moe_lens.data import Reading
from moe_lens.errors import HookError, InputError
from moe_lens.studies import AblationStudy, Atlas, StudyResult
from moe_lens.studies import run as run_study
from tests.atlas.shown import HOSTILE, given, hostile, show, text
from tests.planted import ATLAS_READING, LAYER, PLANTED, planted_atlas, planted_domains, planted_model
from tests.studies.tiny import save_checkpoint, write_jsonl
from tests.test_docs import DOCS, code_of

SIX_DIGITS = 1e-5
"""Numbers in the files of a folder are rounded, up or down, to six significant digits."""


def test_texts_in_scripts_are_data_whatever_they_hold():
    for hostile_text in HOSTILE:
        written = script("x", {hostile_text: [hostile_text, float("nan"), 0.12345678, 10**12]})
        assert not set("<>&\u2028\u2029") & set(written)
        value = json.loads(written.removeprefix('atlas.put("x", ').removesuffix(");\n"))
        assert value == {hostile_text: [hostile_text, None, 0.123456, 10**12]}


def test_parts_of_the_index_hold_everything_once_and_are_small():
    entries = {number: "x" * (number % 97) for number in range(1000)}
    parts = list(sharded(entries, 1000))
    assert {key: value for part in parts for key, value in part.items()} == entries
    assert sum(map(len, parts)) == 1000 and max(len(json.dumps(part, separators=(",", ":"))) for part in parts) < 1100
    assert list(sharded({1: "x" * 5000}, 1000)) == [{1: "x" * 5000}] and SHARD <= 500_000


def test_files_are_the_same_for_the_same_result_and_name_nothing_elsewhere(folder, tmp_path):
    assert write_atlas(hostile(planted_atlas()[1]), tmp_path) == tmp_path / "index.html"
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {str(name) for name in files if name.parts[0] != DATA} == set(SHIPPED)
    shipped = "".join((folder / name).read_text("utf-8") for name in SHIPPED)
    assert not re.search(r"https?:|url\(|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(", shipped)
    words = given(folder, "words")
    known = dict(zip(words["ids"], words["texts"], strict=True))
    used = {entry[0] for expert in given(folder, f"layer-{LAYER}")["experts"] for entry in expert["tokens"]}
    assert used <= known.keys() and set(HOSTILE) <= set(known.values())


def test_another_studys_result_and_a_place_that_cannot_be_written_are_refused(tmp_path):
    result = planted_atlas()[1]
    other = replace(result, manifest={**result.manifest, "plan": {**result.manifest["plan"], "study": "routing"}})
    with pytest.raises(InputError, match="the result of the study 'routing'; expected 'atlas'"):
        write_atlas(other, tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_atlas(result, tmp_path / "file" / "a")


@pytest.mark.parametrize("name", ["data/mine.csv", "data/mine.js", "index.html", "base.js", "data"])
def test_nothing_of_other_origin_is_replaced(tmp_path, name):
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("the only copy")
    with pytest.raises(InputError, match=f"{re.escape(str(mine))}: is there, is not of an atlas"):
        write_atlas(planted_atlas()[1], tmp_path)
    with pytest.raises(InputError, match="is not of an atlas"):  # before the work
        run(planted_model(), {"a": ["b"]}, tmp_path)
    assert mine.read_text() == "the only copy" and not (tmp_path / "study").exists()
    mine.unlink()
    write_atlas(planted_atlas()[1], tmp_path)
    (tmp_path / "index.html").unlink()  # what is written last
    write_atlas(planted_atlas()[1], tmp_path)


def test_the_map_shows_all_experts_and_whose_they_are(page, folder):
    show(page, folder, "")
    assert page.ask("document.querySelectorAll('.cell').length") == 2 * 16
    foremost = page.ask("[...document.querySelectorAll('.foremost tbody tr')].map((row) => row.innerText)")
    for name, expert in PLANTED.items():
        assert re.search(rf"expert {expert}\*\s*100 % of tokens; again in 100 %", foremost[1]), (name, foremost)
    assert page.requests and all(url.startswith("file:") or url == "about:blank" for url in page.requests)
    assert not page.complaints
    page.ask("document.querySelector('.cell').focus()")
    key = {"key": "ArrowRight", "code": "ArrowRight", "windowsVirtualKeyCode": 39}
    page.send("Input.dispatchKeyEvent", type="keyDown", **key)
    assert page.ask("document.activeElement.dataset.e") == "1"
    assert text(page, "#told").startswith("Layer 1, expert 1: ")
    show(page, folder, "#map=&measure=share&domain=sea&tested=yes")
    lit = page.ask("[...document.querySelectorAll('.cell:not(.out)')].map((cell) => cell.getAttribute('href'))")
    assert f"#layer={LAYER}&expert={PLANTED['sea']}" in lit and len(lit) < 32


def test_a_link_opens_the_card_of_an_expert_with_the_studys_numbers(page, folder):
    place = f"#layer={LAYER}&expert={PLANTED['sea']}"
    show(page, folder, place)
    shown, tables = text(page), planted_atlas()[1].tables
    domains: Any = tables["domains"].query(f"layer == {LAYER} and expert == {PLANTED['sea']} and domain == 'sea'")
    row = domains.iloc[0]
    assert (
        f"Layer {LAYER}, expert {PLANTED['sea']}" in shown
        and "Clearly sea's: the most specialised expert of its layer" in shown
    )
    assert f"{row['assigned']} of {row['tokens']}; {row['sources']} sources" in shown
    explained: Any = tables["explained"].query(f"layer == {LAYER} and expert == {PLANTED['sea']}").set_index("feature")
    said: Any = tables["chosen_for"].query(f"layer == {LAYER} and expert == {PLANTED['sea']}")
    assert said["sentence"].iloc[0] in shown and f"{100 * said['precision'].iloc[0]:.1f} % of such tokens" in shown
    assert re.search(rf"the token\s*{100 * explained['explained']['token']:.1f} %", shown)
    knocked: Any = tables["knockouts"].query(f"layer == {LAYER} and expert == {PLANTED['sea']} and read == 'sea'")
    assert re.search(rf"sea\s*{round(1000 * knocked.iloc[0]['added'], -1):,.0f}\s", shown)
    assert "Held against its controls, on sea *" in shown and "More than each of its controls *" in shown
    assert page.ask("document.querySelectorAll('.contexts li').length") == 15
    assert all(f"{part}" in shown for part in ("Strongest", "At random", "Nearly", "In its layer", "By outputs"))
    assert not page.complaints and f"layer-{LAYER}.js" in "".join(page.requests)
    key = {"key": "]", "code": "BracketRight", "text": "]"}
    page.send("Input.dispatchKeyEvent", type="keyDown", **key)
    page.until(f"location.hash === '#layer={LAYER}&expert={PLANTED['sea'] + 1}'")
    show(page, folder, "#layer=99&expert=0")
    assert "No such expert" in text(page) and not page.complaints


def test_hostile_tokens_are_found_and_shown_and_never_run(page, folder):
    show(page, folder, f"#layer={LAYER}&expert={PLANTED['sea']}")
    shown = page.ask("document.querySelector('main').textContent")
    assert all(known in shown for known in HOSTILE[:3])
    assert "line\\u{2028}separator\\u{2029}&amp;<!--" in shown and "\\u{202e}right␣to␣left\u0634\u0645\u0633" in shown
    show(page, folder, "#text=0")
    assert "</script>" in page.ask("document.body.textContent")
    page.ask(
        "const box = document.getElementById('search'); box.value = '<img/src'; box.dispatchEvent(new Event('input'))"
    )
    assert text(page, "#found a").startswith("<img/src=")
    page.ask("document.querySelector('#found a').click()")
    page.until("document.getElementById('view').dataset.view === 'token'")
    page.until("document.querySelector('h1').textContent.startsWith('Token <img')")
    assert f"expert {PLANTED['sea']} 100 %" in text(page).replace("\xa0", " ")
    assert page.ask("document.images.length + document.scripts.length") == page.ask("document.scripts.length")
    assert "ran" not in page.ask("document.title").split("·")[1] and not page.complaints
    assert all(url.startswith("file:") or url == "about:blank" for url in page.requests)


def test_negative_control_a_browser_that_was_given_markup_would_run_it(page, folder, tmp_path):
    broken = tmp_path / "index.html"
    broken.write_text(f"<!doctype html><title>calm</title><p id=x>{HOSTILE[1]}</p>", "utf-8")
    page.open(broken)
    page.until("document.title === 'ran'")


def test_texts_are_shown_by_token_with_ranks_and_lens(page, folder):
    show(page, folder, "#text=6&layer=2&pos=1")
    shown = text(page)
    tokens: Any = planted_atlas()[1].tables["text_slots"].query("text == 6 and layer == 2 and pos == 1")
    for row in tokens.to_dict("records"):
        assert re.search(rf"{row['rank']}\s*expert {row['expert']}\s", shown)
    key = {"key": "ArrowRight", "code": "ArrowRight", "windowsVirtualKeyCode": 39}
    page.send("Input.dispatchKeyEvent", type="keyDown", **key)
    page.until("location.hash.includes('pos=2')")
    page.until("document.querySelector('.here') === document.querySelectorAll('.running .piece')[2]")
    assert not page.complaints


def test_a_card_by_itself_shows_the_same_in_a_notebook(page, folder, tmp_path):
    card = expert_card(hostile(planted_atlas()[1]), LAYER, PLANTED["sea"])
    assert hostile(planted_atlas()[1]).expert(LAYER, PLANTED["sea"]) == card
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><title>calm</title>{card._repr_html_()}", "utf-8")
    card.save(tmp_path / "card.html")
    show(page, folder, f"#layer={LAYER}&expert={PLANTED['sea']}")
    whole = text(page)
    page.open(tmp_path / "card.html")
    page.until("document.querySelector('section') !== null")
    alone = text(page)
    page.open(folder / "index.html", f"#layer={LAYER}&expert={PLANTED['sea']}")
    page.until("document.querySelector('section') !== null")
    page.ask("document.querySelector('nav.contents').remove()")
    leads = "document.querySelectorAll('.contexts small a')"
    page.ask(f"{leads}.forEach((of) => {{ of.previousSibling.remove(); of.remove(); }})")
    whole = text(page)
    page.open(tmp_path / "card.html")
    page.until("document.querySelector('section') !== null")
    assert alone == whole[whole.index(f"Layer {LAYER}") :] and page.ask("document.querySelectorAll('a').length") == 0
    page.requests.clear()
    page.open(notebook)
    page.until("document.title === 'calm'")
    assert all(url.startswith(("file:", "about:")) for url in page.requests) and not page.complaints
    with pytest.raises(InputError, match="expert 16; the layer has 0 to 15"):
        expert_card(planted_atlas()[1], LAYER, 16)
    with pytest.raises(HookError, match=r"layer 0 has no experts; MoE layers are \[1, 2\]"):
        expert_card(planted_atlas()[1], 0, 0)


@pytest.mark.typed
def test_knock_outs_that_are_asked_for_join_a_complete_atlas(page, tmp_path):
    model = planted_model()
    made = partial(run, model, planted_domains(), tmp_path / "atlas", study=Atlas(), reading=ATLAS_READING)
    first = made()
    manifest = (tmp_path / "atlas" / "study" / "manifest.json").read_bytes()
    compared: Any = StudyResult.load(tmp_path / "atlas" / "study").tables["compared"]
    expert = min({*range(16)} - {*compared.query(f"layer == {LAYER}")["expert"]})
    show(page, tmp_path / "atlas", f"#layer={LAYER}&expert={expert}")
    assert f"adds it, on all texts, with --knock-out {LAYER}:{expert}." in text(page) and "asked for this" not in text(
        page
    )

    with pytest.raises(InputError, match="expert 99"):
        made(knock_out={LAYER: [99]})
    assert made(knock_out={LAYER: [expert, PLANTED["sea"]]}) == first
    assert (tmp_path / "atlas" / "study" / "manifest.json").read_bytes() == manifest  # nothing is measured again
    study = AblationStudy({LAYER: [PLANTED["sea"]]}, how=("zero",), matched=4)
    table: Any = run_study(study, model, planted_domains(), reading=ATLAS_READING).tables["ablation"]
    shown = given(tmp_path / "atlas", f"layer-{LAYER}")["experts"]
    assert [of["asked"] for i, of in enumerate(shown) if i not in (expert, PLANTED["sea"])] == [[]] * 14
    control = {"controls": "coalitions", "control_added": "added", "control_mass": "mass"}
    control |= {name: name for name in ("control_least", "control_most", *OVER)}
    own = {name: name for name in ("mass", "added", "low", "high", "tokens", "sources")}
    for kind, names in (("picked", own), ("matched", control)):
        right = table.query(f"coalition == '{kind}'")[list(names.values())].to_numpy(dtype=float)
        found = [[line[name] for name in names] for line in shown[PLANTED["sea"]]["asked"]]
        np.testing.assert_allclose(np.array(found, dtype=float), right, rtol=SIX_DIGITS)
    assert [len(line["each"]) for line in shown[PLANTED["sea"]]["asked"]] == [
        line["controls"] for line in shown[PLANTED["sea"]]["asked"]
    ]
    lost = {line["domain"]: line["added"] for line in shown[PLANTED["sea"]]["asked"]}
    assert lost.pop(list(PLANTED).index("sea")) > 10 * max(map(abs, lost.values()))  # the planted truth

    show(page, tmp_path / "atlas", f"#layer={LAYER}&expert={PLANTED['sea']}")
    assert "You asked for this one." in text(page) and not page.complaints
    assert '"asked":[{' in expert_card(tmp_path / "atlas" / "study", LAYER, expert).page

    of_model = model.atlas(planted_domains(), tmp_path / "atlas", study=Atlas(), reading=ATLAS_READING)
    assert of_model.page == first and (tmp_path / "atlas" / "study" / "manifest.json").read_bytes() == manifest
    card = of_model.expert(LAYER, expert)
    card.save(tmp_path / "card.html")
    assert (tmp_path / "card.html").read_text("utf-8") == card.page
    assert card == expert_card(tmp_path / "atlas" / "study", LAYER, expert) != of_model.result.expert(LAYER, expert)
    assert all(html.escape(line) in of_model._repr_html_() for line in of_model.result.findings().lines)
    with pytest.raises(InputError, match="domain 'sea' holds no text"):
        model.atlas({"sea": []}, tmp_path / "none")
    with pytest.raises(InputError, match="none"):
        AtlasFolder(tmp_path / "none").expert(LAYER, expert)
    other = tmp_path / "atlas" / "knockouts" / "layer-9-expert-0"
    run_study(study, model, planted_domains(), reading=Reading(tokens=64, context=32), out=other)
    with pytest.raises(InputError, match="reading differ from the atlas's; move it elsewhere"):
        write_atlas(tmp_path / "atlas" / "study", tmp_path / "atlas")


@pytest.mark.parametrize(
    "place", ["", f"#layer={LAYER}", f"#layer={LAYER}&expert=2", "#text=0", "#about", "#token=377"]
)
def test_narrow_dark_and_printed(page, folder, place):
    show(page, folder, place)
    try:
        page.send("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=False)
        page.ask("atlas.measure()")
        assert page.ask("document.documentElement.scrollWidth") <= 360
        cut = "[...document.querySelectorAll('.scroll')].filter((of) => of.scrollWidth > of.clientWidth + 1)"
        assert page.ask(f"{cut}.every((of) => getComputedStyle(of, '::before').content.includes('scroll sideways'))")
        assert page.ask("[...document.querySelectorAll('.keys')].every((of) => of.offsetParent === null)")
        background = "getComputedStyle(document.body).backgroundColor"
        light = page.ask(background)
        dark = [{"name": "prefers-color-scheme", "value": "dark"}]
        page.send("Emulation.setEmulatedMedia", features=dark)
        assert page.ask(background) != light
        page.send("Emulation.setEmulatedMedia", media="print")
        assert page.ask("getComputedStyle(document.querySelector('header nav')).display") == "none"
    finally:
        page.send("Emulation.clearDeviceMetricsOverride")
        page.send("Emulation.setEmulatedMedia", media="", features=[])
    assert not page.complaints


@pytest.mark.slow
def test_the_guide_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    exec(compile(code_of(DOCS / "atlas.md"), "atlas.md", "exec"), values)
    assert values["german"]["share"].iloc[0] > 0.5 > values["german"]["token_alone"].iloc[-1]
    assert capsys.readouterr().out and values["atlas"].page == Path("atlas/index.html")
    assert "Layer 4, expert 48" in (tmp_path / "card.html").read_text(encoding="utf-8")
    assert "CC BY-SA 3.0" in given(tmp_path / "atlas", "about")["attribution"]


@pytest.mark.typed
def test_the_command_writes_a_folder_and_keeps_texts_out_if_asked(tmp_path, capsys):
    save_checkpoint(tmp_path / "model")
    for seed, name in enumerate("ab"):
        write_jsonl(tmp_path / f"{name}.jsonl", n=4, sources=4, seed=seed)
    texts = [part for name in "ab" for part in ("--domain", f"{name}={tmp_path}/{name}.jsonl")]
    how = ["--model", f"{tmp_path}/model", *texts, "--tokens", "40", "--window", "24", "--knockout-tokens", "8"]
    command = ["atlas", *how, "--out", f"{tmp_path}/atlas", "--no-contexts", "--text", "the sea"]
    assert main(command) == 0 and main(command) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "atlas" / "index.html")] * 2
    about = given(tmp_path / "atlas", "about")
    assert (
        about["contexts"] is False and [of["domain"] for of in about["texts"]] == [""] and about["attribution"] is None
    )
    assert all(not expert["contexts"] for expert in given(tmp_path / "atlas", "layer-1")["experts"])
    assert not {"contexts", "explained", "chosen_for"} & set(StudyResult.load(tmp_path / "atlas" / "study").tables)
    card = expert_card(tmp_path / "atlas" / "study", 1, 0)
    assert "Layer 1, expert 0" in card.page and repr(card).startswith("ExpertCard(layer 1, expert 0: ")
    assert main(["atlas", *how, "--out", f"{tmp_path}/atlas"]) == 2
    assert "another" in capsys.readouterr().err
