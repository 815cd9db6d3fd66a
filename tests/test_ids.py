"""Numbers and masks that name experts, ranks, layers and positions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moe_lens import HookedMoE, PartialSum, Selection
from moe_lens.errors import InputError, MoELensError
from moe_lens.ids import as_mask, ids, one_id
from moe_lens.interventions import KLDivergence, Loss
from moe_lens.routing import Routing
from moe_lens.stats import RoutedBatch
from tests.wrapped import wrapped

pytestmark = pytest.mark.untyped

MASK = torch.tensor([False, False, True, False, True, False, False, False])


def ablated(model: HookedMoE, tokens: torch.Tensor, experts: Any) -> torch.Tensor:
    with torch.no_grad(), model.ablate({1: experts}):
        return model(tokens)


@pytest.mark.parametrize(
    "values",
    [[4, 2], {2, 4}, range(2, 5, 2), np.array([2, 4]), torch.tensor([4, 2]), [np.int64(2), torch.tensor(4)], MASK,
     MASK.numpy()],
)  # fmt: skip
def test_every_way_of_writing_names_the_same(values: Any) -> None:
    assert ids("experts", values) == (2, 4)
    assert Selection(ranks=values).ranks == PartialSum(ranks=values).ranks == (2, 4)


@pytest.mark.parametrize(
    "values",
    [[True, False], [2, True], [np.bool_(True)], [torch.tensor(True)], [1.0], torch.tensor([1.0]), np.array([0.5]),
     [-1], torch.tensor([-1]), torch.tensor([1, 1]), MASK[None], ~(MASK | True), "12", 3, None, [None], ["1"],
     {1: 0.5}, [], torch.tensor([], dtype=torch.long)],
    ids=repr,
)  # fmt: skip
def test_all_else_is_refused(values: Any) -> None:
    with pytest.raises(InputError, match="experts: got"):
        ids("experts", values)
    with pytest.raises(InputError):
        Selection(experts={1: values})


def test_a_mask_of_experts_means_those_experts() -> None:
    case = wrapped("mixtral")
    n = case.model.n_experts
    mask = torch.zeros(n, dtype=torch.bool)
    mask[[0, n - 1]] = True
    by_number = ablated(case.model, case.tokens, [0, n - 1])
    for written in (mask, mask.numpy()):
        assert torch.equal(ablated(case.model, case.tokens, written), by_number)
    # What a mask was read as: experts 0 and 1, whatever it says.
    assert not torch.equal(ablated(case.model, case.tokens, [0, 1]), by_number)


@pytest.mark.parametrize("length", [-1, 1])
def test_a_mask_of_another_length_is_refused(length: int) -> None:
    case = wrapped("mixtral")
    n = case.model.n_experts + length
    mask = torch.zeros(n, dtype=torch.bool)
    mask[0] = True
    with pytest.raises(InputError, match=f"got a mask of {n}; expected one of {case.model.n_experts}"):
        case.model.ablate({1: mask})


@pytest.mark.parametrize(
    "value", [True, np.bool_(False), torch.tensor(True), 1.0, 1.5, -1, 8, "1", None, [1]], ids=repr
)
def test_one_number_is_a_whole_number_from_0(value: Any) -> None:
    assert one_id("expert", np.int64(7), 8) == one_id("expert", torch.tensor(7), 8) == 7
    with pytest.raises(InputError, match="expert: got"):
        one_id("expert", value, 8)


@pytest.mark.parametrize("expert", [-1, True, 1.5, 10**6], ids=repr)
def test_parameters_of_an_expert_are_asked_for_by_its_number(expert: Any) -> None:
    model = wrapped("mixtral").model
    with pytest.raises(MoELensError, match="expert"):
        model.W_in[1, expert]


def test_parameters_of_several_experts_come_in_the_order_asked_for() -> None:
    weights = wrapped("mixtral").model.W_in
    mask = torch.zeros(len(weights[1]), dtype=torch.bool)
    mask[[1, 3]] = True
    assert torch.equal(weights[1, [3, 1]], torch.stack([weights[1, 3], weights[1, 1]]))
    assert torch.equal(weights[1, mask], weights[1][1:4:2])
    assert not torch.equal(weights[1, [3, 1]], weights[1, mask])


ADDED = torch.tensor([[-1e4, 0.0, 0.0], [0.0, 0.0, 0.0]])


@pytest.mark.typed
def test_a_mask_is_of_booleans_or_of_ones_and_zeros() -> None:
    expected = torch.tensor([[False, True, True]])
    for kind in (torch.bool, torch.long, torch.float32):
        assert torch.equal(as_mask("mask", expected.to(kind)), expected)
    assert as_mask("mask", ADDED.to("meta")).is_meta


@pytest.mark.parametrize("mask", [ADDED, torch.arange(6).view(2, 3)], ids=["added to scores", "numbers"])
def test_a_mask_of_other_numbers_is_refused_wherever_one_is_taken(mask: torch.Tensor) -> None:
    text, logits = torch.ones(2, 3, dtype=torch.long), torch.zeros(2, 3, 5)
    choice = torch.arange(2).expand(1, 2, 3, 2)
    calls: list[Callable[[], Any]] = [
        lambda: Loss(text, mask=mask),
        lambda: Loss(text, counted=mask),
        lambda: KLDivergence(logits, mask=mask),
        lambda: Routing.from_arrays(choice, choice.float(), 8, mask=mask),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"(mask|counted) holds other numbers than 1 \(a real token\)"):
            call()


@pytest.mark.parametrize("tokens", [[True, 1], torch.ones(1, 3, dtype=torch.bool), [0.5]], ids=str)
def test_tokens_that_do_not_count_are_told_by_their_ids(tokens: Any) -> None:
    choice = torch.arange(2).expand(1, 1, 3, 2)
    batch = RoutedBatch(routing=Routing.from_arrays(choice, choice.float(), 8), tokens=torch.tensor([[5, 1, 7]]))
    assert batch.without([1]).mask.tolist() == [[True, False, True]] and bool(batch.without([]).mask.all())
    with pytest.raises(InputError, match="tokens: got"):
        batch.without(tokens)
