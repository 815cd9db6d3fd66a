"""What a reader asks of the atlas, and finds: whose, how sure, which together, whose removal costs most, a word."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from moe_lens.atlas import write_atlas
from moe_lens.atlas.pages import without_folders
from moe_lens.errors import InputError
from tests.atlas.shown import given, show, text
from tests.planted import LAYER, PLANTED, planted_atlas

ROWS = "[...document.querySelectorAll('#{} tbody tr')].map((row) => [...row.cells].map((cell) => cell.innerText))"


def rows(page: Any, part: str) -> list[list[str]]:
    return page.ask(ROWS.format(part))


def press(page: Any, part: str, column: str) -> None:
    named = f"[...document.querySelectorAll('#{part} .sort')].find((of) => of.innerText.startsWith('{column}'))"
    page.ask(f"{named}.click()")


def test_experts_are_sorted_by_any_column_and_filtered_by_layer(page, folder):
    show(page, folder, "")
    tables: Any = planted_atlas()[1].tables
    cost = tables["knockouts"].set_index(["layer", "expert", "read"])["added"]
    assert len(rows(page, "experts")) == 20
    page.ask("document.querySelector('#experts .more').click()")
    assert len(rows(page, "experts")) == 32
    press(page, "experts", "Exact")
    for row, name in zip(
        rows(page, "experts"), sorted(PLANTED, key=lambda n: -cost[LAYER, PLANTED[n], n]), strict=False
    ):
        assert row[1:3] == [f"{LAYER}:{PLANTED[name]}", name] and " *" in row[6]
    press(page, "experts", "n")
    counts = [int(row[-1].replace(",", "")) for row in rows(page, "experts")]
    assert counts == sorted(counts, reverse=True) == sorted(tables["experts"]["assigned"], reverse=True)
    press(page, "experts", "n")
    assert [int(row[-1].replace(",", "")) for row in rows(page, "experts")] == counts[::-1]
    page.ask("const s = document.querySelector('#experts select'); s.value = '1'; s.dispatchEvent(new Event('change'))")
    assert {row[0] for row in rows(page, "experts")} == {"1"} and not page.complaints


def test_it_says_whose_removal_costs_most_and_which_were_measured(page, folder):
    show(page, folder, "")
    knocked: Any = planted_atlas()[1].tables["knockouts"].sort_values("added", ascending=False)
    shown = rows(page, "costs")
    for row, (_, of) in zip(shown[:3], knocked.iterrows(), strict=False):
        assert row[:2] == [f"{of['layer']}:{of['expert']}", of["read"]]
        assert row[2].startswith(f"{1000 * of['added']:,.0f}"[:3]) and " *" in row[2]
    assert all(" *" not in row[2] for row in shown[3:])
    said = text(page, "#costs")
    assert "All 32 experts were knocked out" in said and "3 of 12 that were held against comparable experts" in said
    result = planted_atlas()[1]
    few = {**result.tables, "knockouts": knocked[knocked["expert"] < 8]}
    write_atlas(replace(result, tables=few), folder.parent / "few")
    show(page, folder.parent / "few", "")
    assert "16 of 32 experts" in text(page, "#costs") and "may cost more than any of these" in text(page, "#costs")
    press(page, "experts", "Exact")
    page.ask("document.querySelector('#experts .more').click()")
    assert sum("not measured" in row[6] for row in rows(page, "experts")) == 16 and not page.complaints


def test_the_pairs_of_a_layer_are_answered_at_the_start_and_on_its_page(page, folder):
    pairs: Any = planted_atlas()[1].tables["pairs"].query(f"layer == {LAYER}")
    most = pairs.sort_values("tokens", ascending=False).iloc[0]
    show(page, folder, "")
    first = next(row for row in rows(page, "pairs") if row[0] == f"Layer {LAYER}")
    assert first[1].startswith(f"{most['expert']:.0f} and {most['other']:.0f} n = {most['tokens']:.0f},")
    page.ask(f"[...document.querySelectorAll('#pairs a')].find((of) => of.innerText === 'Layer {LAYER}').click()")
    page.until(f"location.hash === '#layer={LAYER}' && document.getElementById('view').dataset.shown === location.hash")
    assert rows(page, "pairs")[0][0] == f"expert {most['expert']:.0f} and expert {most['other']:.0f}"
    lift = float(f"{most['lift']:.3g}")
    assert rows(page, "pairs")[0][2] == f"× {lift:g}"
    assert len(rows(page, "experts")) == 16 and not page.complaints
    show(page, folder, "#layer=7")
    assert "No such layer" in text(page)


def test_a_card_begins_with_its_verdict_and_parts_can_be_linked(page, folder):
    place = f"#layer={LAYER}&expert={PLANTED['law']}&part=without"
    show(page, folder, place)
    assert page.ask("document.getElementById('without').getBoundingClientRect().top") < 400
    page.ask("document.querySelector('nav.contents a[href$=reads]').click()")
    page.until("document.getElementById('view').dataset.shown.endsWith('part=reads')")
    terms = page.ask("[...document.querySelectorAll('.verdict dt')].map((of) => of.innerText)")
    assert terms == ["Whose", "Reads", "Writes", "Without it", "Caution"]
    said = text(page, ".verdict")
    assert "Clearly law's" in said and "More than comparable experts *" in said and "picked for its share" in said
    # An expert that does nothing: its removal is not told from nothing, whatever its share.
    other: Any = planted_atlas()[1].tables["compared"].query(f"layer == {LAYER} and not starred").iloc[0]
    show(page, folder, f"#layer={LAYER}&expert={other['expert']}")
    assert "More than comparable experts *" not in text(page, ".verdict")
    assert "* ?" not in text(page, "#without")


def test_a_star_is_not_given_where_only_the_controls_are_odd(page, folder, tmp_path):
    result = planted_atlas()[1]
    at = (result.tables["compared"]["layer"] == LAYER) & (result.tables["compared"]["expert"] == PLANTED["sea"])
    odd = result.tables["compared"].copy()
    odd.loc[at, ["all_low", "all_high", "starred"]] = [-0.01, 0.03, False]
    odd.loc[at, ["beyond", "beyond_low", "beyond_high"]] = [0.09, 0.05, 0.13]
    write_atlas(replace(result, tables={**result.tables, "compared": odd}), tmp_path)
    show(page, tmp_path, f"#layer={LAYER}&expert={PLANTED['sea']}")
    said = text(page, ".verdict")
    assert "Not shown to matter more than comparable experts" in said and "not told from 0 after correction" in said
    assert "its controls cost less than nothing, or little" in text(page, "#without")


def test_controls_are_named_and_shown_by_themselves(page, folder):
    show(page, folder, f"#layer={LAYER}&expert={PLANTED['art']}")
    controls: Any = planted_atlas()[1].tables["controls"].query(f"layer == {LAYER} and expert == {PLANTED['art']}")
    shown = text(page, "#without .against")
    for experts in controls["experts"]:
        assert all(re.search(rf"\b{expert}\b", shown) for expert in experts)
    assert shown.count("together") == sum(len(experts) > 1 for experts in controls["experts"])
    assert "mean of the 4 controls" in shown and f"expert {PLANTED['art']} − mean of controls, corrected" in shown


def test_words_are_explained_by_a_press_and_every_word_is_in_the_glossary(page, folder):
    show(page, folder, f"#layer={LAYER}&expert={PLANTED['sea']}")
    names = page.ask("[...document.querySelectorAll('.term')].map((of) => [of.innerText, of.title])")
    assert len(names) > 20 and all(said for _, said in names)
    page.ask("[...document.querySelectorAll('.term')].find((of) => of.innerText === 'millinats').click()")
    assert "A thousandth of a nat" in text(page, "#explained")
    page.ask("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    assert page.ask("document.getElementById('explained').hidden")
    show(page, folder, "#about")
    known = page.ask("[...document.querySelectorAll('.glossary dd')].map((of) => of.innerText)")
    assert {said for _, said in names} <= set(known)


def test_the_link_is_copied_from_a_page_on_the_disk(page, folder):
    place = f"#layer={LAYER}&expert={PLANTED['sea']}"
    show(page, folder, place)
    page.ask("document.execCommand = () => { window.taken = document.activeElement.value; return true; }")
    page.ask("document.querySelector('.copy').click()")
    page.until("document.querySelector('.steps [role=status]').innerText.startsWith('Copied')")
    assert page.ask("window.taken") == (folder / "index.html").as_uri() + place
    assert "send the folder" in text(page, ".steps") and not page.complaints


@pytest.mark.parametrize(
    ("query", "leads"), [(" order", True), ("order zzz", False), ("qqqq", False), ("order ", True)]
)
def test_enter_opens_only_a_token_that_was_asked_for(page, folder, query, leads):
    show(page, folder, "#about")
    box = "const box = document.getElementById('search'); box.focus(); box.value = "
    page.ask(f"{{ {box}{json.dumps(query)}; box.dispatchEvent(new Event('input')) }}")
    page.send("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13)
    assert page.ask("location.hash").startswith("#token=" if leads else "#about")
    if not leads:
        assert re.match("Not a token|No such token", text(page, "#found"))


def test_pieces_of_texts_that_are_shown_lead_into_them(page, folder):
    lines = [
        (line, expert)
        for expert in given(folder, f"layer-{LAYER}")["experts"]
        for some in expert["contexts"].values()
        for line in some
        if len(line) > 7
    ]
    assert lines
    for line, _ in lines:
        tokens, (number, place) = given(folder, f"text-{line[7][0]}")["tokens"], line[7]
        assert tokens[place] == line[5][line[3]] and place == line[2]
        assert given(folder, "about")["texts"][number]["domain"] == given(folder, "about")["domains"][line[0]]["name"]
    expert = PLANTED["sea"]
    show(page, folder, f"#layer={LAYER}&expert={expert}")
    page.ask("document.querySelector('.contexts small a').click()")
    page.until("document.getElementById('view').dataset.view === 'text'")
    assert page.ask("document.querySelector('#at h2').innerText").startswith("Token ")


def test_about_says_how_good_the_model_is_and_no_folder_of_the_users(page, folder):
    show(page, folder, "#about")
    quality: Any = planted_atlas()[1].tables["quality"]
    shown = text(page, "#texts")
    for row in quality.to_dict("records"):
        assert re.search(rf"{row['domain']}\s.*{row['loss']:.2f}\s.*{row['uniform']:.2f}", shown)
    assert re.search(rf"all\s+{quality['tokens'].sum():,}", shown)
    command = (
        "/home/me/env/bin/moe-lens atlas --model /home/me/secret/m --domain 'a=/home/me/my texts/a.jsonl' --out ../x/y"
    )
    assert without_folders(command) == "moe-lens atlas --model m --domain a=a.jsonl --out y"
    kept = "moe-lens atlas --model allenai/OLMoE-1B-7B-0924 --text and/or"
    assert (
        without_folders(kept) == kept and without_folders(r"'C:\Users\me\moe-lens.exe' atlas") == "moe-lens.exe atlas"
    )


def test_a_study_of_an_earlier_version_is_refused_in_one_line(tmp_path):
    result = planted_atlas()[1]
    earlier = {name: table for name, table in result.tables.items() if name not in ("pairs", "quality")}
    with pytest.raises(InputError, match="made by an earlier version, without the tables pairs, quality; make"):
        write_atlas(replace(result, tables=earlier), tmp_path)


def test_a_character_that_is_spread_over_tokens_is_shown_where_it_is_complete(page, folder):
    show(page, folder, "#about")
    texts = [" \\xe2\\x80", "\\x9estaff", "\\xf0\\x9f", "a", "\\\\x41\\n"]
    assert page.ask(f"characters({json.dumps(texts)})") == [" ‥", "„staff", "‥", "\ufffda", "\\\\x41\\n"]
