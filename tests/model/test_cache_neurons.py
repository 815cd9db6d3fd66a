"""Neurons of experts as components of the residual stream: each as the equation says, and all sum to the stream."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from transformer_lens import ActivationCache

from moe_lens import HookedMoE, MoECache, names
from moe_lens.errors import HookError
from tests.families import CONFIGS
from tests.matrix import configs
from tests.wrapped import wrapped

WHOLE = ["granitemoe", "glm4_moe", "llama4_text", "longcat_flash", "nemotron_h", "qwen3_next"]
"""Families whose attention has no hooks of heads: multipliers, dense layers, weighed inputs, identities, layers that
are attention or an MLP, hybrids."""


@cache
def run(family: str) -> tuple[HookedMoE, MoECache]:
    if family in CONFIGS:
        model, tokens = wrapped(family).model, wrapped(family).tokens
    else:
        model, tokens = HookedMoE.from_hf(configs.build(family), check=False), configs.tokens()
    with torch.no_grad():
        return model, model.run_with_cache(tokens)[1]


def close(found: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.allclose(found, right, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [*CONFIGS, *WHOLE])
def test_neurons_take_the_residual_apart(family: str) -> None:
    model, kept = run(family)
    last = model.cfg.n_layers
    for end, mlp_input in ((None, False), (2, False), (2, True), (1, False)):
        if mlp_input and names.block(names.RESID_MID, 2) not in kept:
            continue
        stack, labels = kept.get_full_resid_decomposition(end, mlp_input, return_labels=True)
        right = kept["resid_mid", 2] if mlp_input else kept["resid_post", (end or last) - 1]
        assert close(stack.sum(0), right) and len(labels) == len(stack) == len(set(labels))
    assert f"L{model.moe_layers[-1]}R0N0" in kept.get_full_resid_decomposition(return_labels=True)[1]


def test_a_layer_that_is_attention_has_no_neurons_and_no_norm_of_an_mlp() -> None:
    model, kept = run("nemotron_h")
    with pytest.raises(HookError, match="layer 0 of this nemotron_h has no MLP, and so no neurons"):
        kept.get_neuron_results(0)
    with pytest.raises(HookError, match=r"does not hold 'blocks\.2\.ln1\.hook_scale'.* did you mean 'blocks\.2\.ln2"):
        kept.stack_neuron_results(2, apply_ln=True, project_output_onto=torch.ones(model.cfg.d_model))
    assert not model.accumulated_bias(3).any(), "of a family without biases"


@pytest.mark.parametrize("family", ["deepseek", "gpt_oss", "qwen2_moe"])
def test_a_neuron_adds_its_row_times_activation_and_weight(family: str) -> None:
    model, kept = run(family)
    layer, batch, pos, rank, neuron = model.moe_layers[-1], 1, 7, 2, 5
    expert = int(kept["expert_indices", layer][batch, pos, rank])
    weight, post = (
        kept["routing_weights", layer][batch, pos, rank],
        kept["expert_post", layer][batch, pos, rank, neuron],
    )
    right = weight * post * model.W_out[layer, expert][neuron]
    width = model.W_out[layer].shape[1]
    found = kept.get_neuron_results(layer)
    assert found.shape == (2, 12, model.top_k * width, model.cfg.d_model)
    assert close(found[batch, pos, rank * width + neuron], right)
    some = kept.get_neuron_results(layer, neuron_slice=[neuron, 0], pos_slice=(6, 9))
    assert close(some[batch, 1, rank * 2], right) and some.shape[:3] == (2, 3, model.top_k * 2)
    stack, labels = kept.stack_neuron_results(None, return_labels=True, neuron_slice=neuron)
    assert close(stack[labels.index(f"L{layer}R{rank}N{neuron}")][batch, pos], right)
    assert not close(stack[labels.index(f"L{layer}R0N{neuron}")][batch, pos], right), "negative control: another rank"


@pytest.mark.parametrize("family", ["deepseek", "gpt_oss"])
@pytest.mark.parametrize("apply_ln", [False, True])
def test_projecting_first_is_projecting_afterwards(family: str, apply_ln: bool) -> None:
    model, kept = run(family)
    onto = torch.randn(model.cfg.d_model, 3)
    for how in ({}, {"layer": 2}, {"layer": 2, "mlp_input": True}):
        words: dict[str, Any] = {"apply_ln": apply_ln, **how}
        right = kept.get_full_resid_decomposition(**words) @ onto
        assert close(kept.get_full_resid_decomposition(project_output_onto=onto, **words), right)
        assert close(kept.get_full_resid_decomposition(project_output_onto=onto[:, 0], **words), right[..., 0])


def test_the_remainder_is_what_neurons_do_not_give() -> None:
    model, kept = run("deepseek")
    every: list[dict[str, Any]] = [{}, {"neuron_slice": 3}, {"neuron_slice": (2, 6)}, {"apply_ln": True}]
    for words in every:
        stack, labels = kept.stack_neuron_results(2, return_labels=True, incl_remainder=True, **words)
        right = kept["resid_post", 1]
        right = kept.apply_ln_to_stack(right[None], 2)[0] if "apply_ln" in words else right
        assert labels[-1] == "remainder" and close(stack.sum(0), right)
    empty = kept.stack_neuron_results(0)
    assert empty.shape == (0, 2, 12, model.cfg.d_model)


def test_a_cache_without_its_batch_axis_is_taken_apart_alike() -> None:
    model, kept = run("deepseek")
    with torch.no_grad():
        one = model.run_with_cache(wrapped("deepseek").tokens[:1], remove_batch_dim=True)[1]
    every: list[dict[str, Any]] = [{}, {"apply_ln": True}]
    for words in every:
        assert close(one.get_full_resid_decomposition(**words), kept.get_full_resid_decomposition(**words)[:, 0])


def test_what_does_not_sum_to_the_residual_is_refused() -> None:
    model, _ = run("deepseek")
    name, tokens = names.mlp(names.EXPERT_OUT, 1), wrapped("deepseek").tokens
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, lambda value, hook: value * 2)]):
        edited = model.run_with_cache(tokens)[1]
    with pytest.raises(HookError, match="do not sum to the residual stream"):
        edited.get_full_resid_decomposition()
    assert close(edited.decompose_experts(return_labels=False).sum(0), edited["resid_post", 2]), "whole experts do"
    with pytest.raises(HookError, match="hook_expert_post"):
        model.run_with_cache(tokens, names_filter=lambda n: "expert_post" not in n)[1].get_neuron_results(1)


def test_streams_in_bfloat16_are_taken_apart_and_edits_are_seen() -> None:
    """Neurons are computed in a wider dtype than the stream that they are compared with."""
    model = HookedMoE.from_pretrained("tiny-deepseekmoe", check=False)
    tokens = model.to_tokens("The old man looked at the sea and")
    layer = model.moe_layers[0]
    with torch.no_grad():
        kept = model.run_with_cache(tokens)[1]
        with model.hooks(fwd_hooks=[(names.block(names.RESID_MID, layer), lambda value, hook: value + 200)]):
            edited = model.run_with_cache(tokens)[1]
    stack = kept.get_full_resid_decomposition(expand_neurons=False)
    assert (stack.dtype, kept["resid_post", -1].dtype) == (torch.float32, torch.bfloat16), "or the test shows nothing"
    # Every addition rounds the stream; what it adds was rounded when it was made, and as a sum of experts.
    additions = [(point, layer) for layer in range(model.cfg.n_layers) for point in ("resid_mid", "resid_post")]
    added = [(point, layer) for layer in range(model.cfg.n_layers) for point in ("attn_out", "mlp_out")]
    streams, addends = (sum(kept[at].float().abs() for at in places) for places in (additions, added))
    rounding = torch.finfo(torch.bfloat16).eps / 2
    bound = rounding * (streams + 2 * addends)
    assert ((stack.sum(0) - kept["resid_post", -1].float()).abs() <= bound).all()
    assert ((stack[1:].sum(0) - kept["resid_post", -1].float()).abs() > bound).any(), "a control: a part is missing"
    with pytest.raises(HookError, match="do not sum to the residual stream"):
        edited.get_full_resid_decomposition(expand_neurons=False)


@pytest.mark.parametrize("family", ["deepseek", "deepseek_v3", "mixtral"])
@pytest.mark.parametrize("expand", [True, False])
def test_components_are_those_of_transformer_lens_in_its_order(family: str, expand: bool) -> None:
    model, kept = run(family)
    onto, wide = model.W_U.detach()[:, :3], {"layer": 2, "mlp_input": True, "apply_ln": True}
    ways: list[dict[str, Any]] = [{}, {"apply_ln": True}, {**wide, "project_output_onto": onto}]
    for way in ways:
        words: dict[str, Any] = {**way, "expand_neurons": expand, "return_labels": True}
        stack, labels = kept.get_full_resid_decomposition(**words)
        theirs, names_ = ActivationCache.get_full_resid_decomposition(kept, **words)
        assert labels == names_ and close(stack, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", ["deepseek", "gpt_oss", "dbrx"])
def test_a_cache_may_be_kept_in_another_dtype_than_the_run_s(family: str, dtype: torch.dtype) -> None:
    model, plain = run(family)
    with torch.no_grad():
        _, kept = model.run_with_cache(plain.tokens, dtype=dtype)
        onto, bound = model.W_U[:, :3], 1e-5 if dtype == torch.float64 else 0.05
        ways: list[tuple[str, dict[str, Any]]] = [
            ("get_full_resid_decomposition", {}),
            ("get_full_resid_decomposition", {"project_output_onto": onto}),
            ("get_full_resid_decomposition", {"project_output_onto": onto.double()[:, 0], "apply_ln": True}),
            ("accumulated_resid", {"apply_ln": True}),
        ]
        for read, words in ways:
            stack, expected = (getattr(each, read)(**words).double() for each in (kept, plain))
            assert (stack - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("family", ["deepseek", "deepseek_v3"])
def test_results_of_heads_are_copies_as_all_in_a_cache_unless_it_is_a_graph(family: str) -> None:
    case, name = wrapped(family), "blocks.1.attn.hook_result"
    _, kept = case.model.run_with_cache(case.tokens)
    kept.stack_head_results()
    assert not kept[name].requires_grad and torch.equal(copy.deepcopy(kept)[name], kept[name])
    _, kept = case.model.run_with_cache(case.tokens, keep_graph=True)
    assert kept.stack_head_results().requires_grad and kept[name].requires_grad, "the control"
