"""Half precision and float64: the laws hold to what the dtype can hold."""

from typing import Any

import pytest
import torch

from moe_lens import names
from moe_lens.hooked_moe import HookedMoE
from moe_lens.model.hooks.self_check import TOLERANCE
from tests.families import CONFIGS, build, tokens
from tests.wrapped import as_hook, deviation, untouched, wrapped

families = pytest.mark.parametrize("family", CONFIGS)
BOUND = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float64: 1e-12}
"""Of the largest value: four units in the last place for half precision."""


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_laws_hold_in_other_dtypes(family: str, dtype: torch.dtype) -> None:
    case = wrapped(family, dtype)
    layer = case.last
    assert next(case.model.original_model.parameters()).dtype == dtype
    with untouched(case.model), torch.no_grad():
        plain = case.model(case.tokens)
        logits, cache = case.model.run_with_cache(case.tokens, names_filter=lambda name: name in case.exact)
        assert torch.equal(logits, plain), "law 1"
        if dtype == torch.float64:  # transformers' own experts for it are a loop, which adds in another order
            assert deviation(plain, case.logits) <= 1e-6 * case.logits.abs().max().item()
        else:
            assert torch.equal(plain, case.logits), "and the bits of transformers"
        for hook in names.MLP_HOOKS:  # law 3
            name = names.mlp(hook.name, layer)
            if name in case.model.hook_dict:
                again = case.model.run_with_hooks(case.tokens, fwd_hooks=[(name, as_hook(torch.clone))])
                assert torch.equal(again, plain), name
    here = {hook.name: names.mlp(hook.name, layer) for hook in names.MLP_HOOKS}
    wide = {hook: cache[name].double() for hook, name in here.items() if name in cache}
    parts = wide[names.EXPERT_OUT] * wide[names.ROUTING_WEIGHTS][..., None]
    bound = BOUND[dtype]
    assert deviation(parts, wide[names.EXPERT_WEIGHTED]) <= bound * parts.abs().max().item()
    assert deviation(wide[names.EXPERT_WEIGHTED].sum(2), wide[names.ROUTED_OUT]) <= bound * parts.abs().max().item()
    whole = wide[names.ROUTED_OUT] + wide.get(names.SHARED_OUT, torch.tensor(0.0))
    assert deviation(whole, wide[names.MLP_OUT]) <= bound * whole.abs().max().item()
    assert set(BOUND) | {torch.float32} == set(TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_edit_in_another_dtype_is_cast_to_the_model_s(dtype: torch.dtype) -> None:
    case = wrapped("deepseek", dtype)
    name = names.mlp(names.EXPERT_OUT, case.last)
    with untouched(case.model), torch.no_grad():
        wide = case.model.run_with_hooks(case.tokens, fwd_hooks=[(name, as_hook(lambda value: value.double() * 2))])
        own = case.model.run_with_hooks(case.tokens, fwd_hooks=[(name, as_hook(lambda value: value * 2))])
    assert wide.dtype == dtype
    assert torch.equal(wide, own)


@families
def test_half_precision_has_gradients_through_experts_and_router(family: str) -> None:
    model = HookedMoE.from_hf(build(family, torch.bfloat16), check=False)
    model(wrapped(family).tokens, return_type="loss").backward()
    layer = model.moe_layers[-1]
    moe = model.blocks[layer].mlp.original_component
    for parameter in (moe.experts.down_proj, moe.experts.gate_up_proj, getattr(moe, model.family.router).weight):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("family", ["deepseek", "mixtral"])
def test_a_loss_is_computed_in_float32_whatever_the_logits_are_in(family: str) -> None:
    """That of transformers, which has eight times as many digits as one in bfloat16."""
    hf: Any = build(family, torch.bfloat16)
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = hf(ids, labels=ids).loss
        model = HookedMoE.from_hf(hf)
        logits, loss = model(ids, return_type="both")
        alone, each = model(ids, return_type="loss"), model(ids, return_type="loss", loss_per_token=True)
    assert logits.dtype == torch.bfloat16 and loss.dtype == each.dtype == torch.float32
    assert (
        torch.equal(loss, alone) and abs(loss - expected) <= 1e-6 * expected and abs(each.mean() - loss) < 1e-6 * loss
    )
    rounded = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(rounded - expected) > 1e-5, "a control"
