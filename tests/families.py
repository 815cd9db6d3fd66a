"""Tiny random models of the supported families, decisive in their routing and without accidental equality of widths."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moe_lens.model.families.deepseek as _registers  # noqa: F401  # pyright: ignore[reportUnusedImport]

COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MLA = {
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
QWEN = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek": ("deepseek", DEEPSEEK),
    "deepseek, normalised": ("deepseek", {**DEEPSEEK, "norm_topk_prob": True, "n_shared_experts": None}),
    "deepseek_v2": (
        "deepseek_v2",
        {**DEEPSEEK, **MLA, "head_dim": 8, "topk_method": "greedy", "routed_scaling_factor": 1.5},
    ),
    "deepseek_v2, groups": (
        "deepseek_v2",
        {**DEEPSEEK, **MLA, "head_dim": 8, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "deepseek_v3": ("deepseek_v3", {**DEEPSEEK, **MLA, "n_group": 4, "topk_group": 2}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 8, "sliding_window": 8}),
    "mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 3}),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 3}),
    "qwen2_moe": (
        "qwen2_moe",
        {**QWEN, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {**QWEN, "head_dim": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random model of the family, with biases and router rows large enough to matter."""
    model_type, special = CONFIGS[name]
    config = CONFIG_MAPPING[model_type](**{**COMMON, **special, **changes})
    generator = torch.Generator().manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            std = 0.1 if "bias" in parameter_name else 0.25
            if parameter.dim() >= 2 or "bias" in parameter_name or "sinks" in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            elif "norm" in parameter_name:
                parameter.copy_(1 + torch.randn(parameter.shape, generator=generator) * 0.3)
        for buffer_name, buffer in model.named_buffers():
            if "correction_bias" in buffer_name:
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model


def tokens(batch: int = 2, pos: int = 12, seed: int = 1) -> torch.Tensor:
    """Random tokens, none of them special."""
    return torch.randint(3, 101, (batch, pos), generator=torch.Generator().manual_seed(seed))
