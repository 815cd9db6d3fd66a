"""The guide's code runs as it is written, and the API pages hold every public name."""

import ast
import importlib.util
import inspect
import json
import pkgutil
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.main import get_command

from moe_lens import viz
from moe_lens.cli.main import app
from tests.test_public_api import PUBLIC

DOCS = Path(__file__).parents[1] / "docs"


def code_of(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))


@pytest.mark.slow
def test_get_started_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    exec(compile(code_of(DOCS / "get-started.md"), "get-started.md", "exec"), values)
    assert capsys.readouterr().out
    for edited in ("rerouted", "muted", "doubled"):
        assert (values[edited] != values["logits"]).any()
    assert values["attribution"].max() == values["attribution"][values["best"]]


@pytest.mark.typed
@pytest.mark.slow
def test_lenses_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    exec(compile(code_of(DOCS / "lenses.md"), "lenses.md", "exec"), values)
    assert "not selected" not in capsys.readouterr().out and values["read"].dense == (0,)
    assert {"table.html", "lens.safetensors"} == {file.name for file in tmp_path.iterdir()}
    means = values["difference"].loc[1:, ["u", "u + routed + shared"]].mean()
    assert means["u + routed + shared"] < means["u"]  # the whole layer is nearer to the end than u alone


@pytest.mark.slow
def test_interventions_run_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    exec(compile(code_of(DOCS / "interventions.md"), "interventions.md", "exec"), values)
    assert capsys.readouterr().out
    assert abs(values["loss"] - values["same"]) == 0  # a context and its list of hooks
    assert len(set(values["losses"].values())) == 4  # four ways, four models
    assert values["swapped"] != values["loss"] != values["single"]


@pytest.mark.slow
def test_coming_from_another_tool_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    # A lens as the package tuned-lens saves it.
    theirs = {f"{layer}.weight": torch.randn(128, 128) for layer in range(6)}
    theirs |= {f"{layer}.bias": torch.randn(128) for layer in range(6)}
    (tmp_path / "path/to/folder").mkdir(parents=True)
    torch.save(theirs, "path/to/folder/params.pt")
    facts = {"base_model_name_or_path": "tiny-deepseekmoe", "d_model": 128, "num_hidden_layers": 6, "bias": True}
    Path("path/to/folder/config.json").write_text(json.dumps({**facts, "lens_type": "linear_tuned_lens"}))
    values: dict[str, Any] = {}
    exec(compile(code_of(DOCS / "coming-from.md"), "coming-from.md", "exec"), values)
    assert values["gradient"].abs().sum(-1).min() > 0
    change = (values["skipped"] - values["model"](values["prompts"])).abs().amax((-1, -2))
    assert change[0] < 1e-4 < 1e-2 < change[1]
    assert (values["logits_without_layer"] - values["logits"]).abs().max() > 1e-2
    assert torch.equal(values["converted"].weights[2], theirs["3.weight"])
    assert not torch.equal(values["converted"].weights[2], theirs["2.weight"])
    assert capsys.readouterr().out


@pytest.mark.slow
def test_figures_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    exec(compile(code_of(DOCS / "figures.md"), "figures.md", "exec"), values)
    assert len(values["figure"].data) == 2 and "\\toprule" in capsys.readouterr().out
    assert {"map.html", "text.html", "runs"} == {file.name for file in tmp_path.iterdir()}
    assert (values["whole"][1:] != values["without"][1:]).any() and len(values["page"].calls) == 3


@pytest.mark.slow
def test_every_figure_has_its_lines_in_the_gallery():  # 8 s: it runs every study that has a figure
    values: dict[str, Any] = {}
    exec(compile(code_of(DOCS / "gallery.md"), "gallery.md", "exec"), values)
    returned = {
        name: str(inspect.signature(value).return_annotation) for name, value in vars(viz).items() if callable(value)
    }
    drawn = {name for name, kind in returned.items() if re.search("Figure|TokensHTML|Table", kind)}
    assert len(drawn) > 25
    assert {name: type(values[name]).__name__ for name in drawn} == {
        name: re.findall(r"\w+", returned[name])[-1] for name in drawn
    }


def test_every_figure_has_its_picture_in_the_gallery():
    kinds = {name: str(inspect.signature(of).return_annotation) for name, of in vars(viz).items() if callable(of)}
    figures = {name for name, kind in kinds.items() if re.search("Figure", kind)} - {"figure"}
    page = (DOCS / "gallery.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^!\[(\w+)\]\(assets/gallery/\1\.png\)$", page, re.MULTILINE)) == figures
    assert {path.stem for path in (DOCS / "assets" / "gallery").iterdir()} == figures, "write them with `make gallery`"


@pytest.mark.slow
def test_answers_run_as_written(capsys: pytest.CaptureFixture[str]):
    values: dict[str, Any] = {}
    exec(compile(code_of(DOCS / "faq.md"), "faq.md", "exec"), values)
    assert values["counted"]["sources"].to_dict() == {"recipes": 12, "one_book": 1}
    assert values["counted"]["low"].isna().to_dict() == {"recipes": False, "one_book": True}
    assert capsys.readouterr().out


def test_the_site_takes_in_an_atlas_that_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS.parent / "scripts" / "docs_hooks.py")
    assert spec and spec.loader
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    config: Any = SimpleNamespace(site_dir=str(tmp_path / "site"))
    assert "index.html" not in hooks.atlas() and not hooks.on_files([], config)
    for name in ("index.html", "data/layer-1.js", "study/manifest.json"):
        path = tmp_path / "moe-lens-atlas" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    assert "(moe-lens-atlas/index.html)" in hooks.atlas()
    found = {file.src_uri for file in hooks.on_files([], config)}
    assert found == {"moe-lens-atlas/index.html", "moe-lens-atlas/data/layer-1.js"}


def test_texts_run_as_written():
    values: dict[str, Any] = {}
    exec(compile(code_of(DOCS / "data.md"), "data.md", "exec"), values)
    assert [passage.source for passage in values["code"].passages] == ["a", "a", "b"]


def test_every_page_with_code_has_a_test_that_runs_it():
    """And no block is only of remarks: it would run whatever they say."""
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py"))
    pages = {page.name for page in DOCS.rglob("*.md") if code_of(page)}
    assert len(pages) > 20 and not {name for name in pages if f'"{name}"' not in tests}
    for name in pages:
        for block in re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text("utf-8"), re.DOTALL | re.MULTILINE):
            statements = ast.parse(block).body
            assert any(not isinstance(of, ast.Import | ast.ImportFrom) for of in statements), (name, block)


COMMAND = re.compile(r"^(?:torchrun .*-m moe_lens|(?:\.venv/bin/)?moe-lens) +([^\n]*)$", re.MULTILINE)


def test_every_command_in_the_pages_has_options_that_there_are():
    commands = vars(get_command(app))["commands"]
    known = {
        name: {"--help", *(o for of in command.params for o in of.opts + of.secondary_opts)}
        for name, command in commands.items()
    }

    def wrong(line: str) -> set[str]:
        name, *words = shlex.split(line, comments=True)
        return {word for word in words if word.startswith("--") and word not in known[name]}

    pages = [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]
    lines = [line for page in pages for line in COMMAND.findall(page.read_text(encoding="utf-8"))]
    assert len(lines) > 25 and not {line: found for line in lines if (found := wrong(line))}
    assert wrong("routing --tokns 5 --out runs") == {"--tokns"}  # negative control


def test_every_public_name_has_its_place_in_the_api_pages():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    shown = set(re.findall(r"^::: moe_lens\.(\w+)$", pages, re.MULTILINE))
    modules = set(re.findall(r"^::: moe_lens\.(names|errors)$", pages, re.MULTILINE))
    assert modules == {"names", "errors"}
    missing = {name for name in PUBLIC if not name.endswith("Error") and not name.startswith("_")} - shown
    assert not missing


def not_shown(page: str) -> list[str]:
    """Members that an API page lists and does not show: there is none, or it is inherited and that is not asked for."""
    found = []
    for name, options in re.findall(r"^::: (\S+)\n((?:    .*\n)*)", page + "\n", re.MULTILINE):
        if members := re.findall(r"^        - (\w+)$", options, re.MULTILINE):
            shown: Any = pkgutil.resolve_name(name)
            bases = shown.__mro__ if inspect.isclass(shown) else [shown]
            for member in members:
                holds = [base for base in bases if member in {**vars(base), **inspect.get_annotations(base)}]
                apart = holds[:1] != [shown] and "inherited_members: true" not in options
                former = holds and "former name" in (getattr(vars(holds[0]).get(member), "__doc__", None) or "")
                found += [f"{name}.{member}"] if not holds or apart or former else []
    return found


@pytest.mark.parametrize("page", sorted((DOCS / "api").glob("*.md")), ids=lambda page: page.stem)
def test_api_pages_show_what_they_list(page: Path):
    assert not not_shown(page.read_text(encoding="utf-8"))


def test_a_member_that_is_not_shown_is_found():
    listed = "::: moe_lens.{}\n    options:\n      {}\n      members:\n        - {}\n"
    inherited = "inherited_members: true"
    assert not_shown(listed.format("MoECache", inherited, "picked")) == ["moe_lens.MoECache.picked"]
    assert not_shown(listed.format("MoECache", "", "partial_sum")) == ["moe_lens.MoECache.partial_sum"]
    assert not_shown(listed.format("HookedMoE", inherited, "step")) == ["moe_lens.HookedMoE.step"]
    assert not not_shown(listed.format("MoECache", inherited, "partial_sum"))


def test_every_page_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        assert f": {page.relative_to(DOCS).as_posix()}\n" in navigation


def test_the_first_page_names_every_page():
    first = (DOCS / "index.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\((\w[\w-]*\.md)\)", first))
    assert named == {page.name for page in DOCS.glob("*.md")} - {"index.md", "changelog.md"}
    nav = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f": {name}\n" in nav for name in named)
