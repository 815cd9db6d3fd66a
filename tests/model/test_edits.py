"""Which hooks are on a model, said so that other hooks, and none, can be told from them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from moe_lens.errors import InputError
from moe_lens.model.hooks.edits import edits
from tests.wrapped import wrapped

MODEL: Any = wrapped("deepseek").model
PLACE = "blocks.2.hook_resid_post"


def hooked(function: Any) -> Any:
    return MODEL.hooks(fwd_hooks=[(PLACE, function)])


def scaled(by: float) -> Any:
    return lambda value, hook: value * by


EDITS: list[Callable[[], AbstractContextManager[Any]]] = [
    lambda: MODEL.ablate({2: [1]}),
    lambda: MODEL.ablate({2: [2]}),
    lambda: MODEL.ablate({2: [1]}, how="reroute"),
    lambda: MODEL.ablate({2: [1]}, how="resample", seed=1),
    lambda: MODEL.ablate({2: [1]}, how="resample", seed=2),
    lambda: MODEL.ablate({2: [1]}, where=[0]),
    lambda: MODEL.ablate({2: [1]}, where=lambda tokens: tokens == 3),
    lambda: MODEL.ablate({2: [1]}, where=lambda tokens: tokens == 4),
    lambda: MODEL.keep_top(1),
    lambda: MODEL.steer_experts({2: {1: 1.0}}),
    lambda: MODEL.steer_experts({2: {1: 2.0}}),
    lambda: hooked(scaled(1)),
    lambda: hooked(scaled(2)),
]


def test_every_edit_is_told_from_every_other_before_and_after_it_has_run() -> None:
    assert edits(MODEL) == []
    told = []
    for edit in EDITS:
        with edit():
            before = edits(MODEL)
            MODEL(torch.arange(6)[None])
            assert edits(MODEL) == before
        with edit():
            assert edits(MODEL) == before  # made anew
        told.append(tuple(before))
    assert len(set(told)) == len(EDITS) and edits(MODEL) == []
    with EDITS[0](), EDITS[8]():
        assert len(edits(MODEL)) == len(told[0]) + len(told[8])


def test_what_torch_calls_around_a_module_counts_too() -> None:
    handle = MODEL.original_model.get_submodule("model.layers.1").register_forward_hook(lambda *_: None)
    try:
        (line,) = edits(MODEL)
        assert line.startswith("module model.layers.1: ")
    finally:
        handle.remove()
    assert edits(MODEL) == []


def test_what_cannot_be_told_is_refused_or_named_alone() -> None:
    with open(__file__, encoding="utf-8") as file, hooked(lambda value, hook: file.name and None):  # noqa: PTH123
        with pytest.raises(InputError, match="at blocks.2.hook_.*forward holds something that cannot be noted"):
            edits(MODEL)
        (line,) = edits(MODEL, exactly=False)
        assert line.endswith("<lambda>")
