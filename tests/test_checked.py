"""Arguments are held against their annotations at run time."""

from typing import Annotated, Literal

import pytest
import torch

from moe_lens import data, pruning
from moe_lens.checked import Natural, Positive, Within, argument_checks, checked
from moe_lens.errors import InputError
from moe_lens.hooked_moe import HookedMoE

pytestmark = pytest.mark.untyped


@checked
def example(
    word: Literal["layer", "global"],
    number: int | None = None,
    *,
    least: Positive = 1,
    share: Annotated[float, Within(0, 1)] = 0.5,
    words: list[Literal["a", "b"]] | None = None,
    either: int | Literal["all"] = 1,
) -> str:
    return f"{word} {number} {least} {share} {words} {either}"


def test_what_an_annotation_allows_passes() -> None:
    three = torch.tensor(3)
    assert example("layer", 2, least=4, share=0, words=["a"], either="all").startswith("layer 2 4 0 ['a'] all")
    assert example("global", None, share=1.0)
    assert example("global", three)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"word": "globl"}, "word is 'globl'; expected one of ('layer', 'global'); did you mean 'global'?"),
        ({"number": 1.5}, "number is 1.5; expected a whole number, or None"),
        ({"number": True}, "number is True; expected a whole number"),
        ({"least": 0}, "least is 0; expected a number from 1"),
        ({"least": 1.5}, "least is 1.5; expected a whole number from 1"),
        ({"share": 1.5}, "share is 1.5; expected a number from 0 to 1"),
        ({"share": float("nan")}, "share is nan"),
        ({"words": ["a", "c"]}, "expected one of ('a', 'b') in it, not 'c'"),
        ({"either": "al"}, "either is 'al'; expected a whole number, or 'all'"),
    ],
)
def test_all_else_is_refused(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(InputError) as error:
        example(**{"word": "layer", **arguments})
    assert says in str(error.value)


def test_public_functions_with_words_or_numbers_are_checked() -> None:
    for function in (data.tokenize, pruning.plan, HookedMoE.ablate, HookedMoE.keep_top, HookedMoE.run_with_cache):
        assert argument_checks(function) and function.__dict__["__checked__"], function
    assert argument_checks(lambda word: None) == []
    assert Natural is not Positive
