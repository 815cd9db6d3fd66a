"""Gradients at hooks, and through experts and router."""

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import names
from moe_lens.errors import HookError, InputError
from tests.families import CONFIGS, build
from tests.wrapped import deviation, listening, untouched, wrapped

DISCRETE = (names.N_ACTIVE, names.EXPERT_INDICES, names.EXPERT_KEPT)

families = pytest.mark.parametrize("family", CONFIGS)
FP32 = 1e-4  # of the largest gradient of a hook: a backward pass sums in yet another order


def gradients(model: Any, ids: Tensor, wanted: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    with untouched(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, cache = model.run_with_cache(ids, names_filter=wanted, incl_bwd=True, return_type="loss")
    model.zero_grad()
    return loss.detach(), {name: cache[f"{name}_grad"] for name in wanted}


def of_first_layer(model: Any) -> list[str]:
    """Hooks of the first MoE layer that have a gradient."""
    layer = model.moe_layers[0]
    inside = [names.mlp(hook.name, layer) for hook in names.MLP_HOOKS if hook.name not in DISCRETE]
    return [
        *(name for name in inside if name in model.hook_dict),
        *(names.block(hook.name, layer) for hook in names.RESIDUAL_HOOKS),
    ]


@families
def test_gradients_at_hooks_are_those_of_an_added_zero(family: str) -> None:
    """d loss / d value by backward hooks, against autograd through an edit `value + 0` that needs a gradient."""
    case = wrapped(family)
    table = of_first_layer(case.model)
    plain = case.model(case.tokens, return_type="loss").detach()
    loss, found = gradients(case.model, case.tokens, table)
    assert torch.equal(loss, plain), "watching gradients changes nothing"
    for name in table:
        zeros: list[Tensor] = []

        def add(value: Tensor, hook: Any, zeros: list[Tensor] = zeros) -> Tensor:
            zeros.append(torch.zeros_like(value, requires_grad=True))
            return value + zeros[0]

        expected = torch.autograd.grad(
            case.model.run_with_hooks(case.tokens, fwd_hooks=[(name, add)], return_type="loss"), zeros
        )[0]
        assert expected.abs().max() > 1e-6, name
        assert deviation(found[name], expected) <= FP32 * expected.abs().max().item(), name


@families
def test_what_a_hook_function_keeps_has_the_gradient(family: str) -> None:
    """TransformerLens's habit: keep the activation, call `backward` on a loss of one's own, read `.grad`."""
    case = wrapped(family)
    table = of_first_layer(case.model)
    plain = case.model(case.tokens, return_type="loss")
    _, expected = gradients(case.model, case.tokens, table)
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        value.retain_grad()
        kept[name] = value

    for name in table:
        loss = case.model.run_with_hooks(case.tokens, fwd_hooks=[(name, keep)], return_type="loss")
        assert torch.equal(loss, plain), name
        loss.backward()
        case.model.zero_grad()
        gradient = kept[name].grad
        assert gradient is not None, name
        assert deviation(gradient, expected[name]) <= FP32 * expected[name].abs().max().item(), name


@families
def test_every_float_hook_has_a_gradient_at_once_and_nothing_warns(family: str) -> None:
    case = wrapped(family)
    with untouched(case.model), warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, cache = case.model.run_with_cache(
            case.tokens, names_filter=lambda name: name in case.exact, incl_bwd=True, return_type="loss"
        )
    case.model.zero_grad()
    assert torch.equal(loss, case.model(case.tokens, return_type="loss"))
    missing = {
        name for name in case.exact if cache[name].is_floating_point() and f"{name}_grad" not in cache.cache_dict
    }
    assert missing <= {"rotary_emb.hook_cos", "rotary_emb.hook_sin"}, "constants, which no parameter reaches"
    for name in case.exact:
        if f"{name}_grad" in cache.cache_dict:
            assert cache[f"{name}_grad"].shape == cache[name].shape, name


def test_gradients_at_hooks_are_finite_differences_in_float64() -> None:
    case = wrapped("deepseek", torch.float64)
    table = [names.mlp(hook.name, 1) for hook in names.MLP_HOOKS if hook.name not in DISCRETE]
    _, found = gradients(case.model, case.tokens, table)
    step = 1e-5
    for name in table:
        direction = torch.randn(found[name].shape, dtype=torch.float64)

        def at(scale: float, name: str = name, direction: Tensor = direction) -> Tensor:
            with torch.no_grad():
                return case.model.run_with_hooks(
                    case.tokens, fwd_hooks=[(name, lambda value, hook: value + scale * direction)], return_type="loss"
                )

        slope = (at(step) - at(-step)) / (2 * step)
        expected = (found[name] * direction).sum()
        assert abs(slope - expected) <= 1e-6 * max(1.0, abs(expected)), name


@families
def test_gradients_reach_every_parameter_and_equal_those_of_transformers(family: str) -> None:
    case = wrapped(family)
    case.model.zero_grad()
    case.model(case.tokens, return_type="loss").backward()
    case.hf.zero_grad()
    logits = case.hf(case.tokens).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), case.tokens[:, 1:].flatten()).backward()
    own = {name.replace("_original_component.", ""): p for name, p in case.model.original_model.named_parameters()}
    with_gradient = 0
    for name, theirs in case.hf.named_parameters():
        if theirs.grad is None:
            assert own[name].grad is None, name
            continue
        with_gradient += 1
        ours = own[name].grad
        assert ours is not None, name
        assert deviation(ours, theirs.grad) <= 1e-5 * max(theirs.grad.abs().max().item(), 1e-2), name
        if "experts" in name or name.endswith(("gate.weight", "router.weight")):
            assert ours.abs().max() > 0, name
    assert with_gradient > 10
    case.model.zero_grad()
    case.hf.zero_grad()


def test_a_backward_hook_can_edit_the_gradient() -> None:
    case = wrapped("deepseek")
    name = "blocks.1.hook_expert_weighted"
    got = []
    for factor in (1.0, 0.0):
        case.model.zero_grad()
        with untouched(case.model), case.model.hooks(bwd_hooks=[(name, lambda grad, hook, f=factor: grad * f)]):
            case.model(case.tokens, return_type="loss").backward()
        block: Any = case.model.blocks[1]
        got.append(block.mlp.original_component.experts.down_proj.grad.abs().max().item())
    case.model.zero_grad()
    assert got[0] > 0
    assert got[1] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"return_type": "logits"}, "scalar to run backward from, got"),
        ({"return_type": "loss", "stop_at_layer": 1}, "leave stop_at_layer out"),
    ],
)
def test_gradients_that_cannot_be_had_are_refused(arguments: dict[str, Any], says: str) -> None:
    case = wrapped("deepseek")
    with untouched(case.model), pytest.raises(HookError, match=says):
        case.model.run_with_cache(case.tokens, incl_bwd=True, names_filter="blocks.1.hook_routed_out", **arguments)


def test_without_autograd_the_reason_is_said() -> None:
    case = wrapped("deepseek")
    with torch.no_grad(), pytest.raises(HookError, match="autograd is off"):
        case.model.run_with_cache(
            case.tokens, incl_bwd=True, names_filter="blocks.1.hook_routed_out", return_type="loss"
        )
    assert listening(case.model) == []


def test_negative_control_a_second_model_has_other_gradients() -> None:
    name = "blocks.1.mlp.hook_routed_out"
    case = wrapped("deepseek")
    _, ours = gradients(case.model, case.tokens, [name])
    other = type(case.model).from_hf(build("deepseek", seed=1), check=False)
    _, theirs = gradients(other, case.tokens, [name])
    assert deviation(ours[name], theirs[name]) > FP32


@pytest.mark.parametrize("size", range(1, 21))
def test_a_norm_s_gradient_arrives_also_where_rounding_makes_no_difference(size: int) -> None:
    """Rebuilt and native norm can agree to the bit; backward hooks must see gradients all the same."""
    model = wrapped("deepseek").model
    signs = torch.ones(1, 1, model.cfg.d_model)
    signs[..., ::2] = -1
    resid = (signs * size).requires_grad_()
    seen: list[Tensor] = []
    with model.hooks(bwd_hooks=[("ln_final.hook_scale", lambda grad, hook: seen.append(grad.clone()))]):
        model.ln_final(resid)[..., 0].sum().backward()
    model.zero_grad()
    assert len(seen) == 1 and seen[0].shape == (1, 1, 1)
    assert seen[0].abs().item() > 0


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("frozen", [False, pytest.param(True, marks=pytest.mark.typed)])
def test_a_graph_that_is_kept_gives_the_gradients_of_any_loss(family: str, frozen: bool) -> None:
    """All points at once, parameters frozen or not; a loss of the cache alone reaches what comes before it."""
    case = wrapped(family)
    layer = case.model.moe_layers[0]
    table = of_first_layer(case.model)
    # Siblings read one tensor, and heads are views of what flows: each has the gradient of its own part all the same.
    inside = re.compile(rf"blocks\.{layer}\.(attn|mlp\.shared_expert\w*)\.\w+\.hook_(in|out)$|\.attn\.hook_[qkvz]$")
    table += [name for name in case.some() if inside.search(name) and name.startswith(f"blocks.{layer}.")]
    _, expected = gradients(case.model, case.tokens, table)
    plain = case.model.run_with_cache(case.tokens, names_filter=table)[0]
    needed = {name: parameter.requires_grad for name, parameter in case.model.original_model.named_parameters()}
    try:
        case.model.original_model.requires_grad_(not frozen)
        loss, cache = case.model.run_with_cache(case.tokens, names_filter=table, keep_graph=True, return_type="loss")
        loss.backward()
        for name in table:
            assert deviation(cache[name].grad, expected[name]) <= FP32 * expected[name].abs().max().item(), name
        logits, cache = case.model.run_with_cache(case.tokens, names_filter=table, keep_graph=True)
        assert torch.equal(logits, plain)
        (found,) = torch.autograd.grad(cache["resid_post", layer].square().sum(), cache["resid_mid", layer])
        assert found.abs().max() > 0
        _, copied = case.model.run_with_cache(case.tokens, names_filter=table)
        assert not any(copied[name].requires_grad for name in table)
    finally:
        case.model.zero_grad()
        for name, parameter in case.model.original_model.named_parameters():
            parameter.requires_grad_(needed[name])


@families
def test_a_gradient_that_is_changed_in_place_is_changed_for_this_part_alone(family: str) -> None:
    """autograd hands one tensor to both summands of the residual stream."""
    case = wrapped(family)
    parts = (names.ATTN_OUT, names.BLOCK_MLP_OUT)
    inside = [names.mlp(name, case.last) for name in (names.ROUTED_OUT, names.SHARED_OUT)]
    points = [names.block(part, case.last) for part in parts] + [n for n in inside if n in case.model.hook_dict]
    first = names.block(names.RESID_PRE, 0)

    def gradient(edit: Any) -> Tensor:
        kept: list[Tensor] = []
        hooks = [*edit, (first, lambda grad, hook: kept.append(grad.clone()))]
        with untouched(case.model), case.model.hooks(bwd_hooks=hooks):
            case.model(case.tokens, return_type="loss").backward()
        case.model.zero_grad()
        return kept[0]

    def triple(grad: Tensor, hook: Any) -> None:  # noqa: ARG001
        grad.mul_(3)

    unedited = gradient([])
    for name in points:
        returned = gradient([(name, lambda grad, hook: grad * 3)])
        assert torch.equal(gradient([(name, triple)]), returned), name
        assert not torch.equal(returned, unedited), name


def test_a_graph_is_not_kept_where_there_is_none() -> None:
    case = wrapped("olmoe")
    with torch.no_grad(), pytest.raises(InputError, match="autograd is off"):
        case.model.run_with_cache(case.tokens, keep_graph=True)
    with pytest.raises(InputError, match="leave out incl_bwd, dtype"):
        case.model.run_with_cache(case.tokens, keep_graph=True, incl_bwd=True, dtype=torch.float16)
