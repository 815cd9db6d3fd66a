"""The README's example runs as it is written, and its links lead somewhere."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_notebook_example_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    values: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), values)
    assert values["cache"]["expert_out", 3].shape[:3] == (1, values["logits"].shape[1], 6)
    assert (values["without"] != values["logits"]).any()  # the edit took effect
    assert len(capsys.readouterr().out.splitlines()) == example.count("print(")


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", README))
def test_links_lead_to_files(target: str):
    assert (ROOT / target).is_file()


def test_the_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z]+)", README, re.MULTILINE))
    assert {"report", "test"} <= named <= targets
