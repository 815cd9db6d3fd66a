"""Digests of values: alike for what is alike, in another process too, and different for what differs."""

import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from moe_lens.by_value import digest_of
from moe_lens.errors import InputError
from moe_lens.selection import Selection

ROOT = Path(__file__).parents[1]


def scaled(by: Any) -> Any:
    return lambda value, hook: value * by


def shifted(by: Any) -> Any:
    return lambda value, hook: value + by


class Counter:
    def __init__(self, start: int):
        self.start = start

    def __call__(self, value: Any, hook: Any) -> None: ...

    def see(self, value: Any, hook: Any) -> None: ...


def linear(weight: float) -> torch.nn.Module:
    made = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.constant_(made.weight, weight)
    return made


ALIKE: list[Callable[[], Any]] = [
    lambda: 3,
    lambda: True,
    lambda: 1.0,
    lambda: "3",
    lambda: (1, 2),
    lambda: (2, 1),
    lambda: {1: [2]},
    lambda: {"a", "b", "c"},
    lambda: torch.arange(3),
    lambda: torch.arange(3).float(),
    lambda: torch.arange(3).bfloat16(),
    lambda: torch.arange(6).view(3, 2)[:, 0],
    lambda: np.arange(4),
    lambda: scaled(2.0),
    lambda: scaled(3.0),
    lambda: scaled(torch.ones(2)),
    lambda: scaled(torch.zeros(2)),
    lambda: shifted(2.0),
    lambda: functools.partial(scaled(2.0), hook=None),
    lambda: Counter(1),
    lambda: Counter(2),
    lambda: Counter(1).see,
    lambda: torch.Generator().manual_seed(1),
    lambda: torch.Generator().manual_seed(2),
    lambda: Selection(experts={2: [3]}),
    lambda: Selection(experts={2: [4]}),
    lambda: linear(1.0),
    lambda: linear(2.0),
]


def test_what_is_made_alike_is_alike_and_all_else_differs() -> None:
    found = [digest_of(make()) for make in ALIKE]
    assert found == [digest_of(make()) for make in ALIKE]
    assert len(set(found)) == len(ALIKE)


def test_another_process_finds_the_same() -> None:
    here = [digest_of(make()) for make in ALIKE]
    code = "from tests.test_by_value import ALIKE, digest_of; print(*[digest_of(make()) for make in ALIKE])"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert there.stdout.split() == here


TEXTS: list[str] = []
TABLE: Any = None
PATTERN = re.compile("a")
other_module: Any = None


def helper() -> list[str]:
    return TEXTS


def from_outside() -> Any:
    return [helper() for _ in range(2)], TABLE, PATTERN, other_module.rows, np.mean


class Reader:
    def __init__(self, texts: Any):
        self._texts = texts

    def __call__(self) -> Any:
        return iter(self._texts)

    def read(self) -> Any:
        return iter(self._texts)


@pytest.mark.parametrize("pickled", [True, False])
def test_what_a_function_reads_by_name_counts(monkeypatch: pytest.MonkeyPatch, pickled: bool, tmp_path: Path) -> None:
    """As all does in a notebook: lists, tables, other functions, what one's own modules hold; not what libraries do."""
    (tmp_path / "other_module.py").write_text("rows, unread = [1], [1]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    other = importlib.import_module("other_module")
    monkeypatch.setattr(sys.modules[__name__], "other_module", other)

    def digest() -> str:
        return digest_of(from_outside, pickled=pickled)

    found = [digest()]
    changes: list[tuple[Any, str, Any]] = [
        (sys.modules[__name__], "TEXTS", ["one"]),
        (sys.modules[__name__], "TABLE", pd.DataFrame({"text": ["one"]})),
        (sys.modules[__name__], "TABLE", pd.DataFrame({"text": ["two"]})),
        (sys.modules[__name__], "TABLE", {"a": [1]}),
        (sys.modules[__name__], "TABLE", Reader(["one"])),
        (sys.modules[__name__], "TABLE", Reader(["two"])),
        (sys.modules[__name__], "TABLE", np.array(["one"])),
        (sys.modules[__name__], "TABLE", np.array(["one", None], dtype=object)),
        (sys.modules[__name__], "PATTERN", re.compile("b")),
        (sys.modules[__name__], "helper", lambda: TEXTS[:1]),
        (other, "rows", [2]),
    ]
    for module, name, value in changes:
        monkeypatch.setattr(module, name, value)
        found.append(digest())
    assert len(set(found)) == len(found)
    monkeypatch.setattr(other, "unread", [2])
    with open(__file__, encoding="utf-8") as file:  # noqa: PTH123
        monkeypatch.setattr(sys.modules[__name__], "TABLE", file)  # nobody has handed it over: it is not refused
        assert digest() == digest() != found[-1]


@pytest.mark.parametrize("read", [lambda reader: reader, lambda reader: reader.read])
def test_what_a_reader_holds_counts(read: Callable[[Any], Any]) -> None:
    for pickled in (False, True):
        one, same, other = (digest_of(read(Reader(texts)), pickled=pickled) for texts in (["a"], ["a"], ["b"]))
        assert one == same != other


def test_the_code_of_ones_own_classes_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest_of(Reader(["a"]), pickled=False)
    monkeypatch.setattr(Reader, "read", lambda self: iter(self._texts[:1]))
    assert digest_of(Reader(["a"]), pickled=False) != before


def test_circles_end() -> None:
    circle: list[Any] = [1]
    circle.append(circle)
    assert digest_of(circle) == digest_of(circle) != digest_of([1])


def test_what_has_no_value_is_refused() -> None:
    with open(__file__, encoding="utf-8") as file, pytest.raises(InputError, match="a TextIOWrapper has no value"):  # noqa: PTH123
        digest_of(scaled(file))


def test_of_this_package_s_functions_what_they_have_seen_does_not_count() -> None:
    def noting(what: int) -> Callable[..., None]:
        seen: list[int] = []

        def note(value: Any, hook: Any) -> None:  # noqa: ARG001
            seen.append(what)

        return note

    for module, alike in (("moe_lens.pruning.preview", True), (__name__, False)):
        note = noting(1)
        note.__module__ = module
        before = digest_of(note)
        note(None, None)
        assert (digest_of(note) == before) is alike
        other = noting(2)
        other.__module__ = module
        assert digest_of(other) != before
