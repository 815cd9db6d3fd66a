"""The code of the pages on the TunedLens and on reading experts runs as it is written, and shows what they say."""

from typing import Any

import pytest

from tests.test_docs import DOCS, code_of


def run(page: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    exec(compile(code_of(DOCS / page), page, "exec"), values)
    return values


@pytest.mark.slow
def test_tuned_lens_page_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    values = run("tuned-lens.md")
    printed = capsys.readouterr().out
    assert printed.index("LogitLens") < printed.index("TunedLens")
    tuning = values["tuned"].tuning
    assert tuning.post_after[0] < tuning.post_before[0]
    assert (values["before"].kl_final >= 0).all()


@pytest.mark.typed
@pytest.mark.slow
def test_expert_reading_page_runs_as_written(capsys):
    values = run("expert-reading.md")
    assert "tokens; the mean output promotes" in capsys.readouterr().out
    assert values["found"].routed > 0.5 * values["found"].tokens  # the most used expert of the language
    own = values["geometry"].to_frame().groupby("measure")[["own", "others"]].mean()
    assert own.loc["inputs", "own"] > 0.3 and abs(own.loc["inputs", "others"]) < 0.1
    assert own.loc["neurons", "own"] > own.loc["neurons", "others"]
