"""DeepSeekMoE equals the original code's golden values, and an independent re-implementation in float64."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_lens.model.families.deepseek import DeepseekConfig, DeepseekForCausalLM
from moe_lens.model.hf_compat import cache_of, cache_word
from moe_lens.model.loading.pretrained import load_pretrained
from tests import reference
from tests.model.tiny import (
    BASE,
    TINY,
    base_config,
    base_tensors,
    golden,
    original_shapes,
    prompts,
    random_tensors,
    write_checkpoint,
)
from tests.wrapped import checkpoint_activations

FP32 = 1e-4  # against the original: the bound; 3e-6 with the original's attention is what is measured
EXACT = 1e-9  # float64 against float64

GOLDEN = golden()


def record(model: PreTrainedModel, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Run a plain model and catch what its modules take and return."""
    seen: dict[str, Any] = {}
    handles = []
    for name, module in model.named_modules():

        def keep(_: nn.Module, inputs: tuple[Any, ...], out: Any, name: str = name) -> None:
            seen[f"{name}:in"], seen[name] = inputs, out

        handles.append(module.register_forward_hook(keep))
    try:
        return model(*args, **kwargs), seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module", params=["eager", "grouped_mm"])
def run(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    model, _ = load_pretrained(str(BASE), attn_implementation="eager", experts_implementation=request.param)
    assert isinstance(model, DeepseekForCausalLM)
    ids = GOLDEN["input_ids"]
    with torch.no_grad():
        return record(model, ids, labels=ids, output_attentions=True, output_router_logits=True)


def close(ours: Tensor, theirs: Tensor, atol: float) -> None:
    assert ours.shape == theirs.shape
    assert not ours.isnan().any()
    assert (ours - theirs).abs().max().item() <= atol


def test_logits_and_loss_are_the_original_s(run: tuple[Any, dict[str, Any]]) -> None:
    out, seen = run
    close(out.logits, GOLDEN["logits"], 1e-5)
    close(out.loss, GOLDEN["loss"], 1e-5)
    close(seen["model.norm"], GOLDEN["final_norm_out"], 1e-5)


def test_negative_control_a_wrong_epsilon_is_seen() -> None:
    model, _ = load_pretrained(str(BASE), rms_norm_eps=1e-5)
    with torch.no_grad():
        assert (model(GOLDEN["input_ids"]).logits - GOLDEN["logits"]).abs().max() > FP32


@pytest.mark.parametrize("layer", range(4))
def test_every_residual_and_attention_pattern_is_the_original_s(run: tuple[Any, dict[str, Any]], layer: int) -> None:
    out, seen = run
    name, key = f"model.layers.{layer}", f"L{layer}."
    close(seen[f"{name}:in"][0], GOLDEN[f"{key}resid_pre"], FP32)
    close(seen[f"{name}.input_layernorm"], GOLDEN[f"{key}ln1_out"], FP32)
    close(seen[f"{name}.self_attn"][0], GOLDEN[f"{key}attn_out"], FP32)
    close(out.attentions[layer], GOLDEN[f"{key}attn_pattern"], FP32)
    close(seen[f"{name}.post_attention_layernorm:in"][0], GOLDEN[f"{key}resid_mid"], FP32)
    close(seen[f"{name}.post_attention_layernorm"], GOLDEN[f"{key}mlp_in"], FP32)
    close(seen[f"{name}.mlp"], GOLDEN[f"{key}mlp_out"], FP32)
    close(seen[name], GOLDEN[f"{key}resid_post"], FP32)


@pytest.mark.parametrize("layer", range(1, 4))
def test_routing_is_the_original_s(run: tuple[Any, dict[str, Any]], layer: int) -> None:
    out, seen = run
    key, (batch, pos) = f"L{layer}.", GOLDEN["input_ids"].shape
    logits, weights, indices = (t.view(batch, pos, -1) for t in seen[f"model.layers.{layer}.mlp.gate"])
    rank = weights.argsort(-1, descending=True)
    close(logits, GOLDEN[f"{key}router_logits"], FP32)
    close(logits.softmax(-1), GOLDEN[f"{key}router_probs"], FP32)
    assert torch.equal(indices.gather(-1, rank), GOLDEN[f"{key}topk_idx"])
    close(weights.gather(-1, rank), GOLDEN[f"{key}topk_weight"], FP32)
    assert torch.equal(out.router_logits[layer - 1].view(batch, pos, -1), logits)
    close(seen[f"model.layers.{layer}.mlp.shared_experts"], GOLDEN[f"{key}shared_out"], FP32)
    close(seen[f"model.layers.{layer}.mlp.experts"].view(batch, pos, -1), GOLDEN[f"{key}routed_out"], FP32)


@pytest.mark.parametrize("layer", range(1, 4))
def test_each_active_expert_is_the_original_s(layer: int) -> None:
    model, _ = load_pretrained(str(BASE))
    experts: Any = model.get_submodule(f"model.layers.{layer}.mlp.experts")
    key = f"L{layer}."
    x, indices = GOLDEN[f"{key}mlp_in"], GOLDEN[f"{key}topk_idx"]
    with torch.no_grad():
        act = experts._apply_gate(torch.einsum("bpd,bpkmd->bpkm", x, experts.gate_up_proj[indices]))
        out = torch.einsum("bpkm,bpkdm->bpkd", act, experts.down_proj[indices])
        alone = torch.stack(
            [experts(x.flatten(0, 1), indices[..., [r]].flatten(0, 1), torch.ones(48, 1)).view_as(x) for r in range(4)],
            dim=2,
        )
    close(act, GOLDEN[f"{key}expert_act"], FP32)
    close(out, GOLDEN[f"{key}expert_out"], FP32)
    close(alone, GOLDEN[f"{key}expert_out"], FP32)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_loss_gradients_are_the_original_s(implementation: str) -> None:
    model, _ = load_pretrained(str(BASE), attn_implementation="eager", experts_implementation=implementation)
    ids = GOLDEN["input_ids"]
    model(ids, labels=ids).loss.backward()
    parameters = dict(model.named_parameters())
    stored = {name.removeprefix("grad."): value for name, value in GOLDEN.items() if name.startswith("grad.")}
    assert len(stored) > 20
    for name, theirs in stored.items():
        ours = gradient(parameters, name)
        close(ours, theirs, FP32)
    assert max(t.abs().max().item() for t in stored.values()) > 100 * FP32  # the bound is not vacuous


def gradient(parameters: dict[str, nn.Parameter], name: str) -> Tensor:
    """Gradient of a tensor by its original name."""
    if ".mlp.experts." not in name:
        grad = parameters[name].grad
        assert grad is not None
        return grad
    layer, _, rest = name.partition(".experts.")
    e, matrix, _ = rest.split(".")
    packed = parameters[f"{layer}.experts.{'down_proj' if matrix == 'down_proj' else 'gate_up_proj'}"].grad
    assert packed is not None
    if matrix == "down_proj":
        return packed[int(e)]
    return packed[int(e)].chunk(2, 0)[0 if matrix == "gate_proj" else 1]


def test_greedy_continuation_is_the_original_s_with_and_without_cache() -> None:
    model: Any = load_pretrained(str(BASE))[0]
    ids = GOLDEN["input_ids"]
    for use_cache in (True, False):
        out = model.generate(
            ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use_cache, pad_token_id=1
        )
        assert torch.equal(out[:, ids.shape[1] :], GOLDEN["greedy_8"])


@pytest.mark.parametrize(
    ("implementation", "dtype", "atol"),
    [("eager", "float64", EXACT), ("eager", "float32", 4e-6), ("grouped_mm", "float32", 4e-6)],
)
def test_kv_cache_changes_nothing(implementation: str, dtype: str, atol: float) -> None:
    """Bounds are relative to the largest logit, 7.5: products of matrices of other shapes round otherwise."""
    model, _ = load_pretrained(str(BASE), experts_implementation=implementation, dtype=dtype)
    ids = GOLDEN["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        past, steps, word = None, [], cache_word(type(model).forward)
        for chunk in (ids[:, :7], *ids[:, 7:].split(1, dim=1)):
            out = model(chunk, **{word: past}, use_cache=True)
            past = cache_of(out)
            steps.append(out.logits)
    close(torch.cat(steps, 1), whole, atol * whole.abs().max().item())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_on_real_tokens(side: str) -> None:
    model, _ = load_pretrained(str(BASE))
    short, long = GOLDEN["input_ids"][:1, :15], GOLDEN["input_ids"][1:]
    pad = torch.full((1, long.shape[1] - 15), 1)
    padded = torch.cat([pad, short] if side == "left" else [short, pad], 1)
    ids = torch.cat([padded, long])
    mask = torch.ones_like(ids)
    mask[0, : pad.shape[1]] = 0 if side == "left" else 1
    mask[0, 15:] = mask[0, 15:] if side == "left" else 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions).logits
        alone = model(short).logits[0], model(long).logits[0]
    close(out[0][mask[0].bool()], alone[0], 1e-5)
    close(out[1], alone[1], 1e-5)
    theirs = reference.forward(base_tensors(), base_config(), ids, attention_mask=mask, position_ids=positions)
    close(out[mask.bool()].double(), theirs["logits"][mask.bool()], FP32)


VARIANTS: dict[str, dict[str, Any]] = {
    "original": {},
    "norm_topk_prob": {"norm_topk_prob": True},
    "one expert, normalised": {"norm_topk_prob": True, "num_experts_per_tok": 1},
    "all experts": {"num_experts_per_tok": 8},
    "grouped-query attention": {"num_key_value_heads": 2},
    "multi-query attention": {"num_key_value_heads": 1},
    "every other layer": {"moe_layer_freq": 2},
    "no dense layer": {"first_k_dense_replace": 0},
    "dense layers only": {"first_k_dense_replace": 4},
    "no shared experts": {"n_shared_experts": None},
    "zero shared experts": {"n_shared_experts": 0},
    "attention bias": {"attention_bias": True},
    "tied embeddings": {"tie_word_embeddings": True},
    "another rotary base": {"rope_theta": 500000.0},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "dynamic rope, short": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "dynamic rope, long": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    "another epsilon": {"rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_is_the_reference_s(variant: str, tmp_path: Path) -> None:
    config = {**TINY, **VARIANTS[variant]}
    tensors = random_tensors(config, torch.float64)
    model, _ = load_pretrained(str(write_checkpoint(tmp_path, config, tensors)), dtype="float64")
    ids = prompts()
    theirs = reference.forward(tensors, config, ids)
    with torch.no_grad():
        out, seen = record(model, ids, labels=ids)
    close(out.logits, theirs["logits"], EXACT)
    close(out.loss, theirs["loss"].float(), 1e-6)  # transformers computes the loss in float32, whatever the logits are
    for layer in range(4):
        close(seen[f"model.layers.{layer}"], theirs[f"blocks.{layer}.hook_resid_post"], EXACT)
    if VARIANTS[variant] and original_shapes(config) == original_shapes(TINY):  # is it another model at all?
        changed = (reference.forward(tensors, TINY, ids)["logits"] - theirs["logits"]).abs().max().item()
        assert (changed > 1e-3) == (variant != "dynamic rope, short")


def test_float64_of_the_fixture_is_the_reference_s_and_the_reference_is_the_original_s() -> None:
    theirs = reference.forward(base_tensors(), base_config(), GOLDEN["input_ids"])
    model, _ = load_pretrained(str(BASE), dtype=torch.float64)
    with torch.no_grad():
        close(model(GOLDEN["input_ids"]).logits, theirs["logits"], EXACT)
    for name, key in {
        "hook_embed": "embed",
        "logits": "logits",
        "loss": "loss",
        "ln_final.out": "final_norm_out",
        **{
            f"blocks.{i}.hook_{part}": f"L{i}.{part}"
            for i in range(4)
            for part in ("resid_pre", "resid_mid", "attn_out")
        },
        **{f"blocks.{i}.mlp.hook_router_logits": f"L{i}.router_logits" for i in range(1, 4)},
        **{f"blocks.{i}.mlp.hook_routing_weights": f"L{i}.topk_weight" for i in range(1, 4)},
        **{f"blocks.{i}.mlp.hook_expert_post": f"L{i}.expert_act" for i in range(1, 4)},
        **{f"blocks.{i}.mlp.hook_expert_out": f"L{i}.expert_out" for i in range(1, 4)},
        **{f"blocks.{i}.mlp.hook_shared_out": f"L{i}.shared_out" for i in range(1, 4)},
        **{f"blocks.{i}.mlp.hook_routed_out": f"L{i}.routed_out" for i in range(1, 4)},
        **{f"blocks.{i}.attn.hook_pattern": f"L{i}.attn_pattern" for i in range(4)},
    }.items():
        close(theirs[name].to(torch.float32), GOLDEN[key], FP32)
    for i in range(1, 4):
        assert torch.equal(theirs[f"blocks.{i}.mlp.hook_expert_indices"], GOLDEN[f"L{i}.topk_idx"])


def edits() -> dict[str, Callable[[str, Tensor], Tensor]]:
    """The interventions of the golden file, for the reference."""
    layer, expert = int(GOLDEN["iv.layer"]), int(GOLDEN["iv.expert"])
    indices = GOLDEN[f"L{layer}.topk_idx"]

    def on(hook: str, change: Callable[[Tensor], Tensor]) -> Callable[[str, Tensor], Tensor]:
        return lambda name, value: change(value) if name == f"blocks.{layer}.{hook}" else value

    def mask_logit(logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[..., expert] = float("-inf")
        return logits

    def patch(resid: Tensor) -> Tensor:
        resid = resid.clone()
        resid[0, 5] = resid[1, 5]
        return resid

    return {
        "zero_expert": on("mlp.hook_expert_out", lambda out: out.masked_fill((indices == expert)[..., None], 0.0)),
        "mask_router_logit": on("mlp.hook_router_logits", mask_logit),
        "uniform_weights": on("mlp.hook_routing_weights", lambda weights: torch.full_like(weights, 0.25)),
        "patch_resid_pre_p0_pos5": on("hook_resid_pre", patch),
    }


@pytest.mark.parametrize("name", edits())
def test_interventions_on_the_reference_are_the_original_s(name: str) -> None:
    theirs = reference.forward(base_tensors(), base_config(), GOLDEN["input_ids"], edit=edits()[name])["logits"].float()
    close(theirs, GOLDEN[f"iv.{name}.logits"], FP32)
    assert (theirs - GOLDEN["logits"]).abs().max() > 100 * FP32


def test_rope_scaling_in_transformers_5_s_own_words_is_the_same() -> None:
    old = {**TINY, "rope_scaling": {"type": "linear", "factor": 3.0}}
    new = {k: v for k, v in TINY.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000}
    models = [DeepseekForCausalLM(DeepseekConfig(**config)) for config in (old, new)]
    first, second = (model.model.rotary_emb.inv_freq for model in models)
    assert torch.equal(first, second)
    plain = 1.0 / 10000 ** (torch.arange(0, 8, 2).float() / 8)
    close(first, plain / 3, 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rotary_frequencies_survive_loading(dtype: torch.dtype, tmp_path: Path) -> None:
    """They are a buffer that no checkpoint holds: transformers has to make them anew after loading."""
    folder = write_checkpoint(tmp_path, TINY, random_tensors(TINY))
    expected = 1.0 / 10000 ** (torch.arange(0, 8, 2).float() / 8)
    for model in (
        load_pretrained(str(folder), dtype=dtype)[0],
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
    ):
        rotary: Any = model.get_submodule("model.rotary_emb")
        assert rotary.inv_freq.dtype == torch.float32
        assert torch.equal(rotary.inv_freq, expected)
        assert torch.equal(rotary.original_inv_freq, expected)


def test_dynamic_rope_forgets_a_long_text() -> None:
    config = DeepseekConfig(
        **{**TINY, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8}
    )
    model = DeepseekForCausalLM(config).eval()
    short, long = prompts(pos=6), prompts(pos=20)
    with torch.no_grad():
        before = model(short).logits
        model(long)
        assert torch.equal(model(short).logits, before)


@pytest.mark.parametrize(("dtype", "mean"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_half_precision_agrees_on_the_whole(dtype: torch.dtype, mean: float) -> None:
    """Ties and near-ties route some tokens elsewhere, so single logits may differ; their mean may not."""
    model, _ = load_pretrained(str(BASE), dtype=dtype)
    with torch.no_grad():
        logits = model(GOLDEN["input_ids"]).logits
    assert logits.dtype == dtype
    assert (logits.float() - GOLDEN["logits"]).abs().mean() < mean
    assert (GOLDEN["logits"] - GOLDEN["logits"].mean()).abs().mean() > 1


def test_router_computes_in_the_model_s_dtype() -> None:
    model, _ = load_pretrained(str(BASE), dtype=torch.bfloat16)
    router: Any = model.get_submodule("model.layers.1.mlp.gate")
    x = GOLDEN["L1.mlp_in"].bfloat16()
    logits, weights, indices = router(x)
    assert logits.dtype == weights.dtype == torch.bfloat16
    affinity = torch.nn.functional.linear(x.view(-1, 64), router.weight).softmax(-1)
    assert torch.equal(weights, affinity.gather(-1, indices))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_implementations_agree(attention: str) -> None:
    model, _ = load_pretrained(str(BASE), attn_implementation=attention)
    assert model.config._attn_implementation == attention
    with torch.no_grad():
        close(model(GOLDEN["input_ids"]).logits, GOLDEN["logits"], 2e-5)


def test_experts_implementation_is_a_setting() -> None:
    model, _ = load_pretrained(str(BASE), experts_implementation="eager")
    assert model.config._experts_implementation == "eager"
    model.set_experts_implementation("grouped_mm")
    experts: Any = model.get_submodule("model.layers.2.mlp.experts")
    assert experts.config._experts_implementation == "grouped_mm"
    assert (experts.has_gate, experts.has_bias, experts.is_transposed, experts.num_experts) == (True, False, False, 16)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    ids = GOLDEN["input_ids"]
    model, _ = load_pretrained(str(BASE))
    model.train()
    other = copy.deepcopy(model)
    checkpoint_activations(other)
    for each in (model, other):
        each(ids, labels=ids, use_cache=False).loss.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad is not None and torch.equal(p.grad, q.grad), name


def test_the_16b_model_has_its_size() -> None:
    config = json.loads((Path(__file__).parent / "deepseek_moe_16b.json").read_text())
    with torch.device("meta"):
        model = DeepseekForCausalLM(DeepseekConfig(**config))
    assert sum(p.numel() for p in model.parameters()) == 16_375_728_128
    assert [i for i in range(28) if not hasattr(model.model.layers[i].mlp, "experts")] == [0]
