"""Parameters in TransformerLens's orientation are views; copies of a model are independent; a model is wrapped once."""

import copy
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrize, prune

from moe_lens import names
from moe_lens.errors import InputError, UnsupportedModelError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.model.experts.layer_parameters import LayerParameters
from tests.families import CONFIGS, build, tokens
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
