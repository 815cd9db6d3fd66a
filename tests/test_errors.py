"""One text is not the many letters that Python would make of it, wherever several are meant."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_lens import HookedMoE
from moe_lens.errors import InputError, near_miss, several
from moe_lens.interventions import LogitDifference, patch
from moe_lens.resampling import halves
from moe_lens.stats.sums import BySource
from moe_lens.studies.collect_activations import collect


def model() -> HookedMoE:
    return HookedMoE.from_pretrained("tiny-deepseekmoe")


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: several("ab", "texts"), "texts"),
        (lambda: several(b"ab", "texts"), "texts"),
        (lambda: BySource().add(torch.zeros(2, 1), "ab"), "sources"),
        (lambda: halves("ab"), "sources"),
        (lambda: collect(model(), {"d": ["a text", "another"]}, "unused", hooks="blocks.3.hook_resid_mid"), "hooks"),
        (lambda: patch(model(), "a b", "a c", "expert_weighted", LogitDifference(1, 2), over="layer"), "over"),
    ],
)
@pytest.mark.untyped
def test_one_text_is_refused(call: Callable[[], Any], what: str) -> None:
    with pytest.raises(InputError, match=f"{what}.*expected several.*list"):
        call()


def test_several_are_handed_on_as_they_are() -> None:
    texts = ["ab"]
    assert several(texts, "texts") is texts


def test_what_came_is_not_what_was_meant():
    assert near_miss("german", ["german", "french"]) == ""
    assert near_miss("German", ["german", "french"]) == near_miss("germn", ["german"]) == "; did you mean 'german'?"
