"""The numbers of the embedded model in README and docs/paper.md are those of a report without options."""

import os
import re
from pathlib import Path

import pytest

from moe_lens.cli import main
from scripts import documented_numbers


def every_number_is_there_and_a_wrong_one_is_named(report: Path, copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert documented_numbers.missing(report) == []
    for page, number in (
        (documented_numbers.PAPER, "58 to 110 %"),
        (documented_numbers.README, "58 to 110 %"),
        (documented_numbers.LOCALISATION, "to .68"),
    ):
        (copies / page).parent.mkdir(parents=True, exist_ok=True)
        right = (documented_numbers.ROOT / page).read_text(encoding="utf-8")
        wrong = right.replace(number, "5 %")
        assert right != wrong
        (copies / page).write_text(wrong, encoding="utf-8")
    monkeypatch.setattr(documented_numbers, "ROOT", copies)
    found = documented_numbers.missing(report)
    assert len(found) == 3 and all(re.search(r"perplexity by 58 to 110 %$|to \.68 \(German\)", one) for one in found)


@pytest.mark.slow  # it runs the report, unless CI has: a minute and a half on two idle cores
def test_documented_numbers_are_those_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = os.environ.get("MOE_LENS_REPORT")
    report = Path(made) if made else tmp_path / "report"
    if not made:
        assert main(["report", "--out", str(report)]) == 0
    every_number_is_there_and_a_wrong_one_is_named(report, tmp_path / "copies", monkeypatch)
