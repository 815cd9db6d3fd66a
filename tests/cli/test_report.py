"""`moe-lens report` on a tiny random model: what it writes, and how it refuses."""

import json
import logging
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

import moe_lens
from moe_lens import viz
from moe_lens.cli import main
from moe_lens.data import Reading
from moe_lens.errors import InputError
from moe_lens.manifest import verdict_files
from moe_lens.model.loading.tokenizer import load_tokenizer
from moe_lens.report import run
from moe_lens.report.paper_quotes import QUOTED
from moe_lens.report.report_files import REPORT, SMALLER, check_place
from moe_lens.report.report_page import by_model, page_of, write_page
from moe_lens.report.verdict_words import CHANGE
from moe_lens.studies import NULLS, Localisation, PruningStudy, RoutingStudy, SingleExpertStudy, StudyResult, judge
from tests.browser import browser
from tests.families import build
from tests.planted import planted_domains, planted_model

TOKENIZER = Path(moe_lens.__file__).parent / "assets" / "tiny-deepseekmoe"
NASTY = "<b>&</script>"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build("deepseek", vocab_size=4096, bos_token_id=0, eos_token_id=1, pad_token_id=1).save_pretrained(folder)
    load_tokenizer(str(TOKENIZER)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    many = [{"text": f"Text {i} says </script> and <b>{'word ' * (i + 1)}", "source": f"s{i}"} for i in range(12)]
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    (folder / f"{'<'}few.txt").write_text("one text is here\n\nanother one is there\n")
    return folder


def arguments(checkpoint: Path, texts: Path, out: Path) -> list[str]:
    domains = ["--domain", f"many={texts}/many.jsonl", "--domain", f"{NASTY}={texts}/<few.txt"]
    return ["report", "--model", str(checkpoint), *domains, "--tokens", "1000", "--out", str(out)]


@pytest.fixture(scope="module")
def made(checkpoint, texts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "report"
    assert main(arguments(checkpoint, texts, out)) == 0
    return out


def refused(capsys, *arguments: str) -> str:
    """The one line on stderr with which the command refuses."""
    assert main(["report", *arguments]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("moe-lens: error: "), captured.err
    assert captured.out == ""
    return lines[0]


@pytest.mark.typed
def test_pruning_and_localisation_are_part_of_it(tmp_path, monkeypatch):
    few = {"pruning": PruningStudy(random=3), "localisation": Localisation(experts=1, matched=3, controls="primary")}
    monkeypatch.setattr("moe_lens.report.run_report.STUDIES", {})
    monkeypatch.setattr("moe_lens.report.run_report.OF_HALVES", few)
    texts = planted_domains(words=12)
    page = run(planted_model(), texts, tmp_path / "out", reading=Reading(tokens=1200, context=24), name="planted")
    plans = [StudyResult.load(tmp_path / "out" / name).manifest["plan"]["reading"] for name in few]
    assert [(plan["tokens"], plan["context"]) for plan in plans] == [(300, 24)] * 2
    shown = " ".join(unescape(re.sub("<[^>]*>", " ", page.read_text(encoding="utf-8"))).split())
    pruned = StudyResult.load(tmp_path / "out" / "pruning").tables["pruning"]
    own = pruned.query("domain == 'sea' and plan == 'sea' and kind == 'picked'")["ratio"].item()
    random = pruned.query("domain == 'sea' and kind == 'random'")["ratio"]
    assert f"sea (12 sources) {own:.3f} " in shown and f"{100 * (random > own).mean():.0f} % of 3" in shown
    assert "set to zero" in shown and "not run with controls" in shown
    assert (
        len(re.findall("This study read only [0-9,to ]+ tokens of each domain, in windows of at most 24 t", shown)) == 2
    )
    assert "pruning , in windows of at most 24 tokens" in shown or "pruning, in windows of at most 24 tokens" in shown
    assert "3 random plans of this size, worse" in shown and "3 matched coalitions, beaten" in shown
    assert "with 3 random plans of this size, by" in shown and "other experts that carry as much" in shown  # headlines
    saved = {of["key"]: of for of in json.loads((tmp_path / "out" / "verdicts.json").read_text())["verdicts"]}
    assert saved["5"]["number"] == saved["6"]["inference"] == "holds"
    figure = viz.pruning_ratios(StudyResult.load(tmp_path / "out" / "pruning")).to_dict()["data"]
    assert [len(trace["x"]) for trace in figure] == [9, 6, 3]  # 3 random plans, 2 other domains, and the own


@pytest.mark.typed
def test_the_folder_holds_three_studies_of_the_same_texts_with_their_nulls(made):
    assert {path.name for path in made.iterdir()} == {
        "report.html",
        "verdicts.json",
        "routing",
        "single-expert",
        "lens",
    }
    routing, single, lens = (StudyResult.load(made / name) for name in ("routing", "single-expert", "lens"))
    assert routing.manifest["read"] == single.manifest["read"] == lens.manifest["read"]
    assert [(row["name"], row["sources"]) for row in routing.manifest["read"]] == [("many", 12), (NASTY, 1)]
    assert set(routing.tables["most_specialised"]["routing"]) == {"model", *NULLS}
    perplexity = single.tables["perplexity"]
    assert set(perplexity["treatment"]) == {"whole", "dropped", "random", "replaced"}
    for row in (*routing.tables["most_specialised"].to_dict("records"), *perplexity.to_dict("records")):
        low = row["low"] if "low" in row else row["ratio_low"]
        assert (low != low) == (row["domain"] == NASTY)  # one source has no interval


def test_headlines_are_those_of_the_tables_beside_the_nulls(made):
    page = " ".join(re.sub("<[^>]*>", "", (made / "report.html").read_text(encoding="utf-8")).split())
    most = StudyResult.load(made / "routing").tables["most_specialised"]
    over = most.query("share > 0.5").groupby("routing").size().reindex(["model", *NULLS], fill_value=0)
    told = f"In {over['model']} of 4 pairs of layer and domain, one expert is among the 3 active ones"
    assert told in page and f"a random router gives {over['random_router']} such pairs" in page
    assert f"the token alone gives {over['token_unigram']} such pairs" in page
    ratios = StudyResult.load(made / "single-expert").tables["perplexity"].query("k == 1 and treatment == 'random'")
    low, high = (f"{100 * (value - 1):+.0f}" for value in (ratios["ratio"].min(), ratios["ratio"].max()))
    assert f"keeping one of the active ones at random by {low if low == high else f'{low} to {high}'} %" in page


def test_verdicts_stand_on_the_page_and_in_a_file(made):
    page = " ".join(unescape(re.sub("<[^>]*>", " ", (made / "report.html").read_text(encoding="utf-8"))).split())
    saved = json.loads((made / "verdicts.json").read_text(encoding="utf-8"))
    assert [of["key"] for of in saved["verdicts"]] == ["1a", "1b", "2", "3", "4", "5", "6"]
    assert saved["texts"] == ["many", NASTY] and saved["domains"][0]["name"] == "many"
    for of in saved["verdicts"]:
        # one source of the second domain decides nothing, so that no claim holds in both, nor is contradicted
        assert of["number"] not in ("holds", "contradicted") and of["inference"] not in ("holds", "contradicted")
        claim = QUOTED[of["key"]]
        assert f"{of['claim']} “{claim.quote}” ({claim.place})" in page and f"Authors: {claim.authors}" in page
        if "†" in of["estimate"] and not of["inference"].startswith("undecided: "):
            assert f"{of['key']} {of['number']} / {of['inference']} {of['at_half']} {of['at_double']}" in page
    assert (
        "nothing here confirms or refutes a claim about DeepSeekMoE 16B" in page
        and "undecided: the study localisation was not run" in page
    )
    ratio = StudyResult.load(made / "single-expert").tables["perplexity"].query("treatment == 'dropped' and k == 1")
    bounds = [of for of in saved["bounds"] if of["what"] == "perplexity ratio, k = 1 ÷ all"]
    assert [of["value"] for of in bounds] == pytest.approx(ratio["ratio"].tolist())
    assert bounds[0]["low"] < bounds[0]["value"] < bounds[0]["high"] and bounds[1]["low"] is None
    assert (
        bounds[0]["low"] < ratio["ratio_low"].iloc[0] and bounds[0]["high"] > ratio["ratio_high"].iloc[0]
    )  # of both domains


def test_the_page_begins_with_the_verdicts_and_each_leads_to_its_section_and_back(made):
    page = re.sub(r"<script.*?</script>", "", (made / "report.html").read_text(encoding="utf-8"), flags=re.DOTALL)
    sections = {part[: part.index('"')]: part for part in page.split('<h2 id="')[1:]}
    assert list(sections)[:2] == ["verdicts", "findings"]
    columns = re.findall(r"<th(?: [^>]*)?>(.*?)</th>", sections["verdicts"])
    assert columns[:4] == ["claim", "number", "control", "inference"]
    measured = [key for key, claim in QUOTED.items() if claim.section in sections]
    assert measured == ["1a", "1b", "2", "3", "4"]  # the others were not run: a domain has a single source
    for key in measured:
        of = sections[QUOTED[key].section]
        assert f'href="#{QUOTED[key].section}"' in sections["verdicts"] and 'href="#verdicts"' in of
        assert of.index(f"Verdict {key}.") < min(of.find(tag) % len(of) for tag in ("<figure", "<h3"))
    assert 'href="#pruning"' not in page
    rows = dict(zip(QUOTED, sections["verdicts"].split("<tr><td>")[1:8], strict=True))
    ratio = StudyResult.load(made / "single-expert").tables["perplexity"].query("k == 1 and treatment == 'random'")
    ratios = ratio["ratio"].tolist()
    shown = f"one random active expert: <b>{CHANGE.range(ratios)}</b>"
    assert shown in rows["4"] and "claimed more than ours" in rows["4"] and "claimed ≤\u00a0+5\u00a0%" in rows["4"]
    for name in ("a random router", "by the token alone", "†"):
        assert f"<dt>{name}</dt>" in sections["verdicts"]
    assert sections["verdicts"].index("<dt>") < sections["verdicts"].index("<table")


@pytest.mark.parametrize("width", [1366, 360])
def test_no_column_of_the_verdicts_is_cut_off(made, tmp_path, width):
    cut = """[document.querySelector("#verdicts ~ .scroll")].map((e) => e.scrollWidth - e.clientWidth)[0]"""
    inside = """[...document.querySelectorAll("table.verdicts td")].filter((e) => e.dataset.of === "control")
        .every((e) => e.getBoundingClientRect().right <= innerWidth && e.getBoundingClientRect().width > 100)"""
    with browser(tmp_path / "profile") as page:
        page.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 640
        )
        page.open(made / "report.html")
        assert page.ask(cut) == 0 and page.ask(inside) is True
        page.until("document.querySelectorAll('.js-plotly-plot .main-svg').length")
        assert page.ask("document.documentElement.scrollWidth") <= width
        widths = "[...document.querySelectorAll('.scroll > div > div > .js-plotly-plot')].map((e) => e.offsetWidth)"
        assert (max(page.ask(widths)) > width) is (width == 360), "a wide figure scrolls sideways in its place"
        page.ask("document.querySelectorAll('table.verdicts td').forEach((e) => { e.style.whiteSpace = 'nowrap'; })")
        page.ask("document.querySelector('table.verdicts').style.tableLayout = 'auto'")
        assert page.ask(cut) > 0  # as it was: on one line nothing fits
        (tmp_path / "two.html").write_text(two_models(made), encoding="utf-8")
        page.open(tmp_path / "two.html")
        assert page.ask("document.documentElement.scrollWidth") <= width, "the models' verdicts stand side by side"
        page.ask("document.querySelector('.together').style.overflow = 'visible'")
        page.ask("document.querySelectorAll('.together td').forEach((e) => { e.style.whiteSpace = 'nowrap'; })")
        assert page.ask("document.documentElement.scrollWidth") > width  # as it was


def two_models(made: Path) -> str:
    other = []
    for name in ("routing", "single-expert", "lens"):
        result = StudyResult.load(made / name)
        model = {**result.manifest["plan"]["model"], "name": "another", "fingerprint": "another"}
        plan = {**result.manifest["plan"], "model": model}
        other.append(replace(result, manifest={**result.manifest, "plan": plan}))
    return page_of([StudyResult.load(made / "routing"), *other])


def test_sections_of_a_second_model_are_linked_within_it(made):
    page = two_models(made)
    linked, there = set(re.findall(r'href="#([^"]+)"', page)), set(re.findall(r'id="([^"]+)"', page))
    assert {
        "report-1",
        "report-2",
        "routing",
        "routing-2",
        "verdicts-2",
        "lens-2",
    } <= linked <= there and "lens" not in linked


def test_a_page_has_its_own_verdicts_and_show_prints_those_of_every_model(made, tmp_path, capsys):
    page, studies = tmp_path / "page", [made / "routing", made / "lens"]
    write_page(studies, page)
    found = judge({folder.name: StudyResult.load(folder) for folder in studies})
    replace(found, model="another").save(page / "verdicts-2.json")
    assert main(["show", str(page)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("verdicts on the paper's claims, of") == 2 and "another on" in shown and "studies:" not in shown
    write_page(studies, page)
    assert [path.name for path in verdict_files(page)] == ["verdicts.json"], "of the earlier page nothing is left"


def test_show_prints_a_table_of_the_studies_that_have_it(made, capsys):
    assert main(["show", str(made), "--table", "lens", "--rows", "1"]) == 0
    assert "lens: " in capsys.readouterr().out
    assert main(["show", str(made), "--table", "lense"]) == 2
    assert re.search(r"has no table 'lense'; there are .*did you mean 'lens'", capsys.readouterr().err)


def test_a_model_that_was_opened_by_two_names_is_one(made):
    first, second = (StudyResult.load(made / name) for name in ("routing", "lens"))
    plan = second.manifest["plan"]
    moved = {**second.manifest, "plan": {**plan, "model": {**plan["model"], "name": "elsewhere"}}}
    second = replace(second, manifest=moved)
    assert [list(group) for group in by_model([first, second])] == [["routing", "lens"]]
    assert judge({"routing": first, "lens": second}).model == first.manifest["plan"]["model"]["name"]


def test_dependence_on_the_domain_is_shown_pair_by_pair_with_its_families(made):
    page = " ".join(unescape(re.sub("<[^>]*>", " ", (made / "report.html").read_text(encoding="utf-8"))).split())
    routing = StudyResult.load(made / "routing")
    pairs = routing.tables["domain_pairs"].query("routing == 'model'")
    assert f"{pairs['jsd'].max():.3f}" in page and "The same token in two domains" in page
    mi = routing.tables["domain_layers"].query("routing == 'model'")
    smallest = min(1.0, len(mi) * mi["smallest_p"].min())
    assert f"over layers: {len(mi)} tests, Holm; smallest p after correction: {smallest:,.4f}" in page
    earlier = {name: table.drop(columns="smallest_p", errors="ignore") for name, table in routing.tables.items()}
    assert "smallest p after correction: not saved" in page_of([replace(routing, tables=earlier)])


def test_page_stands_alone_and_is_escaped(made):
    page = (made / "report.html").read_text(encoding="utf-8")
    ours = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?!#|https://arxiv\.org/)[^"'\s>]+""", ours)
    assert page.count("plotly.js v") == 1
    assert NASTY not in page and "&lt;b&gt;&amp;&lt;/script&gt;" in page
    # Every script ends where it should: what is left has no stray end.
    assert "</script>" not in ours
    assert re.search("No intervals in [\\w ,]+ for &lt;b&gt;", page)  # too few sources, said so
    assert "there they come from the same texts" in page
    assert str(made) not in page


def test_interrupted_the_same_command_goes_on_and_ends_with_the_same_page(
    checkpoint, texts, made, tmp_path, monkeypatch, capsys
):
    out, step, steps = tmp_path / "report", SingleExpertStudy.step, []

    def interrupted(self, model, name, batch, into, prepared):
        if name == "means" and (batch.tokens.shape[0] == 2):  # the second domain
            raise KeyboardInterrupt
        steps.append(name)
        return step(self, model, name, batch, into, prepared)

    with monkeypatch.context() as patched:
        patched.setattr(SingleExpertStudy, "step", interrupted)
        assert main(arguments(checkpoint, texts, out)) == 130
    assert "means" in steps and not (out / "report.html").exists()
    assert "run the same command to go on" in capsys.readouterr().err
    monkeypatch.setattr(RoutingStudy, "step", None)  # what was complete is not done again
    assert main(arguments(checkpoint, texts, out)) == 0
    assert capsys.readouterr().out.strip() == str((out / "report.html").resolve())
    assert (out / "report.html").read_bytes() == (made / "report.html").read_bytes()
    assert {path.name for path in out.iterdir()} == {"report.html", "verdicts.json", "routing", "single-expert", "lens"}


def test_a_finished_report_is_drawn_again_from_its_folder_and_refuses_other_work(
    checkpoint, texts, made, tmp_path, capsys
):
    assert main(["report", str(made), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_bytes() == (made / "report.html").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "verdicts.json"}
    assert (tmp_path / "verdicts.json").read_bytes() == (made / "verdicts.json").read_bytes()
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    given = arguments(checkpoint, texts, made)
    said = refused(capsys, *given[1:], "--seed", "1")
    assert "routing: holds the result of another study (routing) – reading.seed: 0 there, 1 now" in said


def test_another_page_of_the_name_is_not_replaced_nor_a_studys_folder_mixed(checkpoint, texts, made, tmp_path, capsys):
    page = tmp_path / "report.html"
    page.write_text("<title>Mine</title>")
    for command in (["report", str(made)], arguments(checkpoint, texts, tmp_path)[:-2]):
        said = refused(capsys, *command[1:], "--out", str(tmp_path))
        assert f"{page}: is there, is another page, and would be replaced" in said
    for title, other in ((SMALLER, REPORT), (REPORT, SMALLER)):  # of our own, each kind its own alone
        page.write_text(f"<title>{title}x</title>")
        check_place(tmp_path, title)
        with pytest.raises(InputError, match="is another page"):
            check_place(tmp_path, other)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    for out in (made / "routing", made / "routing" / "page"):
        assert "in the folder of a study that is shown" in refused(capsys, str(made), "--out", str(out))
    assert main(["report", str(made), str(made / "routing"), "--out", str(tmp_path)]) == 0
    assert page.read_bytes() == (made / "report.html").read_bytes(), "a study that is given twice is shown once"


def test_arguments_that_are_wrong(capsys, checkpoint, texts, tmp_path):
    model, out = ["--model", str(checkpoint)], ["--out", str(tmp_path / "out")]
    few = f"{texts}/<few.txt"
    assert "No such option: --nonsense" in refused(capsys, "--nonsense")
    assert "'--tokens': Input should be a valid integer" in refused(capsys, "--tokens", "many")
    assert "tokens is 1; expected at least 2" in refused(capsys, *model, *out, "--tokens", "1")
    assert "int8" in refused(capsys, "--dtype", "int8")
    assert "expected NAME=FILE" in refused(capsys, "--domain", "few.txt")
    assert "given twice" in refused(capsys, "--domain", f"a={few}", "--domain", f"a={few}")
    assert "none.jsonl: cannot be read" in refused(capsys, *out, "--domain", "a=none.jsonl")
    assert "--device nonsense" in refused(capsys, *model, *out, "--device", "nonsense")
    assert "no config.json" in refused(capsys, *out, "--model", str(tmp_path))
    assert "nowhere" in refused(capsys, *out, "--model", str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no text"),
        ('{"text": "good text"}\n{"text": \n', "bad.jsonl:2: not JSON"),
        ('{"body": "good text"}\n', "bad.jsonl:1: expected an object"),
        ('{"text": "a"}\n', "holds no text of two tokens or more"),
    ],
)
def test_texts_that_are_wrong(capsys, checkpoint, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    out = tmp_path / "out"
    found = refused(capsys, "--model", str(checkpoint), "--domain", f"bad={tmp_path}/bad.jsonl", "--out", str(out))
    assert message in found
    assert not (out / "report.html").exists()


def test_broken_checkpoint(capsys, checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refused(capsys, "--model", str(tmp_path), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written(capsys, checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    found = refused(capsys, "--model", str(checkpoint), "--out", str(tmp_path / "file" / "out"))
    assert "cannot be written" in found


def test_help_and_version(capsys):
    assert main(["report", "--help"]) == 0
    assert "--domain" in capsys.readouterr().out
    assert main([]) == 0
    assert "report" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == moe_lens.__version__
    assert main(["nonsense"]) == 2


def test_a_hub_that_cannot_be_reached_takes_one_line(monkeypatch, tmp_path, capsys):
    library, heard = logging.getLogger("huggingface_hub"), []
    library.setLevel(logging.WARNING)  # its own, which other commands have raised before
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", heard.append)
    monkeypatch.setattr(library, "handlers", [handler])

    def unreachable(*_, **__):  # as transformers answers, after the hub's library has spoken of each retry
        library.getChild("utils._http").warning("Retrying in 1s [Retry 1/5].")

    monkeypatch.setattr("moe_lens.model.loading.checkpoint.is_offline_mode", lambda: False)
    monkeypatch.setattr("moe_lens.model.loading.checkpoint.cached_file", unreachable)
    assert main(["report", "--model", "nosuch/model", "--out", str(tmp_path / "out")]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(said) == 1 and "the hub's repository has none or the hub cannot be reached" in said[0]
    assert heard == []
