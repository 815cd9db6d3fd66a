"""Which experts, ranks, layers and positions: all that `Selection` accepts, and what it refuses."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.errors import InputError
from moe_lens.selection import Selection, Step
from tests.wrapped import wrapped

INDICES = torch.tensor([[[4, 1, 7], [0, 4, 2]], [[5, 6, 4], [3, 2, 1]]])


def test_experts_come_as_a_mapping_or_as_pairs() -> None:
    mapping = Selection(experts={2: [4, 1, 4], 1: {0}})
    pairs = Selection(experts=[(2, 1), (1, 0), (2, 4)])
    assert mapping.by_layer == pairs.by_layer == {1: (0,), 2: (1, 4)}
    assert list(mapping.by_layer or ()) == [1, 2]
    expected = torch.tensor([[[True, True, False], [False, True, False]], [[False, False, True], [False, False, True]]])
    assert torch.equal(mapping.slots(2, INDICES), expected)
    assert not mapping.slots(5, INDICES).any(), "a layer that is not named"


def test_ranks_are_places_among_slots() -> None:
    chosen = Selection(ranks=[2, 0], layers=[1]).slots(1, INDICES)
    assert chosen[..., [0, 2]].all() and not chosen[..., 1].any()
    assert not Selection(ranks=[0], layers=[1]).slots(2, INDICES).any()
    assert Selection().slots(2, INDICES).all(), "nothing said: every expert"
    assert not Selection(shared=True).slots(2, INDICES).any(), "the shared ones alone"
    assert Selection(shared=True, ranks=[0]).slots(2, INDICES).any()


def test_positions_narrow_slots() -> None:
    at = torch.tensor([[True, False], [False, True]])
    chosen = Selection(experts={1: [4, 1]}).slots(1, INDICES, at)
    assert chosen.nonzero().tolist() == [[0, 0, 0], [0, 0, 1], [1, 1, 2]]


@given(
    offset=st.integers(0, 3),
    pos=st.integers(1, 5),
    padding=st.lists(st.integers(0, 3), min_size=2, max_size=2),
    left=st.booleans(),
    wanted=st.sets(st.integers(-4, 8), min_size=1),
)
def test_positions_count_real_tokens_and_the_cache(
    offset: int, pos: int, padding: list[int], left: bool, wanted: set[int]
) -> None:
    """Against a loop over the texts."""
    total = offset + pos
    padding = [min(n, total - 1) for n in padding]
    rows = [[0] * n + [1] * (total - n) if left else [1] * (total - n) + [0] * n for n in padding]
    step = Step(2, pos, seen=torch.tensor(rows).bool(), offset=offset)
    expected = []
    for row in rows:
        place, of_row = -1, []
        for column, real in enumerate(row):
            place += real
            from_end = -sum(row[column:])
            of_row.append(bool(real) and (place in wanted or from_end in wanted))
        expected.append(of_row[offset:])
    assert Selection(where=wanted).positions(step).tolist() == expected
    low, high = max(min(wanted), 0), max(*wanted, 0) + 1
    inside = Selection(where=range(low, high)).positions(step)
    assert torch.equal(Selection(where=slice(low, high)).positions(step), inside)


@given(
    length=st.integers(1, 9),
    padding=st.integers(0, 3),
    left=st.booleans(),
    start=st.none() | st.integers(-12, 12),
    stop=st.none() | st.integers(-12, 12),
    by=st.none() | st.integers(1, 4),
)
def test_a_slice_takes_what_python_s_takes_of_a_text(
    length: int, padding: int, left: bool, start: int | None, stop: int | None, by: int | None
) -> None:
    real = [False] * padding + [True] * length if left else [True] * length + [False] * padding
    taken = Selection(where=slice(start, stop, by)).positions(Step(1, len(real), seen=torch.tensor([real])))
    assert taken[0, torch.tensor(real)].nonzero()[:, 0].tolist() == list(range(length))[start:stop:by]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, [True] * 4),
        (2, [False, False, True, False]),
        (slice(1, None), [False, True, True, True]),
        (slice(None, None, 2), [True, False, True, False]),
        (range(0, 4, 3), [True, False, False, True]),
        (-1, [False, False, False, True]),
        ([0, -2], [True, False, True, False]),
        (slice(-3, None), [False, True, True, True]),
        (slice(-4, -1, 2), [True, False, True, False]),
        (slice(1, -1), [False, True, True, False]),
        (torch.tensor([0, 1]), [True, True, False, False]),
        (np.arange(2), [True, True, False, False]),
        (frozenset({0, 1}), [True, True, False, False]),
        ({0: "a", 1: "b"}.keys(), [True, True, False, False]),
        (np.array([[True, False, False, True]]), [True, False, False, True]),
        (torch.tensor([[True, False, False, True]]), [True, False, False, True]),
        (lambda tokens: tokens > 5, [False, True, False, True]),
    ],
    ids=[
        "all",
        "one",
        "slice",
        "every other",
        "range",
        "last",
        "first and last but one",
        "last three",
        "from the end",
        "but the ends",
        "tensor",
        "array",
        "set",
        "keys",
        "array mask",
        "mask",
        "predicate",
    ],
)
def test_where(where: Any, expected: list[bool]) -> None:
    step = Step(1, 4, tokens=torch.tensor([[5, 6, 5, 9]]))
    assert Selection(where=where).positions(step)[0].tolist() == expected


def test_a_mask_ends_with_the_prompt() -> None:
    mask = torch.tensor([[False, True, True]])
    assert Selection(where=mask).positions(Step(1, 2, offset=2)).tolist() == [[True, False]]
    assert not Selection(where=mask).positions(Step(1, 1, offset=3)).any()


def test_padding_is_never_meant() -> None:
    seen = torch.tensor([[False, True, True]])
    step = Step(1, 3, tokens=torch.tensor([[0, 7, 8]]), seen=seen)
    for where in (None, torch.ones(1, 3, dtype=torch.bool), lambda tokens: tokens >= 0):
        assert torch.equal(Selection(where=where).positions(step), seen)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"experts": {1: [0]}, "ranks": [0]}, "expected one of them"),
        ({"experts": {1: [0]}, "layers": [1]}, "experts name their layers"),
        ({"experts": {}}, "experts is {}; expected {layer: [expert, …]}"),
        ({"experts": [3, 4]}, "expected {layer: [expert, …]} or [(layer, expert), …]"),
        ({"experts": {1: [-1]}}, "experts of layer 1: got -1; expected whole numbers from 0"),
        ({"ranks": []}, "ranks: got []; expected whole numbers from 0"),
        ({"ranks": [0.5]}, "ranks: got [0.5]; expected whole numbers"),
        ({"layers": [True]}, "layers: got [True]; expected whole numbers"),
        ({"where": slice(0, None, -1)}, "expected whole numbers, and a step of at least 1"),
        ({"where": slice(0, 4, 0)}, "a step of at least 1"),
        ({"ranks": 0}, "ranks: got 0; expected whole numbers from 0, in a list that is not empty"),
        ({"experts": [(1, 2, 3)]}, "expected {layer: [expert, …]} or [(layer, expert), …]"),
        ({"experts": "abc"}, "expected {layer: [expert, …]} or [(layer, expert), …]"),
        ({"where": torch.ones(3, dtype=torch.bool)}, "where is torch.bool of shape (3,); expected a mask of booleans"),
        ({"where": torch.ones(1, 3).long()}, "where is torch.int64 of shape (1, 3); expected a mask of booleans"),
        ({"where": torch.ones(1, 3)}, "where is torch.float32 of shape (1, 3); expected a mask of booleans"),
        ({"where": 1.5}, "where is 1.5; expected a whole number"),
        ({"where": [1.5]}, "where: got [1.5]; expected whole numbers from 0"),
        ({"where": "abc"}, "where: got 'abc'; expected whole numbers from 0"),
    ],
)
@pytest.mark.untyped
def test_what_cannot_be_chosen_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        Selection(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": [3]}, "there is no layer 3; the model has layers 0 to 2"),
        ({"layers": [0]}, "layer 0 is dense; the layers with experts are 1, 2"),
        ({"experts": {0: [1]}}, "layer 0 is dense; the layers with experts are 1, 2"),
        ({"experts": {2: [1, 8]}}, "there is no expert 8 in layer 2; it has experts 0 to 7"),
        ({"ranks": [0, 3]}, "there is no rank 3; the model has ranks 0 to 2"),
    ],
)
def test_what_a_model_does_not_have_is_named_with_the_valid_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        Selection(**options).check(wrapped("deepseek").model)


def test_dense_layers_where_they_will_do_and_shared_experts_where_there_are_some() -> None:
    assert Selection(layers=[0]).check(wrapped("deepseek").model, dense=True)
    assert Selection(shared=True).check(wrapped("deepseek").model)
    with pytest.raises(InputError, match="no shared experts"):
        Selection(shared=True).check(wrapped("mixtral").model)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        (torch.ones(2, 3, dtype=torch.bool), "where is a mask of shape (2, 3); expected (2, 4) [batch, pos]"),
        (lambda tokens: tokens, "where returned torch.int64 (2, 4); expected a tensor of booleans of shape (2, 4)"),
        (lambda tokens: tokens[:1] > 0, "where returned torch.bool (1, 4)"),
        (lambda tokens: True, "where returned bool"),
    ],
)
def test_masks_and_answers_of_another_shape_are_refused(where: Any, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        Selection(where=where).positions(Step(2, 4, tokens=torch.zeros(2, 4, dtype=torch.long)))


def test_a_predicate_needs_tokens_and_a_mask_its_batch() -> None:
    with pytest.raises(InputError, match="was not given tokens"):
        Selection(where=lambda tokens: tokens > 0).positions(Step(1, 2))
    with pytest.raises(InputError, match="a mask for a batch of 1; this one has 2"):
        Selection(where=torch.ones(1, 3, dtype=torch.bool)).positions(Step(2, 1, offset=3))


def test_without_padding_positions_go_on_from_the_cache() -> None:
    assert Selection(where=[5]).positions(Step(1, 2, offset=4)).tolist() == [[False, True]]
    assert Selection(where=slice(5, None)).positions(Step(1, 2, offset=4)).tolist() == [[False, True]]
    assert Step(1, 2, offset=4).places().tolist() == [[4, 5]]
