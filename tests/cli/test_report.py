"""`moe-lens report` on a tiny random model: what it writes, and how it refuses."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

import moe_lens
from moe_lens.cli import main
from moe_lens.model.loading.tokenizer import load_tokenizer
from moe_lens.stats import MEASURES
from tests.families import build

ROOT = Path(__file__).parents[2]
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


@pytest.fixture(scope="module")
def made(checkpoint, texts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "report"
    arguments = [
        "--model",
        str(checkpoint),
        "--domain",
        f"many={texts}/many.jsonl",
        "--domain",
        f"{NASTY}={texts}/<few.txt",
    ]
    assert main(["report", *arguments, "--tokens", "1000", "--out", str(out)]) == 0
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
def test_numbers_are_complete_and_agree_with_the_tables(made):
    report = json.loads((made / "report.json").read_text(encoding="utf-8"))
    assert report["schema"] == 1
    assert set(report) == {
        "schema", "versions", "settings", "model", "domains", "uniform_baseline", "lens_examples", "tables",
    }  # fmt: skip
    assert report["model"]["moe_layers"] == [1, 2] and report["model"]["experts"] == 8
    assert [(d["name"], d["sources"], d["means_from_other_sources"]) for d in report["domains"]] == [
        ("many", 12, True),
        (NASTY, 1, False),
    ]
    assert report["uniform_baseline"] == 3 / 8
    for name, rows in report["tables"].items():
        table = pd.read_parquet(made / f"{name}.parquet")
        assert len(table) == len(rows) > 0
        assert list(table.columns) == list(rows[0])
        assert set(table["domain"]) == {"many", NASTY}
    assert len(report["tables"]["specialisation"]) == 2 * 2 * 8
    assert len(report["tables"]["perplexity"]) == 2 * 2 * 4
    assert {row["measure"] for row in report["tables"]["similarity"]} == {*MEASURES, "unexplained"}
    for row in report["tables"]["specialisation"]:
        assert row["share"] == row["assigned"] / row["tokens"]
    for name in ("most_specialised", "perplexity"):
        for row in report["tables"][name]:
            low = row["low"]
            assert (low is None) == (row["domain"] == NASTY)  # one source has no interval


def test_page_stands_alone_and_is_escaped(made):
    page = (made / "report.html").read_text(encoding="utf-8")
    ours = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?!#|https://arxiv\.org/)[^"'\s>]+""", ours)
    assert page.count("plotly.js v") == 1
    assert NASTY not in page and "&lt;b&gt;&amp;&lt;/script&gt;" in page
    # Every script ends where it should: what is left has no stray end.
    assert "</script>" not in ours
    assert "given for: &lt;b&gt;" in page  # too few sources, said so
    assert "there they come from the same texts" in page
    assert str(made) not in page


def test_same_seed_gives_the_same_numbers_and_replaces_the_old(checkpoint, texts, made, tmp_path):
    arguments = [
        "--model",
        str(checkpoint),
        "--domain",
        f"many={texts}/many.jsonl",
        "--domain",
        f"{NASTY}={texts}/<few.txt",
    ]
    (tmp_path / "report.json").write_text("old")
    assert main(["report", *arguments, "--tokens", "1000", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "report.json").read_text() == (made / "report.json").read_text()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_arguments_that_are_wrong(capsys, checkpoint, texts, tmp_path):
    model, out = ["--model", str(checkpoint)], ["--out", str(tmp_path / "out")]
    few = f"{texts}/<few.txt"
    assert "No such option: --nonsense" in refused(capsys, "--nonsense")
    assert "'--tokens': Input should be a valid integer" in refused(capsys, "--tokens", "many")
    assert "greater than or equal to 2" in refused(capsys, "--tokens", "1")
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
        ('{"text": "a"}\n', "bad.jsonl:1: a text of 1 token"),
    ],
)
def test_texts_that_are_wrong(capsys, checkpoint, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    out = tmp_path / "out"
    found = refused(capsys, "--model", str(checkpoint), "--domain", f"bad={tmp_path}/bad.jsonl", "--out", str(out))
    assert message in found
    assert not out.exists()


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


def interruptible() -> None:
    """A process that a shell started in the background ignores SIGINT, and so do its children; not this one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    code = "import sys; from moe_lens.cli import main; print('ready', file=sys.stderr, flush=True); sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, "report", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )


@pytest.mark.slow
def test_as_a_process(checkpoint, texts, tmp_path):
    done = started("--model", str(checkpoint), "--domain", f"few={texts}/<few.txt", "--tokens", "20", cwd=tmp_path)
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    assert out.strip() == str(tmp_path / "moe-lens-report" / "report.html")
    assert Path(out.strip()).stat().st_size > 10**6
    wrong = started("--domain", "few.txt", cwd=tmp_path)
    _, err = wrong.communicate(timeout=300)
    assert wrong.returncode == 2
    assert err.splitlines()[-1].startswith("moe-lens: error: ") and "Traceback" not in err


@pytest.mark.slow
def test_interrupted_it_leaves_nothing(checkpoint, texts, tmp_path):
    run = started("--model", str(checkpoint), "--domain", f"many={texts}/many.jsonl", "--out", "report", cwd=tmp_path)
    assert run.stderr is not None
    while "ready" not in run.stderr.readline():
        pass
    while run.poll() is None and not (tmp_path / "report").exists():
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


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
