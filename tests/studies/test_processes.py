"""Studies as processes: killed at any point and resumed; shared by two and by four."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_lens.cli import main, processes
from moe_lens.studies import StudyResult
from tests.forked import Forked, group
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
    return ["routing", f"--model={folder}", *domains, *how]


def begin(arguments: list[str], out: Path, said: Path) -> Forked:
    return Forked(main, [*arguments, "--out", str(out)], said=said)


def ended(process: Forked) -> str:
    status, out, err = process.end()
    assert status == 0, err
    return out


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    ended(begin(arguments, folder / "out", folder))
    return folder / "out"


@pytest.mark.parametrize(("how", "shards"), [(signal.SIGKILL, 1), (signal.SIGKILL, 3), (signal.SIGINT, 2)])
def test_killed_it_goes_on_and_ends_with_the_same(arguments, whole, how, shards, tmp_path):
    out, unfinished = tmp_path / "at" / "out", tmp_path / "at" / "out.unfinished"
    process = begin(arguments, out, tmp_path / "first")
    times: dict[str, set[int]] = {}
    while process.running:  # each change of a progress file is a shard
        for file in unfinished.glob("[0-9]*.safetensors"):
            times.setdefault(file.name, set()).add(file.stat().st_mtime_ns if file.exists() else 0)
        if sum(map(len, times.values())) >= shards:
            process.send(how)
            break
        time.sleep(0.001)
    status, _, err = process.end()
    assert status == (130 if how == signal.SIGINT else -signal.SIGKILL), err
    assert "Traceback" not in err
    assert not out.exists() and unfinished.exists()
    ended(begin(arguments, out, tmp_path / "second"))
    assert_same(StudyResult.load(whole), StudyResult.load(out))
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def agree(out: Path, whole: Path) -> None:
    assert_same(StudyResult.load(whole), StudyResult.load(out), 1e-6)
    assert StudyResult.load(out).manifest["read"] == StudyResult.load(whole).manifest["read"]


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("streaming", [False, True], ids=["memory", "streaming"])
def test_processes_count_what_one_counts(arguments, whole, n, streaming, tmp_path):
    out = tmp_path / "out"
    more = ["--streaming"] if streaming else []
    started = group(n, main, [*arguments, *more, "--out", str(out)], said=tmp_path)
    said = [ended(process).split() for process in started]
    assert said == [[str(out.resolve())], *[[]] * (n - 1)], "the first alone says where"
    agree(out, whole)


def test_processes_share_the_prompts_of_facts(arguments, tmp_path):
    path = tmp_path / "facts.jsonl"
    facts = [
        {"prompt": f"the {word} {who}", "subject": word, "answer": " water", "foil": " fish"}
        for word in ("old", "one", "other") for who in ("man", "sea")
    ]  # fmt: skip
    path.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    command = ["localise", *(each for each in arguments if each.startswith("--model")), f"--facts={path}"]
    ended(begin([*command], tmp_path / "one", tmp_path / "said"))
    started = group(2, main, [*command, "--out", str(tmp_path / "two")], said=tmp_path)
    kept: set[str] = set()
    while started[0].running:
        kept |= {file.name for file in (tmp_path / "two.unfinished").glob("0-tracing-00-?of2.safetensors")}
        time.sleep(0.001)
    for process in started:
        ended(process)
    assert kept == {"0-tracing-00-0of2.safetensors", "0-tracing-00-1of2.safetensors"}, "a part of one kind for each"
    one, two = (StudyResult.load(tmp_path / name) for name in ("one", "two"))
    assert_same(one, two, 1e-9)
    assert one.tables["experts"].equals(two.tables["experts"])


def hasty(arguments: list[str]) -> int:
    """The command; the first process does not wait for what the other may say."""
    if os.environ["RANK"] == "0":
        processes.MOMENT = 0.0
    return main(arguments)


def test_an_error_or_a_signal_of_one_process_ends_all_of_them_with_a_line_and_loses_nothing(arguments, whole, tmp_path):
    out, unfinished = tmp_path / "at" / "out", tmp_path / "at" / "out.unfinished"
    started = group(2, hasty, [*arguments, "--out", str(out)], said=tmp_path / "0")
    progress: list[Path] = []
    while started[1].running and not progress:
        time.sleep(0.001)
        progress = list(unfinished.glob("*-1of2.safetensors"))
    started[1].send(signal.SIGTERM)
    assert one_line(started, [2, 143]).startswith(
        "moe-lens (process 1): terminated; any progress is kept: run the same command"
    )
    (broken,) = progress
    content = broken.read_bytes()
    broken.write_bytes(content[:100])
    line = one_line(group(2, hasty, [*arguments, "--out", str(out)], said=tmp_path / "1"), [2, 2])
    assert line.startswith(f"moe-lens (process 1): error: {broken} cannot be read"), line
    broken.write_bytes(content)
    for process in group(2, main, [*arguments, "--out", str(out)], said=tmp_path / "2"):
        ended(process)
    agree(out, whole)


def one_line(started: list[Forked], statuses: list[int]) -> str:
    """All that several processes said when they ended."""
    ends = [process.end() for process in started]
    assert [status for status, _, _ in ends] == statuses, ends
    (line,) = [line for _, _, err in ends for line in err.splitlines() if line.strip()]
    return line


def test_torchrun_starts_them(arguments, whole, tmp_path):
    out = tmp_path / "out"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moe_lens"]
    done = subprocess.run(
        [sys.executable, *launcher, *arguments, "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(out.resolve())]
    agree(out, whole)
