"""What processes of torchrun say when they end: one line in all."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lens import distributed
from moe_lens.cli import main, processes
from tests.forked import Forked


@pytest.fixture
def rank(tmp_path, monkeypatch):
    """Become a process of torchrun's."""

    def become(number: int, **env: str) -> None:
        folder = tmp_path / "try" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        found = {"WORLD_SIZE": "2", "RANK": str(number), "LOCAL_RANK": str(number)}
        for name, value in (found | {"TORCHELASTIC_ERROR_FILE": str(folder / "error.json")} | env).items():
            monkeypatch.setenv(name, value)

    monkeypatch.setattr(processes, "MOMENT", 0.1)
    return become


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def test_an_error_that_all_meet_is_said_once(rank, capsys, monkeypatch):
    wrong = ["routing", "--tokenz", "5"]
    rank(0)
    assert refused(capsys, *wrong).startswith("moe-lens: error: No such option: --tokenz")
    rank(1)
    assert refused(capsys, *wrong) == ""
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert refused(capsys, *wrong).startswith("moe-lens (process 1): error: "), "a control: other launchers"


def test_an_error_that_one_meets_is_said_by_it(rank, tmp_path, capsys):
    rank(1)
    assert refused(capsys, "routing", "--tokenz", "5").startswith("moe-lens (process 1): error: No such option")
    rank(0)
    assert not processes.speaks(), "what torchrun ends then says nothing"
    rank(0, TORCHELASTIC_ERROR_FILE=str(tmp_path / "no" / "such" / "folder"))
    assert processes.speaks(), "better twice than not at all"


def test_what_several_processes_cannot_share_is_refused(rank, capsys):
    for command in ("prune", "models", "info", "show", "compare"):
        rank(0, TORCHELASTIC_ERROR_FILE=str(Path(f"/nowhere/{command}/0/error.json")))
        assert f"{command} runs in a single process: start it without torchrun" in refused(capsys, command)
    rank(0, WORLD_SIZE="1")
    assert main(["models"]) == 0


def test_processes_that_are_not_there_are_said(rank, capsys, monkeypatch, tmp_path):
    rank(0)
    monkeypatch.delenv("RANK")
    said = refused(capsys, "lens", "--tokens", "50", "--out", str(tmp_path / "out"))
    assert "WORLD_SIZE is 2, and the other processes cannot be found" in said and "unset WORLD_SIZE" in said


def joined(times: int) -> int:
    for number in range(times):
        with processes.leaving():
            processes.join_processes("cpu")
            assert distributed.gather((os.environ["RANK"], number)) == [("0", number), ("1", number)]
    return 0


def test_processes_find_one_another_again(tmp_path):
    """Two commands, one after the other, in processes of torchrun, whose store keeps what the first has left in it."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    env: dict[str, Any] = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    env["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    both = [Forked(joined, 4, said=tmp_path / rank, RANK=rank, LOCAL_RANK=rank, **env) for rank in "01"]
    assert [process.end()[0] for process in both] == [0, 0]
