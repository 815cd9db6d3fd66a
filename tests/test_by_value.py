"""Digests of values: alike for what is alike, in another process too, and different for what differs."""

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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


def test_circles_end() -> None:
    circle: list[Any] = [1]
    circle.append(circle)
    assert digest_of(circle) == digest_of(circle) != digest_of([1])


def test_what_has_no_value_is_refused() -> None:
    with open(__file__, encoding="utf-8") as file, pytest.raises(InputError, match="a TextIOWrapper has no value"):  # noqa: PTH123
        digest_of(scaled(file))


def test_of_this_package_s_functions_what_they_have_seen_does_not_count() -> None:
    from moe_lens.pruning.preview import _fewer
    from tests.wrapped import wrapped

    case = wrapped("deepseek")
    (_, note), *_ = _fewer(case.model, 2, 1)
    before = digest_of(note)
    with case.model.hooks(fwd_hooks=[("blocks.2.mlp.hook_expert_indices", note)]):
        case.model(case.tokens)
    assert digest_of(note) == before != digest_of(_fewer(case.model, 2, 2)[0][1])
