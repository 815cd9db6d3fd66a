"""Parameters in TransformerLens's orientation are views; copies of a model are independent; a model is wrapped once."""

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrize, prune

from moe_lens import names
from moe_lens.errors import AbsentParameterError, InputError, UnsupportedModelError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.model.experts.layer_parameters import LayerParameters
from tests.families import CONFIGS, build, tokens
from tests.matrix.configs import build as tiny
from tests.plain_moe import PlainExpert
from tests.wrapped import as_hook, deviation, listening, wrapped

families = pytest.mark.parametrize("family", CONFIGS)


@pytest.mark.typed
def test_parameters_are_a_sequence_over_the_layers_that_have_them() -> None:
    model = wrapped("deepseek").model
    for matrix in (model.W_router, model.W_gate, model.W_in, model.W_out):
        assert matrix.layers == tuple(model.moe_layers) == (1, 2) and len(matrix) == 2
        for layer, one in zip(matrix.layers, matrix, strict=True):
            assert one.data_ptr() == matrix[layer].data_ptr()
        assert matrix.shape == (2, *matrix[2].shape)
    uneven = LayerParameters("W", {1: lambda: torch.zeros(2), 3: lambda: torch.zeros(3)})
    with pytest.raises(InputError, match="W has no one shape"):
        uneven.shape  # noqa: B018


@families
def test_matrices_of_experts_are_oriented_as_in_transformer_lens(family: str) -> None:
    """x @ W_gate, x @ W_in and post @ W_out are what the hooks show, biases apart."""
    case = wrapped(family)
    model, layer = case.model, case.last
    kept = [names.mlp(hook.name, layer) for hook in names.MLP_HOOKS if names.mlp(hook.name, layer) in model.hook_dict]
    with torch.no_grad():
        _, cache = model.run_with_cache(case.tokens, names_filter=kept)
    here = {name.rpartition(".")[2]: cache[name] for name in kept}
    x = here[names.MLP_IN]
    experts: Any = case.hf.model.layers[layer].mlp.experts
    bias = family == "gpt_oss"
    with torch.no_grad():
        for b, p, k in ((0, 0, 0), (1, 7, 1), (0, 11, 2)):
            e = int(here[names.EXPERT_INDICES][b, p, k])
            plain = PlainExpert(case.hf.config, experts, e)
            pre = x[b, p] @ model.W_gate[layer, e] + plain.gate_bias
            linear = x[b, p] @ model.W_in[layer, e] + plain.up_bias
            out = here[names.EXPERT_POST][b, p, k] @ model.W_out[layer, e] + plain.down_bias
            assert deviation(pre, here[names.EXPERT_PRE][b, p, k]) <= 1e-5
            assert deviation(linear, here[names.EXPERT_PRE_LINEAR][b, p, k]) <= 1e-5
            assert deviation(out, here[names.EXPERT_OUT][b, p, k]) <= 1e-5 * out.abs().max().item()
        router: Any = case.hf.model.layers[layer].mlp
        logits = x @ model.W_router[layer].T + (router.router.bias if bias else 0)
        assert deviation(logits, here[names.ROUTER_LOGITS]) <= 1e-5 * logits.abs().max().item()
    d, m = x.shape[-1], here[names.EXPERT_POST].shape[-1]
    assert model.W_router[layer].shape == (8, d)
    assert model.W_gate[layer].shape == model.W_in[layer].shape == (8, d, m)
    assert model.W_out[layer].shape == (8, m, d)
    assert model.W_gate.layers == model.moe_layers


@families
@pytest.mark.parametrize("matrix", ["W_router", "W_gate", "W_in", "W_out"])
def test_writing_to_a_view_edits_the_model(family: str, matrix: str) -> None:
    case = wrapped(family)
    layer = case.last
    expert = int(case.model.routing(case.tokens).indices[-1].flatten().mode().values)
    view = getattr(case.model, matrix)[layer, expert]
    parameters = {p.data_ptr(): p for p in case.model.original_model.parameters()}
    assert any(view.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in parameters.values())
    with torch.no_grad():
        before = view.clone()
        view.mul_(0.5)
        try:
            assert deviation(case.model(case.tokens), case.logits) > 1e-4
            assert torch.equal(getattr(case.model, matrix)[layer, expert], before * 0.5)
        finally:
            view.copy_(before)
        assert torch.equal(case.model(case.tokens), case.logits)


def test_a_dense_layer_has_none() -> None:
    model = wrapped("deepseek").model
    for matrix in ("W_router", "W_gate", "W_in", "W_out"):
        with pytest.raises(InputError, match=r"layer 0 has none; MoE layers are \[1, 2\]"):
            getattr(model, matrix)[0]


@families
def test_a_copy_is_independent(family: str) -> None:
    case = wrapped(family)
    other = copy.deepcopy(case.model)
    layer = case.last
    name = names.mlp(names.EXPERT_OUT, layer)
    with torch.no_grad():
        assert torch.equal(other(case.tokens), case.logits)
        assert other.hook_dict[name] is not case.model.hook_dict[name]
        for at in (name, names.block(names.RESID_MID, layer), names.mlp(names.ROUTER_LOGITS, layer),
                   names.block(names.EXPERT_WEIGHTED, layer), names.expert("hook_out", layer, 3)):  # fmt: skip
            other.add_hook(at, as_hook(torch.zeros_like))
            assert deviation(other(case.tokens), case.logits) > 1e-3, at
            assert listening(case.model) == []
            assert torch.equal(case.model(case.tokens), case.logits), at
            other.reset_hooks()
        seen: list[str] = []
        case.model.add_hook(name, as_hook(lambda value: seen.append("original")))
        other(case.tokens)
        assert seen == []
        case.model.reset_hooks()
        other.W_out[layer].zero_()
        assert deviation(other(case.tokens), case.logits) > 1e-3
        assert torch.equal(case.model(case.tokens), case.logits)


@families
def test_wrapping_twice_is_refused(family: str) -> None:
    hf = build(family)
    first = HookedMoE.from_hf(hf, check=False)
    with torch.no_grad():
        before = first(tokens())
    with pytest.raises(UnsupportedModelError, match="already wrapped"):
        HookedMoE.from_hf(hf, check=False)
    with torch.no_grad():
        assert torch.equal(first(tokens()), before), "and the first wrapper still works"


@pytest.mark.typed
def test_what_is_not_supported_is_refused_by_name() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    belongs = "A model without experts belongs in TransformerLens's TransformerBridge"
    with pytest.raises(UnsupportedModelError, match=rf"'llama' is not supported\. {belongs}\. .*deepseek, .*mixtral"):
        HookedMoE.from_hf(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)))
    with pytest.raises(UnsupportedModelError, match="no layer with experts"):
        HookedMoE.from_hf(build("deepseek", first_k_dense_replace=3))


def test_what_is_computed_of_parameters_refuses_to_be_written_to() -> None:
    hf = build("mixtral")
    prune.random_unstructured(hf.model.layers[1].mlp.experts, "gate_up_proj", 0.5)
    parametrize.register_parametrization(hf.model.layers[1].mlp.gate, "weight", torch.nn.Tanh())
    model = HookedMoE.from_hf(hf)
    for matrix in (model.W_in, model.W_gate, model.W_router):
        with pytest.raises(InputError, match="zero_ writes to a copy"), torch.no_grad():
            matrix[1, 3].zero_()
    before = model(tokens())
    with torch.no_grad():
        for matrix in (model.W_in, model.W_gate, model.W_router):
            matrix[2, 3].zero_()
        model.W_out[1, 3].zero_()
    assert not torch.equal(model(tokens()), before)
    assert not model.W_in[2, 3].any() and not model.W_out[1, 3].any()


def test_an_ellipsis_is_all_experts_and_none_is_no_expert() -> None:
    model = HookedMoE.from_hf(build("mixtral"))
    assert model.W_in[2, ...].data_ptr() == model.W_in[2].data_ptr() and len(model.W_in[2, ...]) == model.n_experts
    with pytest.raises(InputError, match=r"W_in\[2, expert\]: got None; expected a whole number"):
        model.W_in[2, None]


@pytest.mark.typed
@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_view_of_parameters_is_not_taken_from_its_model(copied: Callable[[Any], Any]) -> None:
    model = HookedMoE.from_hf(build("mixtral"))
    with pytest.raises(InputError, match=r"^W_in is a view .*W_in\[layer\]\.clone\(\)"):
        copied(model.W_in)
    copied(model.W_in[2].detach())


OF_HEADS = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")


def by_heads(attention: Any, name: str) -> Any:
    """TransformerLens's parameter, cut out of that of transformers."""
    linear = getattr(attention, {"Q": "q_proj", "K": "k_proj", "V": "v_proj", "O": "o_proj"}[name[-1]])
    if name == "b_O":
        return linear.bias
    width = attention.v_head_dim if hasattr(attention, "v_head_dim") else attention.head_dim
    if name.startswith("b"):
        return None if linear.bias is None else linear.bias.view(-1, width)
    return (
        linear.weight.view(-1, width, linear.in_features).mT
        if name != "W_O"
        else linear.weight.T.unflatten(0, (-1, width))
    )


@pytest.mark.parametrize("model_type", ["deepseek", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_parameters_of_attention_by_heads_are_the_models_own(model_type: str) -> None:
    model: Any = HookedMoE.from_hf(tiny(model_type), check=False)
    for name in OF_HEADS:
        right = [by_heads(block.attn.original_component, name) for block in model.blocks]
        if right[0] is None:
            with pytest.raises(AbsentParameterError, match=f"^{name}: a .*Attention has none"):
                getattr(model, name)
            assert not hasattr(model, name) and getattr(model.blocks[1].attn, name) is None
        else:
            assert torch.equal(getattr(model, name), torch.stack(right))
            assert torch.equal(getattr(model.blocks[1].attn, name), right[1])
    q, k, v, o = (model._expand_kv_heads(getattr(model, name)) for name in OF_HEADS[:4])
    assert torch.allclose(model.QK.AB, q @ k.mT, atol=1e-5) and torch.allclose(model.OV.AB, v @ o, atol=1e-5)


@pytest.mark.parametrize("model_type", ["mixtral", "phimoe", "glm4_moe"])
def test_parameters_that_are_exchanged_are_those_that_are_read(model_type: str) -> None:
    model, other = (HookedMoE.from_hf(tiny(model_type, seed=seed), check=False) for seed in (0, 1))
    assert not torch.equal(model.W_E, other.W_E), "a control"
    other.ln_final.w.data.mul_(3)
    model.load_state_dict(other.state_dict(), assign=True)
    mine, theirs = model.get_params(), other.get_params()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for path in ("ln_final", "blocks.1.ln1"):
        norms: Any = [of.get_submodule(path) for of in (model, other)]
        for name in ("w", "b") if hasattr(norms[0].original_component, "bias") else ("w",):
            found, right = (getattr(norm, name) for norm in norms)
            assert torch.equal(found, right) and found is getattr(
                norms[0].original_component, {"w": "weight"}.get(name, "bias")
            )
    assert hasattr(model.ln_final, "b") == (model_type == "phimoe")


@pytest.mark.typed
@pytest.mark.parametrize("on_disk", [False, True])
def test_parameters_of_dense_mlps_and_shared_experts_are_those_of_the_moment(on_disk: bool, tmp_path: Path) -> None:
    whole, other = (HookedMoE.from_hf(tiny("deepseek_v2", mlp_bias=True, seed=seed), check=False) for seed in (0, 1))
    whole.save_pretrained(tmp_path / "model")
    if on_disk:
        disk = {"model": "disk", "lm_head": "disk"}
        model = HookedMoE.from_pretrained(tmp_path / "model", device_map=disk, offload_folder=str(tmp_path / "off"))
    else:
        model = HookedMoE.from_hf(tiny("deepseek_v2", mlp_bias=True, seed=1), check=False)
        model.load_state_dict(whole.state_dict(), assign=True)
    for path in ("blocks.0.mlp", "blocks.1.mlp.shared_experts"):
        parts: list[Any] = [of.get_submodule(path) for of in (model, whole, other)]
        mine, right, wrong = parts
        for name, part in (("gate", "gate_proj"), ("in", "up_proj"), ("out", "down_proj")):
            linear = right.original_component.get_submodule(part)
            assert torch.equal(getattr(mine, f"b_{name}"), linear.bias)
            assert torch.equal(getattr(mine, f"W_{name}"), linear.weight.T)
            assert not torch.equal(getattr(wrong, f"b_{name}"), linear.bias), "a control"
    none: Any = HookedMoE.from_hf(tiny("deepseek_v2"), check=False)
    assert none.blocks[0].mlp.b_in is None, "as in TransformerLens"
    with pytest.raises(AbsentParameterError, match="^b_in: "):
        none.blocks[1].mlp.b_in  # noqa: B018


@pytest.mark.typed
@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "dbrx", "qwen3_next", "axk1", "nemotron_h"])
def test_parameters_that_are_not_divided_into_heads_are_named_in_a_line(model_type: str) -> None:
    model: Any = HookedMoE.from_hf(tiny(model_type), check=False)
    block = next(block for block in model.blocks if "attn" in block._modules)
    latent = model_type.startswith("deepseek")
    for name in OF_HEADS:
        if name == "W_O" and latent:
            right = torch.stack([by_heads(each.attn.original_component, name) for each in model.blocks])
            assert torch.equal(model.W_O, right) and torch.equal(block.attn.W_O, right[0])
            continue
        for owner in (model, block.attn):
            if name == "b_O" and latent and owner is not model:
                continue  # None there, as in TransformerLens
            assert not hasattr(owner, name)
            with pytest.raises(AbsentParameterError, match=f"^{name}: a \\w+ has none[^\n]*$"):
                getattr(owner, name)
    reads = ("QK", "OV", "b_in", "b_out")
    calls = (model.QK_for_attn_layers, model.OV_for_attn_layers, lambda: model.all_composition_scores("Q"))
    for read in (*(lambda name=name: getattr(model, name) for name in reads), *calls):
        with pytest.raises(AbsentParameterError, match="^[^\n]+$"):
            read()
    with pytest.raises(AbsentParameterError, match=r"^W_in: .*model.W_gate, W_in and W_out\[layer, expert\]"):
        model.blocks[-1].mlp.W_in  # noqa: B018
    assert "embed.W_E" in model.tl_parameters() and dict(inspect.getmembers(model))["top_k"] == model.top_k
    for flag in ("split_qkv_input", "attn_in", *(() if latent else ("attn_result", "hook_mlp_in"))):
        with pytest.raises(UnsupportedModelError, match=f"^use_{flag}: .*{model_type}"):
            getattr(model, f"set_use_{flag}")(True)
        getattr(model, f"set_use_{flag}")(False)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_results_of_heads_sum_to_the_output_of_attention(model_type: str) -> None:
    model: Any = HookedMoE.from_hf(tiny(model_type, attention_bias=True), check=False)
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(tokens(), names_filter=lambda name: name.startswith("blocks.1.attn.hook_"))
    out, attention = cache["blocks.1.attn.hook_out"], model.blocks[1].attn
    heads = torch.einsum("bphd,hdm->bphm", cache["blocks.1.attn.hook_z"], attention.W_O)
    bias = 0 if attention.b_O is None else attention.b_O
    for summed in (cache["blocks.1.attn.hook_result"].sum(2), heads.sum(2)):
        torch.testing.assert_close(summed + bias, out, atol=1e-4, rtol=1e-4)


@pytest.mark.typed
def test_biases_of_attention_that_is_shown_whole_are_not_passed_over() -> None:
    model: Any = HookedMoE.from_hf(tiny("glm4_moe_lite", attention_bias=True), check=False)
    with pytest.raises(AbsentParameterError, match="^accumulated_bias: a Glm4MoeLiteAttention has none"):
        model.accumulated_bias(2)
    _, cache = model.run_with_cache(tokens())
    stack, labels = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    torch.testing.assert_close(stack.sum(0), cache["resid_post", -1], atol=1e-4, rtol=1e-4)
    assert not stack[labels.index("bias")].any() and "L0attn" in labels, "in which it is"
    none: Any = HookedMoE.from_hf(tiny("glm4_moe_lite"), check=False)
    assert not none.accumulated_bias(2).any()
    heads: Any = HookedMoE.from_hf(tiny("qwen3_moe", attention_bias=True), check=False)
    assert torch.equal(heads.accumulated_bias(2), heads.b_O[:2].sum(0))
