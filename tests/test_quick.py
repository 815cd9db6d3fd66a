"""`make quick` chooses the tests that are about what changed, and begins none after its time."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import quick

FILES = {
    "moe_lens/shapes.py": "def circle(): ...\ndef _inner(): ...\nclass Square: ...\n",
    "moe_lens/other.py": "def line(): ...\n",
    "tests/helpers.py": "def draw(): ...\n",
    "tests/test_named.py": "from moe_lens.shapes import *",
    "tests/a/test_defined.py": "Square()",
    "tests/test_private.py": "_inner, circles, Squares",
    "tests/test_helped.py": "draw(line)",
}


def chosen(root: Path, *changed: str) -> list[str]:
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return quick.tests_of(changed, root)


def test_tests_of_what_changed_are_those_that_name_it(tmp_path: Path) -> None:
    assert chosen(tmp_path, "moe_lens/shapes.py") == ["tests/a/test_defined.py", "tests/test_named.py"]
    assert chosen(tmp_path, "moe_lens/other.py") == ["tests/test_helped.py"]
    assert chosen(tmp_path, "tests/helpers.py") == ["tests/test_helped.py"]
    both = ["tests/test_private.py", "tests/a/test_defined.py", "tests/test_named.py"]
    assert chosen(tmp_path, "moe_lens/shapes.py", "tests/test_private.py") == both, "changed tests come first"
    assert chosen(tmp_path, "scripts/quick.py") == []
    examples = "tests/test_examples.py"  # which finds them by their folder
    assert chosen(tmp_path, "examples/tour.py", examples) == [examples]


@pytest.mark.parametrize(("end", "stops"), [(0.0, True), (float("inf"), False)])
def test_no_test_begins_when_the_time_is_up(end: float, stops: bool) -> None:
    session = SimpleNamespace(shouldstop=False)
    items: list[Any] = [SimpleNamespace(nodeid=f"tests/test_a.py::{name}", session=session) for name in "ab"]
    deadline = quick.Deadline(end)
    deadline.pytest_collection_modifyitems(items)
    deadline.pytest_runtest_protocol(items[0])
    assert bool(session.shouldstop) == deadline.over == stops
    report: Any = SimpleNamespace(failed=False)
    deadline.pytest_runtest_logreport(report)
    assert not deadline.failed, "that the time is up is no failure"
    report.failed = True
    deadline.pytest_runtest_logreport(report)
    assert deadline.failed
    deadline.pytest_runtest_logfinish(items[0].nodeid)
    assert deadline.left == {"tests/test_a.py": 1}
