"""Tiny random DeepSeekMoE models and their checkpoints, and the golden values of the original code."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FIXTURE = Path(__file__).parent.parent / "fixtures" / "deepseek_v1"
BASE = FIXTURE / "base"

TINY: dict[str, Any] = {
    "model_type": "deepseek",
    "architectures": ["DeepseekForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}


def golden() -> dict[str, Tensor]:
    return load_file(FIXTURE / "golden_base.safetensors")


def base_tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: value.to(dtype) for name, value in load_file(BASE / "model.safetensors").items()}


def base_config() -> dict[str, Any]:
    return json.loads((BASE / "config.json").read_text())


def original_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the original checkpoint format, written out by hand."""
    d, m, heads = config["hidden_size"], config["moe_intermediate_size"], config["num_attention_heads"]
    kv = d // heads * (config.get("num_key_value_heads") or heads)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], d)}

    def mlp(prefix: str, width: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = shapes[f"{prefix}.up_proj.weight"] = (width, d)
        shapes[f"{prefix}.down_proj.weight"] = (d, width)

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, width in (("q", d), ("k", kv), ("v", kv), ("o", d)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (width, d)
            if config.get("attention_bias"):
                shapes[f"{prefix}.self_attn.{name}_proj.bias"] = (width,)
        shapes[f"{prefix}.input_layernorm.weight"] = shapes[f"{prefix}.post_attention_layernorm.weight"] = (d,)
        if layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0:
            shapes[f"{prefix}.mlp.gate.weight"] = (config["n_routed_experts"], d)
            for e in range(config["n_routed_experts"]):
                mlp(f"{prefix}.mlp.experts.{e}", m)
            if config.get("n_shared_experts"):
                mlp(f"{prefix}.mlp.shared_experts", config["n_shared_experts"] * m)
        else:
            mlp(f"{prefix}.mlp", config["intermediate_size"])
    shapes["model.norm.weight"] = (d,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    return shapes


def random_tensors(config: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a size at which routing is decided and every part counts."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        value = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            return 1 + 0.2 * value
        scale = 1.0 if "embed" in name or name.endswith("bias") else 2.0 * shape[-1] ** -0.5
        return value * scale

    return {name: draw(name, shape).to(dtype) for name, shape in original_shapes(config).items()}


def write_checkpoint(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1, **extra: Any
) -> Path:
    """A checkpoint in the original format; with several shards, tensors are dealt out so that every layer straddles."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, **extra}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: value for j, (name, value) in enumerate(sorted(tensors.items())) if j % shards == i}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def prompts(batch: int = 2, pos: int = 12, vocab: int = 96, seed: int = 1) -> Tensor:
    return torch.randint(2, vocab, (batch, pos), generator=torch.Generator().manual_seed(seed))
