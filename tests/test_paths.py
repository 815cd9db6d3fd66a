"""Wherever a path is asked for, it may be a `Path` or a `str`; a `str` that may be file or text is read as meant."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

import moe_lens
from moe_lens.data import DomainSpec
from moe_lens.errors import InputError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.interventions import ExpertMeans
from moe_lens.report import OutputFolder
from moe_lens.studies import Comparison
from moe_lens.viz.coloured_tokens import TokensHTML
from tests.matrix.configs import tokens
from tests.wrapped import wrapped

SOURCES = sorted(Path(moe_lens.__file__).parent.rglob("*.py"))
INTERNAL = {
    "cli": "typer makes a Path of what is typed",
    "model/loading": "behind HookedMoE.from_pretrained and save_pretrained, which take both",
    "data/corpus.py: digest": "of a file that from_file has opened",
    "json_files.py": "the bottom of the package, which offers none of it",
    "lenses/tuned_lens_package.py": "behind TunedLens.from_tuned_lens, which takes both",
    "lenses/tuned_training.py": "behind TunedLens.fit, which takes both",
    "manifest.py": "the bottom of the package, which offers none of it",
    "scratch.py": "below what writes files, which takes both",
    "pruning/prune_job.py": "the work of the command `prune`",
    "studies/collected.py: Collected": "made by Collected.load, which takes both",
    "studies/collected.py: write_shard": "into the folder of a study that runs",
    "studies/study_folder.py": "where studies.run and studies.collect, which take both, keep what is unfinished",
}
"""Where a Path alone is taken: what a user does not call."""


def only_paths(tree: ast.Module) -> Iterator[str]:
    """Functions and dataclasses that take a Path, or something called like one, and no str: one that can be called from
    outside, by its name."""

    def visit(body: list[ast.stmt], path: str) -> Iterator[str]:
        for node in body:
            name = getattr(node, "name", "")
            if not isinstance(node, ast.ClassDef | ast.FunctionDef) or (name.startswith("_") and name != "__init__"):
                continue
            if isinstance(node, ast.ClassDef):
                made = any("dataclass" in ast.unparse(each) for each in node.decorator_list)
                fields = [each for each in node.body if isinstance(each, ast.AnnAssign) and made]
                asked = [(ast.unparse(each.target), each.annotation) for each in fields]
                yield from visit(node.body, f"{path}{name}.")
            else:
                given = node.args
                asked = [(each.arg, each.annotation) for each in given.posonlyargs + given.args + given.kwonlyargs]
            if any(annotation and is_path_alone(what, annotation) for what, annotation in asked):
                yield f"{path}{name}"

    return visit(tree.body, "")


def is_path_alone(name: str, annotation: ast.expr) -> bool:
    named = set(words(annotation))
    return "str" not in named if "Path" in named else name in ("path", "folder", "file") and named == {"Any"}


def words(annotation: ast.expr) -> Iterator[str]:
    """Every name in an annotation, but for those that a function inside it is called with."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Callable":
        return
    if isinstance(annotation, ast.Name):
        yield annotation.id
    for inner in ast.iter_child_nodes(annotation):
        if isinstance(inner, ast.expr):
            yield from words(inner)


def test_a_path_may_be_a_str_wherever_one_is_asked_for() -> None:
    """What the annotations say; that the code does as they say is what type checkers prove."""
    root = Path(moe_lens.__file__).parent
    found = {
        f"{source.relative_to(root).as_posix()}: {name}"
        for source in SOURCES
        for name in only_paths(ast.parse(source.read_text(encoding="utf-8")))
    }
    assert {name for name in found if not name.startswith(tuple(INTERNAL))} == set()
    assert [place for place in INTERNAL if not any(name.startswith(place) for name in found)] == []


def test_the_law_sees_what_takes_a_path_alone() -> None:
    source = """
def save(path: Path): ...
def _save(path: Path): ...
def untyped(self, folder: Any): ...
def fine(path: str | Path, *, fill: Callable[[Path], None]): ...
@dataclass(frozen=True)
class Opened:
    folder: Path
    @classmethod
    def load(cls, *, saved: Path | None): ...
class Plain:
    folder: Path
    def __init__(self, folder: Path): ...
"""
    assert set(only_paths(ast.parse(source))) == {"save", "untyped", "Opened", "Opened.load", "Plain.__init__"}


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return wrapped("deepseek").model


def test_means_are_read_from_a_file_that_is_named_by_a_str(
    model: HookedMoE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not measured on the letters of its name."""
    ids = tokens()
    ExpertMeans.measure(model, ids).save(str(tmp_path / "means"))

    def ablated(reference: str | Path) -> torch.Tensor:
        with torch.no_grad(), model.ablate(ranks=[0], how="mean", reference=reference):
            return model(ids)

    monkeypatch.chdir(tmp_path)
    assert torch.equal(ablated("means"), ablated(Path("means")))
    assert not torch.equal(ablated("means"), model(ids))
    for missing in ("meens.safetensors", str(tmp_path / "meens.safetensors")):
        with pytest.raises(InputError, match="there is no file .*meens.safetensors"):
            model.ablate(ranks=[0], how="mean", reference=missing)
    (tmp_path / "other").write_text("a text")
    with pytest.raises(InputError, match="other cannot be read"):
        model.ablate(ranks=[0], how="mean", reference="other")


def test_results_are_written_where_a_str_says(tmp_path: Path) -> None:
    with OutputFolder(str(tmp_path / "report")) as folder:
        (made,) = folder.fill(lambda into: (into / "a").touch())
    assert made == tmp_path / "report" / "a"
    Comparison("routing", ("a", "b"), {}, {}, pd.DataFrame({"a": [1]})).save(str(tmp_path / "table"))
    assert pd.read_parquet(tmp_path / "table")["a"].tolist() == [1]
    TokensHTML("<b>a</b>").save(str(tmp_path / "pages" / "tokens.html"))
    assert "<b>a</b>" in (tmp_path / "pages" / "tokens.html").read_text()
    with pytest.raises(InputError, match="is a folder"):
        TokensHTML("<b>a</b>").save(str(tmp_path))
    (tmp_path / "fr.txt").write_text("Il y avait un roi.")
    for path in (tmp_path / "fr.txt", str(tmp_path / "fr.txt")):
        assert DomainSpec(name="fr", path=path).open().name == "fr"
