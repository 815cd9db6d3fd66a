"""Negative controls: each law notices what it is there for."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import names
from moe_lens.errors import SelfCheckError
from moe_lens.model.hooks.checked_point import CheckedPoint
from moe_lens.model.hooks.self_check import self_check
from tests.matrix.laws import LAWS, Case


def another_weight(case: Case) -> None:
    with torch.no_grad():
        experts = case.model._moe(case.layer).experts
        experts.down_proj.mul_(1.001)


def forgotten_factor(case: Case) -> None:
    case.model.blocks[case.layer].mlp.hooks.factors = dict


def wrong_row(**changes: Any) -> Callable[[Case], None]:
    def break_(case: Case) -> None:
        case.model.__dict__["family"] = replace(case.family, **changes)

    return break_


def dead_hook(case: Case) -> None:
    case.model.__dict__["_all_hooks"]["blocks.2.hook_dead"] = CheckedPoint()
    case.model.__dict__["_all_hooks"]["blocks.2.hook_dead"].name = "blocks.2.hook_dead"


def unconnected_stream(case: Case) -> None:
    case.model.blocks[case.layer].ln2.__dict__["residual_point"] = None


def rounded_hook(case: Case) -> None:
    hooks: Any = case.model.blocks[case.layer].mlp.hooks
    shown = hooks.over_tokens

    def over_tokens(name: str, value: Tensor) -> Tensor:
        rounds = hooks.has_listeners(name) and name != names.N_ACTIVE
        return shown(name, value * 1.0001 if rounds else value)

    hooks.over_tokens = over_tokens


def detached(case: Case) -> None:
    moe: Any = case.model._moe(case.layer)
    moe.experts.register_forward_pre_hook(lambda module, args: (*args[:2], args[2].detach()))


def rank_order(case: Case) -> None:
    case.model._experts(case.layer).total = lambda weighted, indices, dtype: weighted.flip(1).sum(1).to(dtype)


def unread_part(case: Case) -> None:
    layout = case.family.layout
    assert layout is not None
    case.model.__dict__["family"] = replace(case.family, layout=replace(layout, added=layout.added[:-1]))


def stretched_identities(case: Case) -> None:
    moe: Any = case.model._moe(case.layer)
    moe.experts.register_forward_pre_hook(lambda module, args: (args[0] * 1.001, *args[1:]))


def forgetful_cache(case: Case) -> None:
    case.generated = case.generated.flip(-1)


@pytest.mark.parametrize(
    ("law", "model_type", "broken"),
    [
        ("logits", "glm4_moe", another_weight),
        ("logits", "dbrx", rank_order),
        ("observing", "glm4_moe", dead_hook),
        ("observing", "glm4_moe", rounded_hook),
        ("observing", "gemma4_text", rounded_hook),
        ("parts", "granitemoeshared", forgotten_factor),
        ("parts", "laguna", forgotten_factor),
        ("parts", "muse_spark", wrong_row(widens=None)),
        ("parts", "llama4_text", wrong_row(weighs_input=False)),
        ("parts", "longcat_flash", unread_part),
        ("parts", "longcat_flash", stretched_identities),
        ("edits", "jetmoe", wrong_row(weighs_input=True)),
        ("rule", "longcat_flash", wrong_row(scaled=None)),
        ("rule", "laguna", wrong_row(scaled=None)),
        ("rule", "gemma4_text", wrong_row(scaled=None)),
        ("rule", "qwen3_next", wrong_row(normalised="never")),
        ("rule", "minimax_m2", wrong_row(score="softmax")),
        ("own values", "glm4_moe", rounded_hook),
        ("edits", "glm4_moe", unconnected_stream),
        ("edits", "glm4_moe", dead_hook),
        ("gradients", "glm4_moe", detached),
        ("generation", "glm4_moe", forgetful_cache),
        ("saving", "glm4_moe", another_weight),
    ],
)
def test_a_law_fails_where_it_is_broken(law: str, model_type: str, broken: Callable[[Case], None]) -> None:
    case = Case(model_type)
    broken(case)
    with pytest.raises(AssertionError):
        LAWS[law](case)


def test_the_self_check_notices_a_family_that_is_not_what_its_row_says() -> None:
    case = Case("granitemoe")
    forgotten_factor(case)
    with pytest.raises(SelfCheckError, match=f"layer {case.layer}: .* = mlp_out fails"):
        self_check(case.model)


def test_forced_experts_of_a_router_that_scales_before_it_scores_get_their_affinity_once() -> None:
    """Laguna bounds its logits: giving the router bounded ones again would bound them twice."""
    case = Case("laguna")
    name = names.mlp(names.EXPERT_INDICES, case.layer)
    turned = case.edited(name, lambda value: value.flip(-1))
    assert (turned - case.logits).abs().max() <= 1e-5 * case.logits.abs().max()
