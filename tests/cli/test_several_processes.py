"""What processes of torchrun say when they end: one line in all."""

import os
import subprocess
import sys
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


@pytest.mark.slow
def test_torchrun_itself_ends_with_the_line_that_says_why(tmp_path):
    """It has lines of its own, and an exit code of 1, of which a process that it started can change no more."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env.pop("TORCHELASTIC_ERROR_FILE", None)
    for program in (["-m", "moe_lens", "routing", "--tokenz", "5"], [str(tmp_path / "plain.py")]):
        (tmp_path / "plain.py").write_text("raise SystemExit(2)")
        said = subprocess.run([*torchrun, *program], capture_output=True, text=True, env=env, check=False)
        lines = [line for line in said.stderr.splitlines() if "No such option: --tokenz" in line]
        assert said.returncode == 1
        if program[0] == "-m":
            first, last = lines
            assert first.startswith("moe-lens: error: ") and last == f"  traceback : {first}"
        else:
            assert "To enable traceback see" in said.stderr, "a control: a program that does not say why"


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
