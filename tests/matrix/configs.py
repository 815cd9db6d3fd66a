"""A tiny random model of every model type that moe_lens supports: decisive in its routing, no two widths equal."""

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from moe_lens.model.families.bailing import BailingMoeForCausalLM, BailingMoeV2ForCausalLM
from moe_lens.model.families.deepseek import DeepseekForCausalLM
from moe_lens.model.families.table import FAMILIES, here

OWN: dict[str, Any] = {
    "bailing_moe": BailingMoeForCausalLM,
    "bailing_moe_v2": BailingMoeV2ForCausalLM,
    "deepseek": DeepseekForCausalLM,
}
"""Model types of which transformers has no code."""

VOCABULARY, EXPERTS, TOP_K, LAYERS = 101, 8, 3, 4

# Taken by a config class that has the field, under whichever of its names.
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_topk": TOP_K,
    "moe_top_k": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "sliding_window": 8,
    # Factors that are 1 by default would hide where they are applied.
    "routed_scaling_factor": 1.7,
    "router_scaling_factor": 1.7,
    "moe_routed_scaling_factor": 1.7,
    "route_scale": 1.7,
    "residual_multiplier": 0.6,
    "embedding_multiplier": 2.5,
    "logits_scaling": 0.8,
    "logit_scale": 0.7,
    "logits_mup_width_multiplier": 1.4,
    "norm_topk_prob": True,
}
MLA: dict[str, Any] = {"head_dim": None, "num_key_value_heads": 4}
LING: dict[str, Any] = {"num_local_experts": None, "n_routed_experts": None, "n_shared_experts": None}
# With fewer heads many scores of the indexer are 0, and which of equals is taken depends on the length of a row.
INDEXED: dict[str, Any] = {"index_head_dim": 8, "index_n_heads": 8, "index_topk": 8}
DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

# What a model type needs beside BASE; None takes a field of BASE away.
SPECIAL: dict[str, dict[str, Any]] = {
    "deepseek": {"num_experts": None, "num_local_experts": None},
    "bailing_moe": {**LING, "n_group": None, "topk_group": None, "routed_scaling_factor": None},
    "bailing_moe_v2": {
        **LING,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "bailing_hybrid": {**MLA, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2},
    "kimi_linear": {
        **MLA,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "axk1": MLA,
    "axk2": {**MLA, **INDEXED},
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "cohere2_moe": {
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "prefix_dense_intermediate_size": 48,
        "shared_expert_combination_strategy": "average",
        "expert_selection_fn": "sigmoid",
    },
    "dbrx": {
        "hidden_size": None,  # the experts' own config takes it by its other name alone
        "d_model": 40,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K},
    },
    "deepseek_v2": {**MLA, "head_dim": 8, "topk_method": "group_limited_greedy"},
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "topk_method": "group_limited_greedy",
    },
    "deepseek_v3": MLA,
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"]},
    "deepseek_v32": {**MLA, **INDEXED},
    "glm4_moe_lite": MLA,
    "glm5_next_text": {
        **MLA,
        **INDEXED,
        "qk_rope_head_dim": 0,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "index_kpool": 4,
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "glm_moe_dsa": {**MLA, **INDEXED},
    "dots3_note_text": {
        **MLA,
        **INDEXED,
        "head_dim": 20,
        "shared_experts_intermediate_size": 32,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 12,
        "swa_kv_lora_rank": 20,
        "swa_head_dim": 20,
        "swa_qk_nope_head_dim": 12,
        "swa_v_head_dim": 16,
    },
    "hy_v4_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "lara_mini": {
        **DELTA,
        "layer_types": ["linear_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [24, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 1]},
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,  # 5.24 refuses first layers that lack a kind
        "global_head_dim": 8,
        "final_logit_softcapping": 5.0,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 10,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
    },
    "jamba": {
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "glm4v_moe_text": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.5,
        },
    },
    "mistral_large4_text": MLA,
    "muse_spark_text": {
        "moe_hidden_size": 32,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "output_multiplier": 0.6,
        "final_logit_softcapping": 5.0,
    },
    "llama4_text": {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
    "longcat_flash": {**MLA, "head_dim": 8, "num_layers": LAYERS, "zero_expert_num": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mistral4": MLA,
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 32,
        "layers_block_type": ["mamba", "attention", "moe", "moe"],
    },
    "phimoe": {"num_experts_per_tok": 2, "router_jitter_noise": 0.4},
    "qwen3_next": DELTA,
    "qwen3_5_moe_text": DELTA,
    "qwen4_exp_text": {
        **DELTA,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 12,
    },
    "unlimited_ocr_text": {"topk_method": "group_limited_greedy"},
    "step3p5": {
        "share_expert_dim": 32,
        "moe_router_scaling_factor": 1.7,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "swiglu_limits": [None, 0.5, 0.5, 0.5],
    },
    "laguna": {"moe_router_logit_softcapping": 2.0},
    "zaya": {"num_experts_per_tok": 1},
}


# Multimodal model types: the one whose config describes the text part.
TEXT = {
    "aria": "aria_text",
    "deepseek_ocr2": "deepseek_ocr2_text",
    "ernie4_5_vl_moe": "ernie4_5_vl_moe_text",
    "gemma4": "gemma4_text",
    "glm4v_moe": "glm4v_moe_text",
    "glm5_next": "glm5_next_text",
    "hy_v4_vl": "hy_v4_vl_text",
    "inkling2": "inkling2_text",
    "inkling_mm_model": "inkling_text",
    "kimi_k25": "deepseek_v3",
    "llama4": "llama4_text",
    "minimax_m3_vl": "minimax_m3_vl_text",
    "mistral_large4": "mistral_large4_text",
    "muse_spark": "muse_spark_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "qwen4_exp": "qwen4_exp_text",
    "unlimited_ocr": "unlimited_ocr_text",
    "step3p7": "step3p5",
}
# Of the parts that read images and sound, which no test runs.
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "mlp_dim": 48,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_heads": 4,
    "out_hidden_size": 40,
    "projection_intermediate_size": 48,
    "projection_hidden_dim": 48,
    "posemb_grid_size": 4,
    "mel_vocab_size": 64,
    "text_hidden_size": 40,
    "image_size": 28,
    "patch_size": 14,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "layer_types": None,
    "output_channels": 16,
    "downsample_channels": [16, 32],
    "global_attn_indexes": [0],
}
# Of some model types: a tower has as many layers as the size of a patch has factors, or as its lists are long.
TOWERS: dict[str, dict[str, Any]] = {
    "inkling_mm_model": {"patch_size": 4, "n_layers": 4, "n_mel_bins": 4},
    "muse_spark": {"num_hidden_layers": 4, "hidden_sizes": [8] * 4, "depths": [1] * 4, "patch_temporal": 1},
}
# Beside the parts.
OUTER: dict[str, dict[str, Any]] = {"muse_spark": {"out_hidden_size": 40, "projector_hidden_size": 48}}


def tower(default: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The config of a part that reads images or sound, made tiny, and the configs inside it."""
    fields = {name: value for name, value in {**TOWER, **changes}.items() if name in default}
    within = {name: tower(value, changes) for name, value in default.items() if name.endswith("_config") and value}
    return {**fields, **within, "model_type": default["model_type"]}


def config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A tiny config of a model type; fields that it does not have are left out."""
    classes: Any = CONFIG_MAPPING
    cls: Any = classes[model_type]
    if model_type in TEXT:
        default = cls().to_dict()
        towers = {
            key: tower(default[key], TOWERS.get(model_type, {}))
            for key in ("vision_config", "audio_config")
            if default.get(key)
        }
        return cls(
            text_config=config(TEXT[model_type], **changes).to_dict(),
            **towers,
            **OUTER.get(model_type, {}),
            tie_word_embeddings=False,
        )
    probe = cls()
    known = {*probe.to_dict(), *getattr(probe, "attribute_map", {})}
    fields = {key: value for key, value in BASE.items() if key in known}
    fields |= {**SPECIAL.get(model_type, {}), **changes}
    return cls(**{key: value for key, value in fields.items() if value is not None})


def class_of(model_type: str) -> Any:
    """The transformers class that computes next-token logits for a model type."""
    if model_type in OWN:
        return OWN[model_type]
    of_text = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,)
    multimodal = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    mappings: Any = (*multimodal, *of_text) if model_type in TEXT else (*of_text, *multimodal)
    for mapping in mappings:
        if model_type in mapping:
            return getattr(transformers, mapping[model_type])
    raise KeyError(model_type)


def build(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random model, with biases, norms and router rows large enough to matter.

    A test is skipped where the family is not supported on the transformers that is installed.
    """
    if model_type in FAMILIES and model_type not in here():
        pytest.skip(f"{model_type}: {FAMILIES[model_type].releases()}")
    made = config(model_type, **changes)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = class_of(model_type)._from_config(made, dtype=dtype).eval()

    strict = model._keep_in_fp32_modules_strict or ()  # as from_pretrained does
    for name, parameter in model.named_parameters():
        if any(part in name for part in strict):
            parameter.data = parameter.data.float()

    def draw(value: Tensor, std: float) -> Tensor:
        return torch.randn(value.shape, generator=generator) * std

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.copy_(draw(parameter, 0.25))
            elif "bias" in name or "sinks" in name:
                parameter.copy_(draw(parameter, 0.1))
            elif "norm" in name or name.endswith(("router.scale", "per_expert_scale")):
                parameter.add_(draw(parameter, 0.3))
        for name, buffer in model.named_buffers():
            if "correction_bias" in name or "expert_bias" in name:
                buffer.copy_(draw(buffer, 0.1))
            elif name.endswith("layer_scalar"):
                buffer.fill_(0.8)
            elif name.endswith("tid2eid"):  # experts by token id
                buffer.copy_(torch.rand(len(buffer), EXPERTS, generator=generator).argsort(-1)[:, : buffer.shape[1]])
    return model


@cache
def tokens(batch: int = 2, pos: int = 12, seed: int = 1) -> Tensor:
    """Random tokens, none of them special."""
    return torch.randint(3, VOCABULARY, (batch, pos), generator=torch.Generator().manual_seed(seed))
