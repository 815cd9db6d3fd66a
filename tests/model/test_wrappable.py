"""What `from_hf` is given: something else than a language model is refused with what to do; odd states are kept."""

import copy
import functools
import gc
import random
import sys
from typing import Any, no_type_check

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    MixtralModel,
    Qwen3NextForSequenceClassification,
    Qwen3NextModel,
)

from moe_lens import names
from moe_lens.errors import HookError, InputError, SelfCheckError, UnsupportedModelError
from moe_lens.hooked_moe import HookedMoE
from tests.matrix.configs import build, config, tokens
from tests.wrapped import checkpoint_activations, wrapped


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("olmoe", "got str. HookedMoE.from_pretrained loads a model by its name or folder"),
        (None, "got NoneType"),
        (nn.Linear(2, 2), "got Linear. HookedMoE.from_pretrained"),
    ],
)
def test_what_is_no_model_is_refused(given: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"expected a causal language model of transformers, {said}"):
        HookedMoE.from_hf(given)


@pytest.mark.untyped
@pytest.mark.parametrize("around", [lambda hf: torch.compile(hf, backend="eager"), nn.DataParallel, nn.Sequential])
def test_a_model_inside_another_module_is_refused_with_the_way_in(around: Any) -> None:
    hf = build("mixtral")
    with pytest.raises(
        InputError, match=r"got \w+ around a MixtralForCausalLM: pass that one itself.*_orig_mod.*merge_and_unload"
    ):
        HookedMoE.from_hf(around(hf))
    assert HookedMoE.from_hf(hf).top_k == 3, "nothing was wrapped yet"


def _layer_compiled(hf: Any) -> None:
    hf.model.layers[1] = torch.compile(hf.model.layers[1], backend="eager")


def _forward_compiled(hf: Any) -> None:
    hf.forward = torch.compile(hf.forward, backend="eager")


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("compiling", "part"),
    [
        (lambda hf: hf.compile(backend="eager"), "the model"),
        (lambda hf: hf.model.layers[2].compile(backend="eager"), "model.layers.2"),
        (_layer_compiled, "model.layers.1"),
        (_forward_compiled, "the model"),
    ],
)
def test_a_compiled_model_is_refused(compiling: Any, part: str) -> None:
    hf: Any = build("mixtral")
    compiling(hf)
    with pytest.raises(UnsupportedModelError, match=f"^{part} is compiled: [^\n]* wrap it uncompiled$"):
        HookedMoE.from_hf(hf)
    plain: Any = build("mixtral")
    plain.forward = torch.compiler.disable(plain.forward)  # is not compiled
    right = plain(tokens()).logits
    assert torch.equal(HookedMoE.from_hf(plain)(tokens()), right)


def _doubled(function: Any) -> Any:
    @functools.wraps(function)
    def doubled(*args: Any) -> Any:
        return 2 * function(*args)

    return doubled


@pytest.mark.parametrize(("model_type", "block"), [("mixtral", "mlp.experts"), ("dbrx", "ffn")])
def test_experts_that_somebody_computes_otherwise_are_refused(
    model_type: str, block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_class: Any = build(model_type)
    first = next(module for name, module in of_class.named_modules() if name.endswith(block))
    right = build(model_type)(tokens()).logits
    of_one: Any = build(model_type)
    second = next(module for name, module in of_one.named_modules() if name.endswith(block))
    second.forward = _doubled(second.forward)
    said = f"^{type(first).__name__}.forward was replaced by [^\\n]*parameters$"
    with pytest.raises(UnsupportedModelError, match=said):
        HookedMoE.from_hf(of_one)
    with monkeypatch.context() as patch:
        patch.setattr(type(first), "forward", _doubled(type(first).forward))
        assert not torch.allclose(of_class(tokens()).logits, right), "it would be heard"
        with pytest.raises(UnsupportedModelError, match=said):
            HookedMoE.from_hf(of_class)
    assert torch.equal(HookedMoE.from_hf(of_class)(tokens()), right)


@pytest.mark.parametrize(
    ("cls", "model_type"),
    [
        (MixtralModel, "mixtral"),  # by TransformerLens's adapter
        (MixtralForSequenceClassification, "mixtral"),
        (Qwen3NextModel, "qwen3_next"),  # by ours
        (Qwen3NextForSequenceClassification, "qwen3_next"),
    ],
)
def test_a_model_without_an_unembedding_is_refused(cls: Any, model_type: str) -> None:
    hf = cls(config(model_type))
    with pytest.raises(UnsupportedModelError, match=rf"{cls.__name__} does not predict tokens.*AutoModelForCausalLM"):
        HookedMoE.from_hf(hf)


@pytest.mark.parametrize(("model_type", "part"), [("dbrx", "ffn.experts"), ("jetmoe", "output_linear")])
def test_a_hook_of_torch_on_experts_that_are_not_called_is_refused(model_type: str, part: str) -> None:
    hf: Any = build(model_type)
    module = next(module for name, module in hf.named_modules() if name.endswith(part))
    handle = module.register_forward_hook(lambda module, given, out: 2 * out)
    with pytest.raises(UnsupportedModelError, match="^torch's hook [^\\n]* would not be called"):
        HookedMoE.from_hf(hf)
    handle.remove()
    right = hf(tokens()).logits
    assert torch.equal(HookedMoE.from_hf(hf)(tokens()), right)


def _hooked(holder: Any, name: str) -> Any:
    return holder.get_submodule(name).register_forward_hook(lambda module, given, out: 2 * out).remove


def _hooked_backward(holder: Any, name: str) -> Any:
    return holder.get_submodule(name).register_full_backward_hook(lambda module, given, out: None).remove


def _replaced(holder: Any, name: str) -> Any:
    module = holder.get_submodule(name)
    found = vars(module).get("forward")
    module.forward = _doubled(module.forward)
    return (
        functools.partial(vars(module).pop, "forward") if found is None else lambda: vars(module).update(forward=found)
    )


def _exchanged(holder: Any, name: str) -> Any:
    found = holder.get_submodule(name)
    setattr(holder, name, nn.Identity())
    return functools.partial(setattr, holder, name, found)


@pytest.mark.parametrize(
    ("model_type", "part"),
    [("llama4_text", "experts"), ("dbrx", "experts"), ("jetmoe", "output_linear"), ("granitemoeshared", "shared_mlp")],
)
def test_what_changes_modules_that_are_not_called_is_refused_in_the_next_pass(model_type: str, part: str) -> None:
    model: Any = HookedMoE.from_hf(build(model_type), check=False)
    block, right = model.blocks[model.moe_layers[-1]].mlp, model(tokens())
    holder = block.layer if hasattr(block.layer, part) else block.moe
    for change in (_hooked, _hooked_backward, _replaced, *(() if model_type == "jetmoe" else (_exchanged,))):
        undo = change(holder, part)
        with pytest.raises(UnsupportedModelError, match="would not be called|was replaced by _doubled|in the place of"):
            model(tokens())
        undo()
        assert torch.equal(model(tokens()), right)


@pytest.mark.parametrize("part", ["gate", "experts"])
def test_hooks_on_a_layer_whose_router_or_experts_run_without_them_are_refused(part: str) -> None:
    model: Any = wrapped("mixtral").model
    inside = vars(getattr(model.blocks[1].mlp.moe, part))
    found = inside.pop("forward")
    try:
        assert torch.equal(model(tokens()), wrapped("mixtral").logits), "it computes, where nobody listens"
        with pytest.raises(
            HookError, match="^hooks of layer 1 cannot run: [^\n]* in the place of its (router|experts)"
        ):
            model.run_with_hooks(tokens(), fwd_hooks=[("blocks.1.mlp.hook_expert_out", lambda value, hook: 0 * value)])
    finally:
        inside["forward"] = found


def test_a_hook_of_torch_on_the_gate_of_shared_experts_is_refused_where_it_would_be_lost() -> None:
    model: Any = wrapped("qwen2_moe").model
    gate, name = model.blocks[1].mlp.moe.shared_expert_gate, "blocks.1.mlp.hook_shared_out"
    handle = gate.register_forward_hook(lambda module, given, out: out / 2)
    try:
        assert not torch.equal(model(tokens()), wrapped("qwen2_moe").logits), "it is heard"
        with pytest.raises(UnsupportedModelError, match="would not be called on what it computes"):
            model.run_with_cache(tokens(), names_filter=name)
    finally:
        handle.remove()


def test_a_changed_attention_is_not_looked_into() -> None:
    """As long as nobody looks, it computes as its owner wants."""
    hf: Any = build("mixtral")
    attention = hf.model.layers[1].self_attn
    handle = attention.register_forward_hook(lambda module, given, out: (2 * out[0], *out[1:]))
    right = hf(tokens()).logits
    model = HookedMoE.from_hf(hf)
    assert torch.equal(model(tokens()), right)
    inside = "blocks.1.attn.hook_pattern"
    with pytest.raises(UnsupportedModelError, match="MixtralAttention would not be called"):
        model.run_with_cache(tokens(), names_filter=inside)
    handle.remove()
    _, cache = model.run_with_cache(tokens(), names_filter=inside)
    assert torch.allclose(cache[inside].sum(-1), torch.ones(()))
    attention.forward = _doubled(attention.forward)
    with pytest.raises(UnsupportedModelError, match="MixtralAttention.forward was replaced by _doubled"):
        model.run_with_cache(tokens(), names_filter=inside)


def test_a_norm_has_its_hooks_whatever_its_eps() -> None:
    model = HookedMoE.from_hf(build("axk1", rms_norm_eps=0.5), check=False)
    norm, end = "blocks.1.ln1", "blocks.1.mlp.hook_out"  # which A.X-K1's block shows at the norm that it ends with
    _, cache = model.run_with_cache(tokens(), names_filter=[f"{norm}.hook_in", f"{norm}.hook_scale", end])
    x = cache[f"{norm}.hook_in"]
    assert torch.allclose(cache[f"{norm}.hook_scale"], (x.pow(2).mean(-1, keepdim=True) + 0.5).sqrt())
    assert end in cache


class Halved(MixtralForCausalLM):
    """A model of somebody's own."""

    @no_type_check
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits / 2
        return out


def test_a_model_of_a_derived_class_is_wrapped_as_it_is() -> None:
    hf: Any = build("mixtral")
    own = Halved(hf.config).eval()
    own.load_state_dict(hf.state_dict())
    model = HookedMoE.from_hf(own)
    assert torch.equal(model(tokens()), hf(tokens()).logits / 2)


@pytest.mark.untyped
def test_a_model_is_wrapped_once() -> None:
    hf: Any = build("mixtral")
    hooked: Any = HookedMoE.from_hf(hf)
    for again in (hf, hooked):
        with pytest.raises(UnsupportedModelError, match="already wrapped"):
            HookedMoE.from_hf(again)


def test_a_dense_model_belongs_elsewhere() -> None:
    dense = LlamaConfig(
        vocab_size=101, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UnsupportedModelError, match="'llama' is not supported. .* TransformerLens's TransformerBridge"):
        HookedMoE.from_hf(LlamaForCausalLM(dense))


@pytest.mark.untyped
def test_a_tokenizer_by_its_name_is_refused() -> None:
    with pytest.raises(InputError, match="expected a tokenizer of transformers, as AutoTokenizer.* got str"):
        HookedMoE.from_hf(build("mixtral"), "gpt2")  # pyright: ignore[reportArgumentType]


def test_a_model_without_a_tokenizer_reads_tokens_and_says_what_text_needs() -> None:
    hooked = HookedMoE.from_hf(build("mixtral"), check=False)
    assert hooked(tokens()).shape == (2, 12, 101)
    with pytest.raises(InputError, match=r"has no tokenizer.*pass token ids.*from_hf\(model, tokenizer\)"):
        hooked("text")


@pytest.mark.typed
@pytest.mark.parametrize("model_type", ["deepseek", "olmoe", "gpt_oss"])
def test_a_norm_that_was_taken_out_divides_by_1(model_type: str) -> None:
    hf: Any = build(model_type).eval()
    hf.model.layers[1].post_attention_layernorm = nn.Identity()
    with torch.no_grad():
        right = hf(tokens()).logits
        model = HookedMoE.from_hf(hf)
        logits, cache = model.run_with_cache(tokens())
        halved = model.run_with_hooks(tokens(), fwd_hooks=[("blocks.1.ln2.hook_scale", lambda value, hook: 2 * value)])
        read = [("blocks.1.ln2.hook_out", lambda value, hook: value / 2)]
        assert torch.equal(halved, model.run_with_hooks(tokens(), fwd_hooks=read))
    assert (logits - right).abs().max() <= 1e-5 * right.abs().max() < (halved - right).abs().max()
    assert (cache["blocks.1.ln2.hook_scale"] == 1).all() and not (cache["blocks.0.ln2.hook_scale"] == 1).any()
    assert torch.equal(cache["blocks.1.ln2.hook_normalized"], cache["resid_mid", 1])


@pytest.mark.parametrize("model_type", ["deepseek", "olmoe"])
def test_modules_that_are_trained_in_a_model_that_is_not_stay_so(model_type: str) -> None:
    hf: Any = build(model_type).eval()
    hf.model.layers[1].train()
    before = {name: module.training for name, module in hf.named_modules()}
    assert len({*before.values()}) == 2
    hooked = HookedMoE.from_hf(hf)
    kept = {name.replace("._original_component", ""): module.training for name, module in hf.named_modules()}
    assert before.items() <= kept.items() and not hooked.training


@pytest.mark.parametrize("model_type", ["olmoe", "phimoe"])
def test_a_model_in_training_mode_stays_there_and_its_dropout_is_no_reason_to_refuse_it(model_type: str) -> None:
    hf: Any = build(model_type, attention_dropout=0.5).train()
    hooked = HookedMoE.from_hf(hf)
    assert hooked.training and all(module.training for module in hf.modules())
    with torch.no_grad():
        assert not torch.equal(hooked(tokens()), hooked(tokens())), "dropout is still there"


@pytest.mark.typed
@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "mixtral", "gpt_oss"])
def test_dropout_is_the_same_with_hooks_inside_attention(model_type: str) -> None:
    """TransformerLens's attention leaves out that of DeepSeek-V2 and V3."""
    hf: Any = build(model_type, attention_dropout=0.3).train()
    with torch.no_grad():
        torch.manual_seed(1)
        plain = hf(tokens()).logits
        model = HookedMoE.from_hf(hf)
        torch.manual_seed(1)
        heard, _ = model.run_with_cache(tokens())
        # Attention is computed again, in another order: 3e-7 of its largest value a layer, 9e-6 of logits up to 6 here.
        torch.testing.assert_close(heard, plain, rtol=0, atol=2e-5)
        model.eval()
        kept = model(tokens())
        assert (kept - plain).abs().max() > 0.1, "negative control: dropout matters, and is off here"
        torch.testing.assert_close(model.run_with_cache(tokens())[0], kept, rtol=0, atol=2e-5)


JITTER: dict[str, dict[str, Any]] = {
    "mixtral": {"router_jitter_noise": 0.3},
    "minimax": {"router_jitter_noise": 0.3},
    "minimax_m2": {"router_jitter_noise": 0.3},
    "phimoe": {"router_jitter_noise": 0.4, "input_jitter_noise": 0.3},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 3, "moe_jitter_eps": 0.3}},
}


@pytest.mark.parametrize("model_type", JITTER)
def test_jitter_is_the_same_with_hooks_in_the_block(model_type: str) -> None:
    def seeded(call: Any, seed: int = 1) -> Any:
        torch.manual_seed(seed)
        return call(tokens())

    hf: Any = build(model_type, **JITTER[model_type]).train()
    with torch.no_grad():
        plain, other = seeded(hf).logits, seeded(hf, 2).logits
        model = HookedMoE.from_hf(hf)
        assert torch.equal(seeded(model), plain)
        heard, cache = seeded(lambda ids: model.run_with_cache(ids, names_filter=lambda name: ".mlp." in name))
        hooks = [(name, lambda value, hook: None) for name in cache]
        assert torch.equal(heard, plain)
        assert torch.equal(seeded(lambda ids: model.run_with_hooks(ids, fwd_hooks=hooks)), plain)
    assert (plain - other).abs().max() > 0.1, "negative control: it matters"
    layer = model.moe_layers[-1]
    kept = {name: cache[names.mlp(name, layer)] for name in (names.ROUTING_WEIGHTS, names.EXPERT_OUT, names.ROUTED_OUT)}
    summed = (kept[names.EXPERT_OUT] * kept[names.ROUTING_WEIGHTS][..., None]).sum(2)
    torch.testing.assert_close(summed, kept[names.ROUTED_OUT])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_number_of_experts_that_the_family_does_not_read_is_refused(top_k: int) -> None:
    """transformers' PhiMoE takes two experts, whatever its config says."""
    if top_k == 2:
        assert HookedMoE.from_hf(build("phimoe", num_experts_per_tok=top_k)).top_k == 2
    else:
        with pytest.raises(SelfCheckError, match=rf"layer 0 gives a token 2 experts, and the config says {top_k}"):
            HookedMoE.from_hf(build("phimoe", num_experts_per_tok=top_k))


def test_gradient_checkpointing_gives_the_same_gradients_and_hooks_fire() -> None:
    plain, saving = build("mixtral").train(), build("mixtral").train()
    checkpoint_activations(saving)
    seen = []
    found = []
    for hf in (plain, saving):
        hooked = HookedMoE.from_hf(hf)
        with hooked.hooks(fwd_hooks=[("blocks.2.hook_expert_out", lambda value, hook: seen.append(value.shape))]):
            hooked(tokens(), return_type="loss").backward()
        found.append({name: parameter.grad for name, parameter in hf.named_parameters()})
    assert len(seen) >= 2
    assert all(torch.allclose(found[0][name], grad, atol=1e-6) for name, grad in found[1].items() if grad is not None)


def shift(value: Any, hook: Any) -> Any:
    return value + torch.arange(value.shape[-1]) / value.shape[-1]


def gradients(hf: Any, hooks: list[Any], outside: bool) -> dict[str, Any]:
    """Of the loss, the backward pass in the context of the hooks or after it."""
    hooked = HookedMoE.from_hf(hf, check=False)
    with hooked.hooks(hooks):
        loss = hooked(tokens(), return_type="loss")
        if not outside:
            loss.backward()
    if outside:
        loss.backward()
    return {name: parameter.grad for name, parameter in hooked.named_parameters()}


@pytest.mark.parametrize("model_type", ["mixtral", "granitemoe"])
@pytest.mark.parametrize("name", ["hook_resid_mid", "mlp.hook_in", "mlp.hook_router_logits", "mlp.experts.2.hook_out"])
def test_checkpointed_layers_have_the_gradients_of_the_pass_that_hooks_edited(model_type: str, name: str) -> None:
    hooks = [(f"blocks.1.{name}", shift)]
    right = gradients(build(model_type).train(), hooks, outside=True)
    for outside in (False, True):
        saving = build(model_type).train()
        checkpoint_activations(saving)
        found = gradients(saving, hooks, outside)
        layers: Any = saving.get_decoder().layers
        assert all(layer.gradient_checkpointing for layer in layers), "all as it was"
        assert all(torch.allclose(found[name], right[name], atol=1e-6) for name in right)
    other = gradients(build(model_type).train(), [], outside=True)
    assert not torch.allclose(other["lm_head.weight"], right["lm_head.weight"], atol=1e-4), "negative control"


def test_a_cache_of_checkpointed_layers_goes_backward_too() -> None:
    saving = build("mixtral").train()
    checkpoint_activations(saving)
    hooked = HookedMoE.from_hf(saving, check=False)
    hooked.run_with_cache(tokens(), return_type="loss")[0].backward()
    found: dict[str, Any] = {name: parameter.grad for name, parameter in hooked.named_parameters()}
    right = gradients(build("mixtral").train(), [], outside=True)
    assert all(torch.allclose(found[name], right[name], atol=1e-5) for name in right)


def test_a_model_on_the_meta_device_is_wrapped_unchecked() -> None:
    with torch.device("meta"):
        hf = MixtralForCausalLM._from_config(config("mixtral"))
    hooked = HookedMoE.from_hf(hf)
    assert (hooked.moe_layers, hooked.n_experts) == ((0, 1, 2, 3), 8)
    assert hooked.W_out[2].is_meta and hooked.W_out[2].shape == (8, 56, 40)


def everything(hf: Any) -> list[Any]:
    """What a model is, by identity: its modules and configs, their classes, attributes, and what those hold."""
    objects = [*hf.modules(), hf.config, hf.config.get_text_config(), hf.generation_config]
    state: list[Any] = [torch.get_rng_state().tolist()]
    for each in objects:
        state += [id(each), type(each)]
        for name, value in vars(each).items():
            state += [name, id(value), copy.copy(value) if isinstance(value, dict | list | set) else repr(type(value))]
    return state


def interrupted(hf: Any, at: int) -> tuple[int, bool]:
    """Wrap a model with a Ctrl-C at the n-th call of a function: the calls that were made, and whether it came through.

    (Where the call is one of the garbage collector's, Python swallows what is raised.)
    """
    calls = 0

    def count(frame: Any, event: str, _: Any) -> None:
        nonlocal calls
        calls += event == "call"
        if event == "call" and calls == at:
            raise KeyboardInterrupt

    gc.disable()
    sys.setprofile(count)
    try:
        HookedMoE.from_hf(hf)
    except KeyboardInterrupt:
        return calls, True
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls, False


SEVERAL = ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe", "jetmoe", "granitemoehybrid", "llama4_text"]
"""Families that are opened in different ways."""


@pytest.mark.parametrize("model_type", SEVERAL)
def test_a_refusal_leaves_a_model_as_it_was(model_type: str) -> None:
    hf: Any = build(model_type)
    with torch.no_grad():
        before, logits = everything(hf), hf(tokens()).logits
        odd = hf.get_output_embeddings().register_forward_hook(lambda m, a, out: out * torch.nan)
        with pytest.raises(SelfCheckError, match="NaN"):
            HookedMoE.from_hf(hf)
        odd.remove()
        assert everything(hf) == before
        assert torch.equal(hf(tokens()).logits, logits)
        assert torch.equal(HookedMoE.from_hf(hf)(tokens()), logits)
        assert everything(hf) != before, "negative control: it is wrapped now"


# An interrupt may strike where a generator is closed: Python then says that it was ignored.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_next"])
def test_ctrl_c_leaves_a_model_as_it_was(model_type: str) -> None:
    hf: Any = build(model_type)
    with torch.no_grad():
        before, logits = everything(hf), hf(tokens()).logits
        calls, _ = interrupted(build(model_type), -1)
        generator = random.Random(0)
        came = 0
        for at in [generator.randrange(1, calls) for _ in range(10)]:
            if not interrupted(hf, at)[1]:
                hf = build(model_type)
                before = everything(hf)
                continue
            came += 1
            assert everything(hf) == before, at
        assert came > 5
        assert torch.equal(HookedMoE.from_hf(hf)(tokens()), logits)


@pytest.mark.parametrize("part", ["gate", "experts", "shared_experts", "mlp"])
def test_parts_that_two_layers_share_are_refused(part: str) -> None:
    hf: Any = build("deepseek_v3")
    of, to = ((layer if part == "mlp" else layer.mlp) for layer in hf.model.layers[1:3])
    setattr(to, part, getattr(of, part))
    with pytest.raises(UnsupportedModelError, match="layers 1 and 2 share a module .*give each its own"):
        HookedMoE.from_hf(hf)
    setattr(to, part, copy.deepcopy(getattr(of, part)))
    right = hf(tokens()).logits
    assert torch.equal(HookedMoE.from_hf(hf)(tokens()), right), "what the message says to do is done"


@pytest.mark.parametrize("model_type", ["olmoe", "deepseek", "gpt_oss"])
@pytest.mark.parametrize("part", ["experts", "router", "mlp"])
def test_a_part_that_another_wrapped_model_has_is_refused(model_type: str, part: str) -> None:
    one, other = build(model_type, seed=1), build(model_type, seed=2)
    of, to = ((layer if part == "mlp" else layer.mlp) for layer in (one.model.layers[1], other.model.layers[1]))
    name = part if hasattr(of, part) else "gate"
    setattr(to, name, getattr(of, name))
    model = HookedMoE.from_hf(one)
    before, kept = model(tokens()), everything(other)
    with pytest.raises(UnsupportedModelError, match="wrapped"):
        HookedMoE.from_hf(other)
    assert everything(other) == kept and torch.equal(model(tokens()), before)


def test_what_cannot_be_wrapped_stays_a_model_of_transformers() -> None:
    hf: Any = build("mixtral")
    hf.model.layers[1].mlp.experts = nn.Identity()  # of no contract
    before = everything(hf)
    with pytest.raises(UnsupportedModelError, match="not under transformers' experts contract"):
        HookedMoE.from_hf(hf)
    assert everything(hf) == before
