"""The page about statistics runs as it is written, and what it says of the embedded model holds."""

from pathlib import Path
from typing import Any

import pytest

from moe_lens import stats
from tests.test_docs import DOCS, code_of


@pytest.mark.slow
def test_statistics_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    exec(compile(code_of(DOCS / "statistics.md"), "statistics.md", "exec"), values)
    assert capsys.readouterr().out
    # A trained model's experts depend on the domain; an untrained router's differ less, chance's not at all.
    assert float(values["found"].p_values.min()) == 1 / 201
    assert (values["found"].mi > 2 * values["found"].mi_null).all()
    best = [float(values[name].specialisation.max()) for name in ("untrained", "chance")]
    assert best[1] < 2 * values["chance"].baseline < best[0]
    assert [file.name for file in tmp_path.iterdir()] == ["code.safetensors"]


def test_every_public_name_is_on_the_api_page():
    page = (DOCS / "api" / "statistics.md").read_text(encoding="utf-8")
    public = {
        name for name, value in vars(stats).items() if not name.startswith("_") and not hasattr(value, "__path__")
    }
    public -= {name for name, value in vars(stats).items() if type(value).__name__ == "module"}
    missing = {name for name in public if f"::: moe_lens.stats.{name}\n" not in page}
    assert missing <= {"Means", "MIN_SOURCES"}
