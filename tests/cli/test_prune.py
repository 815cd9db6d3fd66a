import json
import shutil
import signal
import sys
from typing import Any

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_lens.cli import main
from moe_lens.pruning import Plan, Scores, prune_job, speed
from tests.forked import Forked


def domain(path, sources, text):
    lines = [json.dumps({"text": f"{text} {i} {text}", "source": f"s{i}"}) for i in range(sources)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def texts(tmp_path):
    prose = domain(tmp_path / "prose.jsonl", 12, "The house stood on a hill above the river, and nobody lived there.")
    code = domain(tmp_path / "code.jsonl", 12, "def add(first, second):\n    return first + second\n")
    return ["--domain", f"prose={prose}", "--domain", f"code={code}", "--tokens", "900"]


def read_by_transformers(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    logits = model(**tokenizer("A house", return_tensors="pt")).logits
    sys.stdout.write(f"{model.config.n_routed_experts} {logits.isfinite().all().item()}")


@pytest.mark.typed
@pytest.mark.slow
def test_a_smaller_model_its_report_and_its_numbers_are_written(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 1)
    out = tmp_path / "out"
    arguments = ["prune", *texts, "--keep", "0.5", "--method", "frequency", "--against", "random"]
    assert main([*arguments, "--specialist", "code", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str((out / "report.html").resolve()) and "perplexity × of each domain" in said.err
    assert {path.name for path in out.iterdir()} == {
        "model", "report.html", "frontier.parquet", "frontier.safetensors", "size.parquet", "speed.parquet",
        "scores.safetensors", "plan.safetensors",
    }  # fmt: skip
    assert json.loads((out / "model" / "config.json").read_text())["n_routed_experts"] == 32
    assert Plan.load(out / "plan.safetensors").method == "frequency on code"
    assert Scores.load(out / "scores.safetensors").domains == ("prose", "code")
    frame: Any = pd.read_parquet(out / "frontier.parquet")
    assert set(frame["method"]) == {"all experts", "frequency", "random"} and frame["ratio_low"].notna().all()
    size = pd.read_parquet(out / "size.parquet").set_index("model")
    assert size.loc["pruned", "disk_bytes"] < 0.65 * size.loc["original", "disk_bytes"]
    page = (out / "report.html").read_text()
    assert "32 of 64 experts" in page and 'src="http' not in page
    # in a process of its own, and for DeepSeek v1 after `from moe_lens import HookedMoE` as the card says
    status, said, err = Forked(read_by_transformers, out / "model", said=tmp_path / "said").end()
    assert (status, said.split()) == (0, ["32", "True"]), err
    assert main([*arguments, "--out", str(out)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "0.999"], "keep 0.999 keeps all 64 experts of a layer, and each token its 6"),
        (["--keep", "0.05"], "leaves 3 experts a layer, and every token needs 6"),
        (["--specialist", "latin"], "--specialist is 'latin'; the domains are prose, code"),
        (["--budget", "global", "--method", "frequency"], "plan.uniform() is the plan of the same size that fits"),
        (["--top-k", "7", "--method", "random"], "top_k is 7; expected 1 to 6"),
        (["--uniform"], "--uniform evens out what --budget global gives"),
        (["--method", "magic"], "'magic' is not one of"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(texts, options, message, tmp_path, capsys):
    assert main(["prune", *texts, *options, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and said.splitlines()[-1].startswith("moe-lens: error: ")
    assert not (tmp_path / "out").exists()


def test_ended_in_the_middle_it_promises_nothing_that_it_does_not_keep(texts, tmp_path, capsys, monkeypatch):
    """A study keeps its progress (see test_report.py), and says so; this does not."""
    out = tmp_path / "a" / "out"

    def end(*_: Any, **__: Any) -> None:
        assert list(out.iterdir()), "the work had begun"
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(prune_job, "frontier", end)
    assert main(["prune", *texts, "--method", "frequency", "--against", "random", "--out", str(out)]) == 143
    said = capsys.readouterr().err.strip().splitlines()
    assert said == ["moe-lens: terminated; no progress is kept: the same command starts anew"]
    assert not out.parent.exists(), "and so it does: there is nothing to go on with"


def test_nothing_is_written_into_the_folder_that_is_read(texts, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for out in (folder, folder / "smaller" / "one"):
        assert main(["prune", *texts, "--model", str(folder), "--out", str(out)]) == 2
        assert "in the folder of the model itself" in capsys.readouterr().err
    assert not any(folder.iterdir())


def test_a_full_disk_is_said_of_the_folder_that_was_given(texts, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    assert main(["prune", *texts, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"moe-lens: error: {tmp_path}/out/model: the smaller model takes 0.01 GB")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["prune", "routing", "collect"])
def test_nothing_is_written_into_a_folder_of_texts(command, texts, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    for out in (tmp_path, tmp_path / "a" / "b"):
        assert main([command, "--domain", f"all={tmp_path}", "--out", str(out)]) == 2
        assert f"--out {out} is in the folder of the texts of domain 'all'; choose another" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
