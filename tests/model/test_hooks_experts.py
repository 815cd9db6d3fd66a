"""Hooks of one expert: made on demand, with that expert's rows alone."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import names
from moe_lens.errors import MoELensError
from moe_lens.hooked_moe import HookedMoE
from tests.families import CONFIGS, build
from tests.wrapped import as_hook, deviation, on, untouched, wrapped

FP32 = 1e-5
families = pytest.mark.parametrize("family", CONFIGS)
ALL_EXPERTS = {
    "hook_pre": names.EXPERT_PRE,
    "hook_pre_linear": names.EXPERT_PRE_LINEAR,
    "hook_post": names.EXPERT_POST,
    "hook_out": names.EXPERT_OUT,
}


def rows(seen: dict[str, Any], name: str) -> Any:
    def keep(value: Tensor, hook: Any) -> None:
        seen[name] = value.clone(), {key: hook.ctx[key].clone() for key in ("batch", "pos", "rank")}

    return keep


@families
def test_the_rows_of_an_expert_are_its_slots_of_the_whole(family: str) -> None:
    case = wrapped(family)
    layer = case.last
    seen: dict[str, Any] = {}
    every = [names.expert(one, layer, e) for e in range(8) for one in ALL_EXPERTS]
    whole_names = [names.mlp(n, layer) for n in (*ALL_EXPERTS.values(), names.EXPERT_INDICES)]
    with untouched(case.model), torch.no_grad(), case.model.hooks([(name, rows(seen, name)) for name in every]):
        logits, cache = case.model.run_with_cache(case.tokens, names_filter=whole_names)
    assert torch.equal(logits, case.logits)
    indices = cache[names.mlp(names.EXPERT_INDICES, layer)]
    for e in range(8):
        for one, whole in ALL_EXPERTS.items():
            value, ctx = seen[names.expert(one, layer, e)]
            at = (ctx["batch"], ctx["pos"], ctx["rank"])
            assert torch.equal(value, cache[names.mlp(whole, layer)][at])
            assert (indices[at] == e).all()
            assert len(value) == (indices == e).sum()
    assert sum(len(seen[names.expert("hook_out", layer, e)][0]) for e in range(8)) == indices.numel()


@families
@pytest.mark.parametrize("one", ALL_EXPERTS)
def test_an_edit_of_one_expert_is_that_edit_of_its_slots(family: str, one: str) -> None:
    case = wrapped(family)
    expert = int(case.model.routing(case.tokens).indices[-1].flatten().mode().values)
    name = names.expert(one, case.last, expert)
    plain_indices = names.mlp(names.EXPERT_INDICES, case.last)

    def change(value: Tensor) -> Tensor:
        return value * 1.5 + 0.2

    def change_slots(value: Tensor) -> Tensor:
        chosen = (case.plain.values[plain_indices] == expert)[..., None]
        return torch.where(chosen, change(value), value)

    theirs = case.plain(case.tokens, on(names.mlp(ALL_EXPERTS[one], case.last), change_slots))
    with untouched(case.model), torch.no_grad():
        ours = case.model.run_with_hooks(case.tokens, fwd_hooks=[(name, as_hook(change))])
        in_place = case.model.run_with_hooks(
            case.tokens, fwd_hooks=[(name, as_hook(lambda value: (value.mul_(1.5).add_(0.2), None)[1]))]
        )
    assert deviation(ours, theirs) <= FP32 * theirs.abs().max().item()
    assert deviation(ours, case.logits) > 1e-3
    assert torch.equal(in_place, ours)


def test_two_experts_edited_together_are_both_edited() -> None:
    case = wrapped("deepseek")
    indices = case.model.routing(case.tokens).indices[0]
    pair = [int(e) for e in indices.flatten().unique()[:2]]
    mask = torch.isin(indices, torch.tensor(pair))[..., None]
    own: list[Any] = [(names.expert("hook_out", 1, e), as_hook(torch.zeros_like)) for e in pair]
    with untouched(case.model), torch.no_grad():
        ours = case.model.run_with_hooks(case.tokens, fwd_hooks=own)
        theirs = case.model.run_with_hooks(
            case.tokens, fwd_hooks=[("blocks.1.hook_expert_out", as_hook(lambda value: value.masked_fill(mask, 0.0)))]
        )
        one = case.model.run_with_hooks(case.tokens, fwd_hooks=own[:1])
    assert torch.equal(ours, theirs)
    assert not torch.equal(one, theirs)


def test_the_whole_sees_what_one_expert_became_at_every_stage() -> None:
    """`expert_post` and the others are what the model computes with, edits of single experts included."""
    case = wrapped("deepseek")
    indices = case.model.routing(case.tokens).indices[0]
    expert = int(indices.flatten().mode().values)
    for one, whole in ALL_EXPERTS.items():
        own = [(names.expert(one, 1, expert), as_hook(torch.zeros_like))]
        with untouched(case.model), torch.no_grad(), case.model.hooks(own):
            _, cache = case.model.run_with_cache(case.tokens, names_filter=names.mlp(whole, 1))
        value = cache[names.mlp(whole, 1)]
        assert (value[indices == expert] == 0).all(), whole
        assert (value[indices != expert] != 0).any(), whole


@families
def test_an_expert_without_tokens_sees_no_rows(family: str) -> None:
    case = wrapped(family)
    one_token = case.tokens[:1, :1]
    idle = next(e for e in range(8) if e not in case.model.routing(one_token).indices[-1])
    seen: dict[str, Any] = {}
    every = [names.expert(one, case.last, idle) for one in ALL_EXPERTS]
    with untouched(case.model), torch.no_grad():
        plain = case.model(one_token)
        hooks: list[Any] = [(name, rows(seen, name)) for name in every]
        hooks += [(name, as_hook(lambda value: value + 1)) for name in every]
        assert torch.equal(case.model.run_with_hooks(one_token, fwd_hooks=hooks), plain)
    config: Any = case.hf.config
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    assert [tuple(seen[name][0].shape) for name in every] == [(0, width)] * 3 + [(0, config.hidden_size)]


def test_hooks_of_single_experts_are_made_on_demand() -> None:
    model = HookedMoE.from_hf(build("deepseek"), check=False)
    before = set(model.hook_dict)
    with torch.no_grad():
        model.run_with_cache(torch.tensor([[5, 6]]), names_filter="blocks.2.mlp.experts.3.hook_out")
    made = {names.expert(one, 2, 3) for one in ALL_EXPERTS}
    assert set(model.hook_dict) - before == made, "one expert's, and nobody else's"
    assert set(model.expert_hooks(1, 7)) == {names.expert(one, 1, 7) for one in ALL_EXPERTS}
    name = "blocks.2.mlp.experts.3.hook_out"
    assert model.expert_hooks(2, 3)[name] is model.hook_dict[name]
    with torch.no_grad():  # a predicate sees those that exist
        _, cache = model.run_with_cache(torch.tensor([[5, 6]]), names_filter=lambda name: ".experts." in name)
    assert {name for name in cache.keys() if "shared" not in name} == made | set(model.expert_hooks(1, 7))  # noqa: SIM118


@pytest.mark.parametrize(
    ("layer", "expert", "says"),
    [
        (0, 3, "layer 0 has no experts; MoE layers are [1, 2]"),
        (1, 8, "expected 0 to 7"),
        (1, -1, "expert is -1; expected a whole number from 0"),
    ],
)
def test_hooks_of_experts_that_do_not_exist_are_refused(layer: int, expert: int, says: str) -> None:
    with pytest.raises(MoELensError, match=re.escape(says)):
        wrapped("deepseek").model.expert_hooks(layer, expert)


def test_a_slice_of_positions_cuts_an_expert_s_rows() -> None:
    case = wrapped("deepseek")
    name = names.expert("hook_out", 1, int(case.model.routing(case.tokens).indices[0].flatten().mode().values))
    seen: dict[str, Any] = {}
    with torch.no_grad():
        case.model.run_with_hooks(case.tokens, fwd_hooks=[(name, rows(seen, name))])
        _, cache = case.model.run_with_cache(case.tokens, names_filter=name, pos_slice=(3, 9))
    value, ctx = seen[name]
    inside = (ctx["pos"] >= 3) & (ctx["pos"] < 9)
    assert 0 < inside.sum() < len(inside)
    assert torch.equal(cache[name], value[inside])


def test_gradients_of_one_expert_are_those_of_its_slots() -> None:
    case = wrapped("deepseek")
    expert = int(case.model.routing(case.tokens).indices[0].flatten().mode().values)
    one, whole = names.expert("hook_out", 1, expert), "blocks.1.mlp.hook_expert_out"
    seen: dict[str, Any] = {}
    with untouched(case.model):
        case.model.run_with_hooks(case.tokens, fwd_hooks=[(one, rows(seen, one))])
        _, single = case.model.run_with_cache(case.tokens, names_filter=one, incl_bwd=True, return_type="loss")
        _, cache = case.model.run_with_cache(case.tokens, names_filter=whole, incl_bwd=True, return_type="loss")
    case.model.zero_grad()
    ctx = seen[one][1]
    expected = cache[f"{whole}_grad"][ctx["batch"], ctx["pos"], ctx["rank"]]
    assert expected.abs().max() > 1e-6
    assert deviation(single[f"{one}_grad"], expected) <= 1e-5 * expected.abs().max().item()
