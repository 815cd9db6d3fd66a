"""Saved results that are broken, changed or of another time: one line and exit 2, by every command that reads them."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from moe_lens.errors import InputError
from moe_lens.manifest import FORMAT, MANIFEST, seal
from moe_lens.studies import LensStudy, RoutingStudy, SingleExpertStudy, StudyResult, collect, run
from moe_lens.studies.study_folder import StudyFolder
from tests.cli.test_studies import refused
from tests.studies.test_study import SMALL
from tests.studies.tiny import domain, tiny_model

STUDIES = [RoutingStudy(), SingleExpertStudy(treatments=("dropped",)), LensStudy()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder, model = tmp_path_factory.mktemp("saved"), tiny_model()
    for study in STUDIES:
        run(study, model, [domain("a")], reading=SMALL, out=folder / study.name)
    collect(model, [domain("a")], folder / "collect", reading=SMALL)
    return folder


def readers(result: Path, good: Path, out: Path) -> list[list[str]]:
    page = ["--out", str(out / "page")]
    return [
        ["report", str(result), *page],
        ["report", str(good), str(result), *page],
        ["compare", str(result), str(good), "--out", str(out / "table.parquet")],
        ["compare", str(good), str(result), "--out", str(out / "table.parquet")],
    ]


def not_read(result: Path) -> str:
    """What both commands say of it, since neither does anything with a result but load it first."""
    with pytest.raises(InputError) as error:
        StudyResult.load(result)
    said = str(error.value)
    assert "\n" not in said
    return said


def refused_by_all(capsys, saved: Path, result: Path, out: Path) -> str:
    said = {refused(capsys, *command) for command in readers(result, saved / "routing", out)}
    assert len(said) == 1 and not any(out.iterdir())  # and nothing was written
    return said.pop()


def rewritten(folder: Path, *, sealed: bool, **changes: object) -> None:
    """Change a manifest; `sealed` as whoever wrote it would have."""
    path = folder / MANIFEST
    manifest = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    if sealed:
        manifest.pop("seal", None)
        manifest["seal"] = seal(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize("study", [study.name for study in STUDIES])
def test_no_file_can_be_missing_cut_or_changed(saved, study, tmp_path, capsys):
    result, out = tmp_path / "result", tmp_path / "out"
    out.mkdir()
    files = [path.relative_to(saved / study) for path in (saved / study).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".parquet", ".safetensors"}
    for file in files:
        whole = (saved / study / file).read_bytes()
        for content in (None, b"", whole[: len(whole) // 2], whole[:-1], whole[:99] + b"\xff" + whole[100:]):
            shutil.copytree(saved / study, result)
            if content is None:
                (result / file).unlink()
            else:
                (result / file).write_bytes(content)
            assert str(file) in not_read(result)
            if content is None:
                assert str(file) in refused_by_all(capsys, saved, result, out)
            shutil.rmtree(result)


@pytest.mark.parametrize("study", [*(study.name for study in STUDIES), "collect"])
def test_no_word_of_a_manifest_can_be_missing_or_changed(saved, study, tmp_path, capsys):
    result, out = tmp_path / "result", tmp_path / "out"
    out.mkdir()
    shutil.copytree(saved / study, result)
    whole = json.loads((result / MANIFEST).read_text(encoding="utf-8"))
    places = [(key,) for key in whole] + [("plan", key) for key in whole["plan"]]
    places += [("plan", "model", key) for key in whole["plan"]["model"]]
    assert len(places) > 20
    for *outer, last in places:
        for change in ("delete", None, "other"):
            changed = json.loads(json.dumps(whole))
            inside = changed
            for key in outer:
                inside = inside[key]
            if change == "delete":
                del inside[last]
            else:
                inside[last] = change
            (result / MANIFEST).write_text(json.dumps(changed), encoding="utf-8")
            assert MANIFEST in not_read(result), (outer, last, change)
    for content in ("", "[]", "null", "{", "[" * 100_000, "\udcff"):
        (result / MANIFEST).write_bytes(content.encode("utf-8", "surrogateescape"))
        assert "cannot be read as the manifest of a study" in not_read(result)
    assert "cannot be read as the manifest of a study" in refused_by_all(capsys, saved, result, out)
    (result / MANIFEST).write_text(json.dumps(whole), encoding="utf-8")  # the control: it is read again
    assert study == "collect" or StudyResult.load(result).study == study


def test_tables_that_were_edited_and_formats_of_another_time(saved, tmp_path, capsys):
    result, out = tmp_path / "result", tmp_path / "out"
    out.mkdir()
    shutil.copytree(saved / "routing", result)
    table = pd.read_parquet(result / "layers.parquet").rename(columns={"measure": "what"})
    table.to_parquet(result / "layers.parquet", index=False)
    assert "layers.parquet is not as the study wrote it" in refused_by_all(capsys, saved, result, out)
    shutil.rmtree(result)
    for format_, told in ((FORMAT + 1, "a newer moe_lens: install that"), (FORMAT - 1, "earlier"), (None, "earlier")):
        shutil.copytree(saved / "routing", result)
        rewritten(result, sealed=True, format=format_)
        said = refused_by_all(capsys, saved, result, out)
        assert f"has format {format_}, and this moe_lens reads {FORMAT}" in said and told in said
        shutil.rmtree(result)
    # Another result of the same study in the place of one: the manifest knows its own.
    shutil.copytree(saved / "routing", result)
    other, place = (saved / "lens" / "results").glob("*"), result / "results" / "00-a-model pairs.safetensors"
    shutil.copy(next(iter(other)), place)
    assert "00-a-model pairs.safetensors is not as the study wrote it" in refused_by_all(capsys, saved, result, out)


def test_what_has_no_tables_and_what_cannot_be_compared(saved, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    said = refused_by_all(capsys, saved, saved / "collect", out)
    assert "holds what collect saved, of which there is nothing to show or compare" in said
    for nothing in (tmp_path / "none", out, saved / "routing" / MANIFEST):
        assert "holds no result of a study" in refused_by_all(capsys, saved, nothing, out)
    command = ["compare", str(saved / "routing"), str(saved / "lens")]
    assert "cannot be compared" in refused(capsys, *command)


def test_progress_that_was_changed_is_said(saved, tmp_path):
    plan = json.loads((saved / "routing" / MANIFEST).read_text(encoding="utf-8"))["plan"]
    StudyFolder(tmp_path / "out", plan).begin()
    StudyFolder(tmp_path / "out", {**plan, "settings": {}}).begin()  # a plan alone stands in nobody's way
    (tmp_path / "out.unfinished" / ".plan.json.cut").write_text("{")  # nor does what was cut short
    folder = StudyFolder(tmp_path / "out", plan)
    folder.begin()
    with folder.filled():
        folder.save("0", {"state": torch.zeros(1)}, {})
    with pytest.raises(InputError, match="holds the beginning of other work – settings"):
        StudyFolder(tmp_path / "out", {**plan, "settings": {}}).begin()
    kept = tmp_path / "out.unfinished" / "plan.json"
    whole = kept.read_text(encoding="utf-8")
    for content, told in (
        ("{", "cannot be read as the beginning of a study"),
        (whole.replace(f'"format": {FORMAT}', f'"format": {FORMAT + 1}'), "a newer moe_lens"),
    ):
        kept.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=told):
            StudyFolder(tmp_path / "out", plan).begin()
    kept.write_text(whole, encoding="utf-8")
    StudyFolder(tmp_path / "out", plan).begin()


def test_progress_of_another_pass_or_study_is_not_taken_for_its_own(saved, tmp_path):
    plan = json.loads((saved / "routing" / MANIFEST).read_text(encoding="utf-8"))["plan"]
    folder, other = StudyFolder(tmp_path / "out", plan), StudyFolder(tmp_path / "other", {**plan, "settings": {}})
    for each in (folder, other):
        each.begin()
        for name in ("0-first", "1-second"):
            each.save(name, {"state": torch.ones(1)}, {"shards": 3})
    kept = tmp_path / "out.unfinished" / "0-first.safetensors"
    own = kept.read_bytes()
    for wrong in (kept.with_name("1-second.safetensors"), tmp_path / "other.unfinished" / "0-first.safetensors"):
        shutil.copy(wrong, kept)
        with pytest.raises(
            InputError, match=r"0-first.safetensors: is not what this study kept there; remove .*out.unf"
        ):
            folder.load("0-first")
    kept.write_bytes(own)
    found = folder.load("0-first")
    assert found is not None and found[1]["shards"] == 3 and found[0]["state"].tolist() == [1]


def test_a_folder_is_filled_by_one_run_at_a_time(saved, tmp_path, monkeypatch):
    plan = json.loads((saved / "routing" / MANIFEST).read_text(encoding="utf-8"))["plan"]
    out = tmp_path / "out"
    first, second = StudyFolder(out, plan), StudyFolder(out, plan)
    first.begin()
    for other in (second, StudyFolder(out, {**plan, "settings": {}})):
        with pytest.raises(InputError, match="out: another run is filling it; wait until that has ended"):
            other.begin()
    with pytest.raises(KeyboardInterrupt), first.filled():
        first.save("0", {"state": torch.ones(1)}, {})
        raise KeyboardInterrupt
    second.begin()  # takes up what the first has left
    assert second.load("0") is not None
    with second.filled():
        pass
    killed = os.fork()
    if not killed:
        StudyFolder(out, plan).begin()
        os._exit(0)
    assert os.waitpid(killed, 0)[1] == 0 and second.load("0") is not None
    second.begin()  # however the other has ended


@pytest.mark.parametrize("removed", range(3))  # of progress, and the lock
def test_what_a_run_leaves_that_is_killed_once_its_result_is_there_is_dropped(saved, tmp_path, monkeypatch, removed):
    plan = json.loads((saved / "routing" / MANIFEST).read_text(encoding="utf-8"))["plan"]
    left, unlink, gone = tmp_path / "out.unfinished", Path.unlink, []

    def killed(path: Path) -> None:
        if path.parent == left and (tmp_path / "out").exists():
            if len(gone) == removed:
                os._exit(9)
            gone.append(path)
        unlink(path)

    if not (process := os.fork()):
        monkeypatch.setattr(Path, "unlink", killed)
        folder = StudyFolder(tmp_path / "out", plan)
        folder.begin()
        for name in ("0-first", "1-second"):
            folder.save(name, {"state": torch.ones(1)}, {})
        folder.finish(folder.scratch(), {})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9 and (left / "plan.json").exists()
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    shutil.copytree(left, other := tmp_path / "other.unfinished")
    (other / "plan.json").write_text((left / "plan.json").read_text().replace('"seed": 0', '"seed": 1'))
    assert StudyFolder(tmp_path / "out", plan).finished() and not left.exists()
    assert StudyFolder(tmp_path / "other", plan).finished() and other.exists(), "the control: other work"


def test_two_runs_at_once_lose_nothing(tmp_path):
    """The same study into the same folder, begun by a second run while the first one is reading."""
    model, out, said = tiny_model(), tmp_path / "out", []
    how = {"reading": replace(SMALL, shard_tokens=20), "out": out, "name": "tiny", "command": "x"}

    def again(what: str, tokens: int) -> None:  # noqa: ARG001
        with pytest.raises(InputError, match="another run is filling it") as refused_:
            run(RoutingStudy(), model, [domain("a")], **how)
        said.append(str(refused_.value))

    made = run(RoutingStudy(), model, [domain("a")], **how, watch=again)
    alone = run(RoutingStudy(), model, [domain("a")], **{**how, "out": tmp_path / "alone"})
    assert len(said) > 1 and not (tmp_path / "out.unfinished").exists()
    for name, table in alone.tables.items():
        pd.testing.assert_frame_equal(made.tables[name], table)


def test_what_cannot_be_written_leaves_nothing(saved, tmp_path, monkeypatch):
    plan = json.loads((saved / "routing" / MANIFEST).read_text(encoding="utf-8"))["plan"]

    def full(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_bytes", full)
        with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
            StudyFolder(tmp_path / "out", plan).begin()
    assert list(tmp_path.iterdir()) == []
    StudyFolder(tmp_path / "out", plan).begin()
    assert (tmp_path / "out.unfinished").exists()
