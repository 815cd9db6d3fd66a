"""An output folder: complete or untouched."""

import os
from pathlib import Path

import pytest

from moe_lens.errors import InputError
from moe_lens.report import OutputFolder


def test_files_appear_together_and_others_stay(tmp_path):
    out = tmp_path / "a" / "b"
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("mine")
    (out / "page.html").write_text("old")
    with OutputFolder(out) as folder:

        def write(into: Path) -> None:
            (into / "page.html").write_text("new")
            assert (out / "page.html").read_text() == "old"

        folder.fill(write)
    assert {path.name: path.read_text() for path in out.iterdir()} == {"mine.txt": "mine", "page.html": "new"}


def test_what_fails_leaves_nothing(tmp_path):
    out = tmp_path / "a" / "b"
    with pytest.raises(ZeroDivisionError), OutputFolder(out) as folder:

        def write(into: Path) -> None:
            (into / "page.html").write_text("half")
            raise ZeroDivisionError

        folder.fill(write)
    assert list(tmp_path.iterdir()) == []


def test_interruption_leaves_what_was_there(tmp_path):
    (tmp_path / "page.html").write_text("old")
    with pytest.raises(KeyboardInterrupt), OutputFolder(tmp_path):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_full_disk_is_said(tmp_path):
    def full(into: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left on device"), OutputFolder(tmp_path / "out") as folder:
        folder.fill(full)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_found_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), OutputFolder(tmp_path / "file" / "out"):
        raise AssertionError
    if os.geteuid() != 0:  # root writes anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(InputError, match="cannot be written"), OutputFolder(tmp_path / "closed"):
            raise AssertionError


def test_what_a_killed_run_left_is_removed_by_the_next_and_a_running_one_is_left_alone(tmp_path):
    killed = tmp_path / ".unfinished-of-a-process-that-is-no-more"
    (killed / "work").mkdir(parents=True)
    (killed / ".lock").touch()  # the system has released it
    (killed / "work" / "half").touch()
    with OutputFolder(tmp_path) as other:
        assert other.left == 1 and not killed.exists()
        with pytest.raises(InputError, match="another run is writing there"), OutputFolder(tmp_path):
            pass
        assert other.scratch.is_dir()
    assert list(tmp_path.iterdir()) == []
