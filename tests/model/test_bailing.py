"""Ling and Ring against plain torch written from the original code, on checkpoints in the original's names."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moe_lens.errors import CheckpointError, UnsupportedModelError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.model.families.bailing import BailingMoeRouter, norm_columns
from moe_lens.model.families.deepseek import DeepseekRouter
from moe_lens.model.loading.model_info import model_info
from tests.matrix.configs import build, tokens

GENERATIONS = ("bailing_moe", "bailing_moe_v2")

# config.json of Ling-lite-base, Ling-plus-base and Ling-mini-2.0, less what is the same in each.
SAME: dict[str, Any] = {
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_bailing_moe.BailingMoeConfig"},
    "embedding_dropout": 0.1,
    "hidden_act": "silu",
    "model_type": "bailing_moe",
    "norm_topk_prob": True,
    "output_dropout": 0.1,
    "rope_scaling": None,
    "rope_theta": 600000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": True,
    "use_qkv_bias": False,
}
FIRST: dict[str, Any] = {
    **SAME,
    "architectures": ["BailingMoeForCausalLM"],
    "eos_token_id": 126081,
    "pad_token_id": 126081,
    "first_k_dense_replace": 0,
    "initializer_range": 0.006,
    "max_position_embeddings": 16384,
    "norm_head": True,
    "norm_softmax": False,
    "output_router_logits": False,
    "pretraining_tp": 1,
    "transformers_version": "4.36.0",
    "vocab_size": 126464,
}
LITE = {
    **FIRST,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "num_experts": 64,
    "num_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
}
PLUS = {
    **FIRST,
    "hidden_size": 5376,
    "intermediate_size": 12288,
    "moe_intermediate_size": 3072,
    "num_experts": 64,
    "num_shared_experts": 1,
    "num_attention_heads": 56,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 88,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
}
MINI = {
    **SAME,
    "architectures": ["BailingMoeV2ForCausalLM"],
    "eos_token_id": 156892,
    "pad_token_id": 156892,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "max_position_embeddings": 32768,
    "moe_intermediate_size": 512,
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 512,
    "n_group": 8,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 20,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "topk_group": 4,
    "use_qk_norm": True,
    "use_rmsnorm": True,
    "vocab_size": 157184,
}


def original(stored: dict[str, Tensor], config: dict[str, Any], ids: Tensor, *without: str) -> Tensor:
    """Logits [batch, pos, vocabulary], one token and one expert at a time; parts that are named are left out."""
    heads, kv, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    second = config.get("score_function") == "sigmoid"
    rotated = int(width * (1.0 if "partial" in without else config.get("partial_rotary_factor", 1.0)))

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * stored[f"{name}.weight"]

    def mlp(x: Tensor, name: str) -> Tensor:
        gate, up, down = (stored[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def rotate(x: Tensor) -> Tensor:  # [pos, head, width]
        frequencies = config["rope_theta"] ** -(torch.arange(0, rotated, 2, dtype=x.dtype) / rotated)
        angles = torch.arange(len(x), dtype=x.dtype)[:, None, None] * frequencies
        one, other = x[..., : rotated // 2], x[..., rotated // 2 : rotated]
        turned = (one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin())
        return torch.cat((*turned, x[..., rotated:]), -1)

    def attention(x: Tensor, name: str) -> Tensor:
        joined = (x @ stored[f"{name}.query_key_value.weight"].T).view(len(x), heads + 2 * kv, width)
        q, k, v = joined.split([heads, kv, kv], dim=1)
        if second and "head norms" not in without:
            q, k = norm(q, f"{name}.query_layernorm"), norm(k, f"{name}.key_layernorm")
        q, k = rotate(q), rotate(k)
        out = torch.empty_like(q)
        for head in range(heads):
            scores = q[:, head] @ k[:, head * kv // heads].T / math.sqrt(width)
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            out[:, head] = scores.softmax(-1) @ v[:, head * kv // heads]
        return out.flatten(1) @ stored[f"{name}.dense.weight"].T

    def chosen(logits: Tensor, name: str) -> tuple[Tensor, Tensor]:
        k = config["num_experts_per_tok"]
        if not second:
            weights, experts = logits.softmax(-1).topk(k)
            return experts, weights if "normalisation" in without else weights / weights.sum()
        scores = logits.sigmoid()
        choice = scores if "bias" in without else scores + stored[f"{name}.gate.expert_bias"]
        groups = choice.view(config["n_group"], -1)
        best = groups.topk(2, dim=-1).values.sum(-1).topk(config["topk_group"]).indices
        if "groups" not in without:
            outside = torch.ones(config["n_group"], dtype=torch.bool).index_fill(0, best, False)
            choice = groups.masked_fill(outside[:, None], -torch.inf).flatten()
        experts = choice.topk(k).indices
        weights = scores[experts] / scores[experts].sum()
        return experts, weights * (1.0 if "scale" in without else config["routed_scaling_factor"])

    def block(x: Tensor, name: str) -> Tensor:
        if f"{name}.gate.weight" not in stored:
            return mlp(x, name)
        out = mlp(x, f"{name}.shared_experts")
        for at, row in enumerate(x):
            experts, weights = chosen(stored[f"{name}.gate.weight"] @ row, name)
            for expert, weight in zip(experts.tolist(), weights, strict=True):
                out[at] += weight * mlp(row, f"{name}.experts.{expert}")
        return out

    logits = []
    for text in ids:
        x = stored["model.word_embeddings.weight"][text]
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x = x + attention(norm(x, f"{name}.input_layernorm"), f"{name}.attention")
            x = x + block(norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")
        head = stored["lm_head.weight"]
        if config.get("norm_head") and "head" not in without:
            head = head / (head.norm(dim=0) + 1e-7)
        logits.append(norm(x, "model.norm") @ head.T)
    return torch.stack(logits)


@pytest.fixture(params=GENERATIONS)
def folder(request: Any, tmp_path: Path) -> Path:
    """A tiny checkpoint as the hub has them: all model types are bailing_moe there."""
    model = build(request.param)
    model.save_pretrained(tmp_path)
    edit(tmp_path, model_type="bailing_moe", architectures=[type(model).__name__])
    return tmp_path


def edit(folder: Path, **changes: Any) -> dict[str, Any]:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return config


def read(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.typed
def test_logits_are_the_original_s(folder):
    stored, config = read(folder), edit(folder)
    assert any(name.endswith("attention.query_key_value.weight") for name in stored), "the names are the original's"
    model = HookedMoE.from_pretrained(folder)
    with torch.no_grad():
        logits = model(tokens(2, 9))
        expected = original(stored, config, tokens(2, 9))
        assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
        second = model.family.model_type == "bailing_moe_v2"
        parts = ("head norms", "partial", "bias", "groups", "scale") if second else ("normalisation",)
        for part in parts:  # the controls
            assert (logits - original(stored, config, tokens(2, 9), part)).abs().max() > 1e-2 * expected.abs().max()


def test_what_is_saved_has_the_original_s_names_and_bits(folder, tmp_path):
    stored, model = read(folder), HookedMoE.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    saved = read(tmp_path / "saved")
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[name], stored[name]) for name in stored)
    with torch.no_grad():
        assert torch.equal(HookedMoE.from_pretrained(tmp_path / "saved")(tokens()), model(tokens()))


@pytest.mark.typed
def test_an_unembedding_that_is_stored_with_other_norms_is_divided_by_them_once(tmp_path):
    build("bailing_moe").save_pretrained(tmp_path / "stored")
    config, stored = edit(tmp_path / "stored", norm_head=True), read(tmp_path / "stored")
    with torch.no_grad():
        expected = original(stored, config, tokens(2, 9))
        for model in (
            HookedMoE.from_pretrained(tmp_path / "stored"),
            HookedMoE.from_pretrained(tmp_path / "stored", device_map={"": "disk"}),
            AutoModelForCausalLM.from_pretrained(tmp_path / "stored"),
        ):
            logits = model(tokens(2, 9)) if isinstance(model, HookedMoE) else model(tokens(2, 9)).logits
            assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
        assert (logits - original(stored, config, tokens(2, 9), "head")).abs().max() > 1e-2 * expected.abs().max()
        model = HookedMoE.from_pretrained(tmp_path / "stored")
        assert torch.equal(model.W_U, norm_columns(stored["lm_head.weight"]).T)
        model.save_pretrained(tmp_path / "saved")
        assert not AutoConfig.from_pretrained(tmp_path / "saved").norm_head
        assert torch.equal(HookedMoE.from_pretrained(tmp_path / "saved")(tokens(2, 9)), model(tokens(2, 9)))


def test_an_unembedding_that_is_still_to_be_normed_is_refused() -> None:
    """A model made from a config computes with it as it is, and what is saved would be read as another."""
    model = build("bailing_moe", norm_head=True)
    with pytest.raises(UnsupportedModelError, match=r"config\.norm_head says .* set config\.norm_head = False"):
        HookedMoE.from_hf(model)
    model.lm_head.weight.data = norm_columns(model.lm_head.weight.data)
    model.config.norm_head = False
    with torch.no_grad():
        right = model(tokens()).logits
        assert torch.equal(HookedMoE.from_hf(model)(tokens()), right)


def counted(config: dict[str, Any]) -> tuple[int, int]:
    """Parameters of a config, and those that a token passes: matrix by matrix, as its layers are (biases of routers are
    buffers)."""
    width, heads, kv = (config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head = config.get("head_dim") or width // heads
    second = "num_nextn_predict_layers" in config
    attention = (2 * heads + 2 * kv) * head * width + 2 * width + (2 * head if second else 0)
    expert = 3 * width * config["moe_intermediate_size"]
    dense = config["first_k_dense_replace"]
    sparse = config["num_hidden_layers"] - dense
    always = sparse * (attention + config["num_experts"] * width + config["num_shared_experts"] * expert)
    always += dense * (attention + 3 * width * config["intermediate_size"])
    always += 2 * config["vocab_size"] * width + width
    routed = sparse * expert
    return always + config["num_experts"] * routed, always + config["num_experts_per_tok"] * routed


@pytest.mark.parametrize(
    ("config", "total", "active"), [(LITE, 16.8e9, 2.75e9), (PLUS, 290e9, 28.8e9), (MINI, 16.26e9, 1.44e9)]
)
def test_published_configs_give_the_published_sizes(config, total, active, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    info = model_info(tmp_path)
    assert (info.parameters, info.active) == counted(config)
    # And they are what is published, in two to four digits: 290 billion stand for 290.6, which is .21 % more.
    assert info.parameters == pytest.approx(total, rel=0.0025)
    # 28.8 billion stand for 29.0 (.71 %); an embedding too few would be 2.3 (plus), 9 (lite) or 22 % (mini) less.
    assert info.active == pytest.approx(active, rel=0.0075)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"use_bias": True}, UnsupportedModelError, r"use_bias = True; Ling \(model_type bailing_moe\) computes as if"),
        ({"score_function": "tanh"}, UnsupportedModelError, "score_function = 'tanh'; Ling"),
        ({"twisted": 1}, UnsupportedModelError, "twisted = 1, which Ling does not know and which may change its"),
        ({"num_experts": None}, CheckpointError, "config.json lacks num_experts, without which"),
        ({"num_experts_per_tok": 9}, CheckpointError, "num_experts_per_tok is 9, but there are 8 experts"),
        ({"head_dim": 7}, CheckpointError, "head_dim is 7; expected an even number"),
        (
            {"rope_scaling": {"type": "longrope"}},
            UnsupportedModelError,
            "rope scaling 'longrope'; Ling knows 'default'",
        ),
        ({"partial_rotary_factor": 0.5}, UnsupportedModelError, "partial_rotary_factor = 0.5; Ling"),
        ({"norm_topk_prob": False, "score_function": "sigmoid"}, UnsupportedModelError, "Ling 2 always divides"),
    ],
)
def test_a_config_that_may_be_another_model_is_refused(changes, error, message, tmp_path):
    build("bailing_moe").save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(error, match=message):
        HookedMoE.from_pretrained(tmp_path)


@pytest.mark.parametrize("stage", ["linear", "dynamic", "yarn"])
def test_rope_scaling_is_kept_in_the_original_s_words(stage, tmp_path):
    scaling = {"type": stage, "factor": 4.0} | ({"original_max_position_embeddings": 32} if stage == "yarn" else {})
    build("bailing_moe_v2").save_pretrained(tmp_path)
    edit(tmp_path, rope_scaling=scaling)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_dict()["rope_scaling"] == scaling
    assert config.to_dict()["rope_theta"] == 10000.0 and config.to_dict()["partial_rotary_factor"] == 0.5
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_type"] == stage


def test_layers_that_predict_ahead_are_left_out(tmp_path):
    build("bailing_moe_v2").save_pretrained(tmp_path)
    stored = read(tmp_path)
    ahead = {name.replace("layers.3.", "layers.4."): value.clone() for name, value in stored.items() if ".3." in name}
    edit(tmp_path, num_nextn_predict_layers=1)
    plain = HookedMoE.from_pretrained(tmp_path)
    save_file({**stored, **ahead, "model.layers.4.eh_proj.weight": torch.ones(40, 80)}, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(HookedMoE.from_pretrained(tmp_path)(tokens()), plain(tokens()))


@pytest.mark.typed
def test_the_first_generation_weighs_experts_in_float32_whatever_it_computes_in():
    config = build("bailing_moe").config
    ours, deepseeks = (kind(config).bfloat16() for kind in (BailingMoeRouter, DeepseekRouter))
    torch.nn.init.normal_(ours.weight)
    deepseeks.weight = ours.weight
    logits, weights, indices = ours(torch.randn(5, config.hidden_size).bfloat16())
    assert logits.dtype == torch.bfloat16 and weights.dtype == torch.float32
    chosen = logits.float().softmax(-1).gather(-1, indices)
    assert torch.equal(weights, chosen / chosen.sum(-1, keepdim=True) if config.norm_topk_prob else chosen)
    assert deepseeks.affinities(logits).dtype == torch.bfloat16, "DeepSeekMoE's are rounded"
