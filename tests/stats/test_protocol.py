"""What every accumulator promises: merging in any order and grouping, saving and resuming, refusing what is not its."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens.errors import InputError
from moe_lens.stats import (
    Accumulator,
    ActivationMeans,
    ImportanceStats,
    LossStats,
    Means,
    OutputSimilarityStats,
    PairStats,
    PassageSample,
    RoutingStats,
    SimilarityStats,
    TopExamples,
    VocabularyStats,
)
from tests.stats.routed import random_batch

SIZE = (1, 3), 5, 2
"""Layers, experts, active experts."""

KINDS: dict[str, Callable[[], Accumulator[Any]]] = {
    "routing": lambda: RoutingStats(*SIZE),
    "pairs": lambda: PairStats(*SIZE),
    "loss": LossStats,
    "vocabulary": lambda: VocabularyStats(*SIZE, 7),
    "next token": lambda: VocabularyStats(*SIZE, 7, by="next", groups=3),
    "passages": lambda: PassageSample(*SIZE, length=1, n=6),
    "examples": lambda: TopExamples(5, 2, before=1, after=1),
    "importance": lambda: ImportanceStats([4], 5),
    "outputs": lambda: OutputSimilarityStats([4], 5),
    "similarity": lambda: SimilarityStats([4]),
    "means": lambda: ActivationMeans([4], 5, 2, 3),
}


def update(name: str, stats: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch = random_batch(generator, width=4)
    draw = partial(torch.randn, generator=generator)
    resid, outputs = draw(*batch.mask.shape, 3), draw(*batch.mask.shape, 2, 3)
    chosen = batch.routing.layer(1)
    if name == "loss":
        stats.update(torch.rand(batch.mask.shape, generator=generator), batch.mask, batch.sources)
    elif name == "examples":
        stats.update_routing(batch, 3)
    elif name == "importance" or name == "means":
        stats.update(4, resid, outputs, chosen.weights, chosen.indices, batch.mask)
    elif name == "outputs":
        stats.update(4, draw(6, 5, 3))
    elif name == "similarity":
        stats.update(4, resid, outputs, batch.mask, batch.sources, [CENTRE] * len(batch.sources))
    else:
        stats.update(batch)


CENTRE = Means((4,), torch.zeros(1, 3), torch.zeros(1, 2, 3), torch.zeros(1, 5, 3), torch.ones(1, 5).long(), 1)


def same(ours: Any, theirs: Any) -> None:
    """Equal results: whole numbers exactly, others to the rounding of float64 sums."""
    for field in fields(ours):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(a, Tensor) and a.dtype.is_floating_point:
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True), field.name
        elif isinstance(a, Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), field.name
        else:
            assert a == b, field.name


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_merging_in_any_order_and_grouping_gives_the_whole(name, seed, data):
    whole = KINDS[name]()
    parts = []
    for i in range(data.draw(st.integers(2, 5), "batches")):
        update(name, whole, seed + i)
        part = KINDS[name]()
        update(name, part, seed + i)
        parts.append(part)
    if data.draw(st.booleans(), "with an empty one"):
        parts.append(KINDS[name]())
    while len(parts) > 1:
        left = parts.pop(data.draw(st.integers(0, len(parts) - 1), "left"))
        right = parts.pop(data.draw(st.integers(0, len(parts) - 1), "right"))
        parts.append(left.merge(right))
    same(parts[0].result(), whole.result())


@pytest.mark.typed
@pytest.mark.parametrize("name", KINDS)
def test_state_can_be_saved_and_resumed(name, tmp_path):
    whole, first = KINDS[name](), KINDS[name]()
    for i in range(4):
        update(name, whole, i)
    update(name, first, 0)
    update(name, first, 1)
    state = first.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    kept = {key: value.clone() for key, value in state.items()}
    resumed = KINDS[name]().load_state_dict(state)
    for i in (2, 3):
        update(name, resumed, i)
    same(resumed.result(), whole.result())
    assert all(torch.equal(state[key], kept[key]) for key in kept)  # going on changes no saved state
    assert (
        KINDS[name]().load_state_dict(KINDS[name]().state_dict()).state_dict().keys()
        == KINDS[name]().state_dict().keys()
    )
    result = whole.result()
    result.save(tmp_path / "result.safetensors")
    same(type(result).load(tmp_path / "result.safetensors"), result)
    assert len(result.to_frame())


@pytest.mark.typed
@pytest.mark.parametrize("name", KINDS)
def test_merging_leaves_the_other_alone(name):
    mine, other = KINDS[name](), KINDS[name]()
    update(name, mine, 0)
    update(name, other, 1)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    mine.merge(other)
    update(name, mine, 2)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


@pytest.mark.parametrize("name", KINDS)
def test_nothing_counted_is_an_error(name):
    with pytest.raises(InputError, match="no tokens were counted"):
        KINDS[name]().result()


def test_what_counts_something_else_is_refused():
    with pytest.raises(InputError, match="cannot merge it with .* n_experts is 5 here and 6 there"):
        RoutingStats(*SIZE).merge(RoutingStats((1, 3), 6, 2))
    with pytest.raises(InputError, match="cannot load the state of .* kind is RoutingStats here and PairStats there"):
        RoutingStats(*SIZE).load_state_dict(PairStats(*SIZE).state_dict())


def test_one_process_alone_may_reduce_as_often_as_it_likes():
    stats = RoutingStats(*SIZE)
    update("routing", stats, 0)
    before = stats.result()
    same(stats.all_reduce().all_reduce().result(), before)
