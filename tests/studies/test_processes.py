"""Studies as processes: killed at any point and resumed; shared by two and by four; the model on several devices."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_lens.studies import StudyResult
from tests.studies.tiny import assert_same, save_checkpoint, write_jsonl

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder)
    texts = tmp_path_factory.mktemp("texts")
    domains = [f"--domain={name}={write_jsonl(texts / f'{name}.jsonl', n=60, seed=i)}" for i, name in enumerate("ab")]
    how = ["--tokens=0", "--window=24", "--shard-tokens=150", "--batch-tokens=200"]
    return [f"--model={folder}", *domains, *how]


def start(*command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )


def done(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    done(start("-m", "moe_lens", "routing", *arguments, "--out", str(out)))
    return out


@pytest.mark.parametrize(("how", "shards"), [(signal.SIGKILL, 1), (signal.SIGKILL, 3), (signal.SIGINT, 2)])
def test_killed_it_goes_on_and_ends_with_the_same(arguments, whole, how, shards, tmp_path):
    out = tmp_path / "out"
    process = start("-m", "moe_lens", "routing", *arguments, "--out", str(out))
    unfinished = tmp_path / "out.unfinished"
    times: dict[str, set[int]] = {}
    while process.poll() is None:  # each change of a progress file is a shard
        for file in unfinished.glob("[0-9]*.safetensors"):
            times.setdefault(file.name, set()).add(file.stat().st_mtime_ns if file.exists() else 0)
        if sum(map(len, times.values())) >= shards:
            process.send_signal(how)
            break
        time.sleep(0.001)
    _, err = process.communicate(timeout=500)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), err
    assert "Traceback" not in err
    assert not out.exists() and unfinished.exists()
    done(start("-m", "moe_lens", "routing", *arguments, "--out", str(out)))
    assert_same(StudyResult.load(whole), StudyResult.load(out))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("streaming", [False, True], ids=["memory", "streaming"])
def test_processes_count_what_one_counts(arguments, whole, processes, streaming, tmp_path):
    out = tmp_path / "out"
    more = ["--streaming"] if streaming else []
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    said = done(start(*launcher, "-m", "moe_lens", "routing", *arguments, *more, "--out", str(out)))
    assert said.strip().splitlines()[-1] == str(out.resolve())
    assert said.count(str(out.resolve())) == 1
    assert_same(StudyResult.load(whole), StudyResult.load(out), 1e-6)
    assert StudyResult.load(out).manifest["read"] == StudyResult.load(whole).manifest["read"]
