"""What a reader asks of the atlas, and finds: whose, how sure, which together, whose removal costs most, a word."""

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest

from moe_lens.atlas import write_atlas
from moe_lens.atlas.pages import plain_text, without_folders
from moe_lens.atlas.script_files import script
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
    assert "All 32 experts were knocked out" in said and re.search(
        r"3 of \d+ that were held against their controls", said
    )
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
    shares: Any = planted_atlas()[1].tables["domains"].query(f"layer == {LAYER}")
    leaders = shares.loc[shares.groupby("domain", sort=False)["difference"].idxmax()]
    (whose,) = rows(page, "foremost")
    assert [of.split()[1].rstrip("*") for of in whose[1:]] == [str(expert) for expert in leaders["expert"]]
    lift = float(f"{most['lift']:.3g}")
    assert rows(page, "pairs")[0][2] == f"×\u00a0{lift:g}"
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
    cost = given(folder, "map")["domains"][list(PLANTED).index("law")]["exact"]
    assert f"perplexity ×\u00a0{math.exp(cost[LAYER - 1][PLANTED['law']]):.3g})" in said
    assert "Clearly law's" in said and "More than each of its controls *" in said and "picked for its share" in said
    # An expert that does nothing: its removal is not distinguishable from 0, whatever its share.
    other: Any = planted_atlas()[1].tables["compared"].query(f"layer == {LAYER} and not starred").iloc[0]
    show(page, folder, f"#layer={LAYER}&expert={other['expert']}")
    assert "More than each of its controls *" not in text(page, ".verdict")
    assert "* ?" not in text(page, "#without")


def test_a_star_is_not_given_where_only_the_controls_are_odd(page, folder, tmp_path):
    result = planted_atlas()[1]
    at = (result.tables["compared"]["layer"] == LAYER) & (result.tables["compared"]["expert"] == PLANTED["sea"])
    odd = result.tables["compared"].copy()
    odd.loc[at, ["all_low", "all_high", "starred"]] = [-0.01, 0.03, False]
    odd.loc[at, ["over_most", "over_most_low", "over_most_high"]] = [0.09, 0.05, 0.13]
    write_atlas(replace(result, tables={**result.tables, "compared": odd}), tmp_path)
    show(page, tmp_path, f"#layer={LAYER}&expert={PLANTED['sea']}")
    said = text(page, ".verdict")
    assert "Not shown to cost more than its controls" in said and "not distinguishable from 0 after correction" in said
    assert "its controls cost less than nothing, or little" in text(page, "#without")


def test_an_expert_that_looks_costly_on_its_own_is_said_to_be_no_more_than_that(page, tmp_path):
    """The corrected interval decides; controls that differ, one token, and domains that improve are told."""
    result, expert = planted_atlas()[1], PLANTED["sea"]
    tables: Any = {name: result.tables[name].copy() for name in ("compared", "knockouts")}
    compared, knocked = tables["compared"], tables["knockouts"]
    at = (compared["layer"] == LAYER) & (compared["expert"] == expert) & (compared["domain"] == "sea")
    compared.loc[at, ["added", "low", "high", "all_low", "all_high"]] = [0.5, 0.1, 0.9, -0.2, 1.2]
    compared.loc[at, ["control_least", "control_most"]] = [-0.1, 0.8]
    compared.loc[at, ["over_most", "over_most_low", "over_most_high"]] = [-0.3, -1.0, 0.4]
    compared.loc[at, ["controls", "starred"]] = [3, False]
    of = (knocked["layer"] == LAYER) & (knocked["expert"] == expert)
    sea, law = of & (knocked["read"] == "sea"), of & (knocked["read"] == "law")
    knocked.loc[sea, ["added", "low", "high", "at_first", "first_order"]] = [0.5, 0.1, 0.9, 0.49, 0.0123]
    knocked.loc[law, ["added", "low", "high", "at_first"]] = [-0.357, -0.4, -0.3, 0.0]
    write_atlas(replace(result, tables={**result.tables, **tables}), tmp_path)
    show(page, tmp_path, f"#layer={LAYER}&expert={expert}")
    said, below = text(page, ".verdict"), text(page, "#without")
    assert (
        "(−200.0 to 1,200, corrected;" in said
        and "not distinguishable from 0" in said
        and "more than nothing" not in said
    )
    assert "300.0 less than the costliest of its 3 controls, which cost −100.0 to 800.0" in said
    assert "Mostly at the first four tokens of windows (98 % of it)" in said
    assert "Without it the loss falls on law by 357.0" in said
    assert "Controls differ by more than the expert costs" in said and "Controls differ by more" in below
    assert "4 controls were sought" in below and "comparable" not in said + below
    show(page, tmp_path, "")
    row = next(row for row in rows(page, "costs") if row[:2] == [f"{LAYER}:{expert}", "sea"])
    assert (
        "mostly at the first four tokens of windows (98 %)" in row[2] and row[3] == "law (−357.0)" and row[-1] == "12.3"
    )
    press(page, "experts", "Exact")
    page.ask("document.querySelector('#experts .more').click()")
    assert next(row for row in rows(page, "experts") if row[1] == f"{LAYER}:{expert}")[5] == "12.3"
    show(page, tmp_path, "#map=&measure=exact")
    tokens = int(knocked[sea]["tokens"].iloc[0])
    label = page.ask(f"document.querySelector('.cell[href=\"#layer={LAYER}&expert={expert}\"]').title")
    assert f"on sea; n = {tokens} tokens read without it" in label and not page.complaints


def test_an_expert_is_found_by_its_number(page, folder):
    show(page, folder, "#about")
    for query, there in ((f"{LAYER}:{PLANTED['sea']}", True), (f"{LAYER}:99", False)):
        page.ask(
            "{ const box = document.getElementById('search'); box.focus(); box.value = "
            f"{json.dumps(query)}; box.dispatchEvent(new Event('input')) }}"
        )
        assert (f"layer {LAYER}, expert" in text(page, "#found")) is there
    page.ask(
        "{ const box = document.getElementById('search'); box.value = "
        f"'{LAYER}:{PLANTED['sea']}'; box.dispatchEvent(new Event('input')) }}"
    )
    page.send("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13)
    page.until(f"location.hash === '#layer={LAYER}&expert={PLANTED['sea']}'")


def test_a_domain_is_found_by_its_name_with_its_experts(page, folder):
    show(page, folder, "#about")
    box = "const box = document.getElementById('search'); box.focus(); box.value = "
    for query, there in (("Se", True), ("s", False), ("sear", False)):
        page.ask(f"{{ {box}{json.dumps(query)}; box.dispatchEvent(new Event('input')) }}")
        assert ("Experts of sea" in text(page, "#found")) is there, query
    page.ask(f"{{ {box}'sea'; box.dispatchEvent(new Event('input')) }}")
    assert f"{LAYER}:{PLANTED['sea']}" in page.ask("document.querySelector('#found p').innerText")
    shares: Any = planted_atlas()[1].tables["domains"]
    leads = []
    for name, own in shares.groupby("domain"):
        foremost = own.loc[own["difference"].idxmax()]
        page.ask(f"{{ {box}{json.dumps(name)}; box.dispatchEvent(new Event('input')) }}")
        named = page.ask("[...document.querySelectorAll('#found p a')].map((of) => of.innerText)")
        assert named[:2] == [f"Experts of {name}", f"{foremost['layer']}:{foremost['expert']}"]
        first = page.ask("document.getElementById('found').dataset.first")
        leads.append(first.startswith("#layer="))
        place = "#layer={layer:.0f}&expert={expert:.0f}".format(**foremost)
        assert first == (place if leads[-1] else f"#token={page.ask(f'matches({json.dumps(name)})[0]')}")
    assert any(leads)  # a name that is in no token
    page.ask(f"{{ {box}'sea'; box.dispatchEvent(new Event('input')) }}")
    page.ask("document.querySelector('#found p a').click()")
    page.until("document.getElementById('view').dataset.shown === '#domain=sea'")
    assert text(page, "th .chosen") == "sea" and not page.complaints


def test_numbers_have_their_digits_whatever_their_size(page, folder):
    show(page, folder, "#about")
    assert page.ask("[number(.0003407), number(.0332), number(.9999), number(1234.5)]") == [
        "0.000341", "0.0332", "1", "1,230"
    ]  # fmt: skip


def test_numbers_that_a_page_rounds_again_are_as_if_rounded_once(page, folder):
    show(page, folder, "#about")
    values = [1.0146, 1.01499999, 0.04044996, 0.40449999999, 1.015, 2.125, -1.0149996, 0.0, 7.0]
    written = json.loads(script("x", values).removeprefix('atlas.put("x", ').removesuffix(");\n"))
    asked = "{}.map((value) => [number(value), number(value, 2), milli(value)])"
    assert page.ask(asked.format(written)) == page.ask(asked.format(values))
    twice = [float(f"{value:.6g}") for value in values]
    assert page.ask(asked.format(twice)) != page.ask(asked.format(values))  # control: 1.01499999 became 1.015


def test_numbers_below_0_have_a_minus(page, folder):
    show(page, folder, "#about")
    assert page.ask("[number(-80.4), number(1200)]") == ["−80.4", "1,200"]


@pytest.mark.typed
def test_sources_are_shown_without_marks():
    marked = "# Where\n\n| a | b |\n|---|---|\n| `x` of *y* | [CC](https://c.org) |\n\n**bold** text"
    assert plain_text(marked) == "Where\n\n– a; b\n– x of y; CC (https://c.org)\n\nbold text"


def test_controls_are_named_and_shown_by_themselves(page, folder):
    show(page, folder, f"#layer={LAYER}&expert={PLANTED['art']}")
    controls: Any = planted_atlas()[1].tables["controls"].query(f"layer == {LAYER} and expert == {PLANTED['art']}")
    shown = text(page, "#without .against")
    for experts in controls["experts"]:
        assert all(re.search(rf"\b{expert}\b", shown) for expert in experts)
    assert shown.count("together") == sum(len(experts) > 1 for experts in controls["experts"])
    assert "mean of the 4 controls" in shown and f"expert {PLANTED['art']} − costliest control, corrected" in shown


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
    for kept in (
        "moe-lens atlas --model allenai/OLMoE-1B-7B-0924 --text and/or '--text=either/or it was'",
        "moe-lens atlas --domain code=hub:OWNER/DATA@abc --domain=hub:o/d --domain paper/gsm8k --source-column meta/id",
    ):
        assert without_folders(kept) == kept
    assert without_folders("moe-lens atlas --domain a=x/hub:y/z --domain paper/b/c") == (
        "moe-lens atlas --domain a=z --domain c"
    )
    assert without_folders(r"'C:\Users\me\moe-lens.exe' atlas") == "moe-lens.exe atlas"


def test_a_study_of_an_earlier_version_is_refused_in_one_line(tmp_path):
    result = planted_atlas()[1]
    earlier = {name: table for name, table in result.tables.items() if name not in ("pairs", "quality")}
    with pytest.raises(InputError, match="made by an earlier version, without the tables pairs, quality; make"):
        write_atlas(replace(result, tables=earlier), tmp_path)
    without = {**result.tables, "compared": result.tables["compared"].drop(columns="over_most")}
    with pytest.raises(InputError, match="an earlier version, with fewer columns of the tables compared; make"):
        write_atlas(replace(result, tables=without), tmp_path)


def test_a_character_that_is_spread_over_tokens_is_shown_where_it_is_complete(page, folder):
    show(page, folder, "#about")
    texts = [" \\xe2\\x80", "\\x9estaff", "\\xf0\\x9f", "a", "\\\\x41\\n"]
    assert page.ask(f"characters({json.dumps(texts)})") == [" ‥", "„staff", "‥", "\ufffda", "\\\\x41\\n"]
