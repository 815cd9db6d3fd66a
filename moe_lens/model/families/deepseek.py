"""`model_type "deepseek"` for transformers: DeepSeekMoE (arXiv 2401.06066), as in `deepseek-ai/deepseek-moe-16b-*`.

Transformers has DeepSeek-V2 and V3 but not this first one, and the hub's own code for it no longer imports. The model
is DeepSeek-V2's shell with Llama's attention and a router of its own; experts run through transformers' experts
interface (`eager`, `grouped_mm`, …). Importing this module registers the family with `AutoConfig`, `AutoModel` and
`AutoModelForCausalLM`, and the first model its checkpoint conversion, so that `from_pretrained` reads, and
`save_pretrained` writes, the original tensor names (`model.layers.N.mlp.experts.E.gate_proj.weight`, …).
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from moe_lens.model.families.deepseek_config import DeepseekConfig
from moe_lens.model.families.own_model import OwnModel
from moe_lens.model.hf_compat import (
    GradientCheckpointingLayer,
    OutputRecorder,
    dynamic_rope_update,
    get_checkpoint_conversion_mapping,
    initialization,
    register_checkpoint_conversion_mapping,
)

__all__ = ["DeepseekConfig", "DeepseekForCausalLM", "DeepseekModel"]


class DeepseekRMSNorm(v2.DeepseekV2RMSNorm):
    """RMSNorm in float32, or in float64 for a float64 model (transformers' own would round that to float32)."""

    def forward(self, hidden_states: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Divide by √(mean x² + ε), multiply by the gain."""
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class DeepseekRotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary tables from float32 frequencies, in float32, or in float64 for a float64 model."""

    inv_freq: Tensor

    @torch.no_grad()
    @dynamic_rope_update
    def forward(
        self, x: Float[Tensor, "batch pos d"], position_ids: Int[Tensor, "rows pos"]
    ) -> tuple[Float[Tensor, "rows pos head"], Float[Tensor, "rows pos head"]]:
        """Cosine and sine of position · frequency, in the dtype of `x`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        angles = position_ids[..., None].to(wide) * self.inv_freq.to(x.device, wide)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class DeepseekRouter(nn.Module):
    """Softmax over all experts in the model's dtype, then top-k, then, if the config says so, weights that sum to 1."""

    def __init__(self, config: Any):  # DeepSeekMoE's, or one of its names
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim))

    def forward(
        self, hidden_states: Float[Tensor, "*rows d"]
    ) -> tuple[Float[Tensor, "tokens n_experts"], Float[Tensor, "tokens top_k"], Int[Tensor, "tokens top_k"]]:
        """Logits of all experts, routing weights and indices of the selected, in no particular order."""
        logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        weights, indices = self.affinities(logits).topk(self.top_k, dim=-1, sorted=False)
        if self.top_k > 1 and self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights, indices

    def affinities(self, logits: Float[Tensor, "tokens n_experts"]) -> Float[Tensor, "tokens n_experts"]:
        """Softmax over all experts."""
        return logits.softmax(dim=-1)


class DeepseekMoE(nn.Module):
    """Routed experts and, where there are any, shared experts fused into one MLP (paper, eq. 9–11)."""

    def __init__(self, config: DeepseekConfig):
        super().__init__()
        ours: Any = config  # transformers' parts are annotated with their own family's config
        shared_width = (config.n_shared_experts or 0) * config.moe_intermediate_size
        self.gate = DeepseekRouter(config)
        self.experts = v2.DeepseekV2Experts(ours)
        self.shared_experts = v2.DeepseekV2MLP(ours, intermediate_size=shared_width) if shared_width else None

    def forward(self, hidden_states: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        """Σ weight · expert(x) over the selected experts, plus the shared experts."""
        _, weights, indices = self.gate(hidden_states)
        routed = self.experts(hidden_states.reshape(-1, hidden_states.shape[-1]), indices, weights)
        routed = routed.view(hidden_states.shape)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden_states)


class DeepseekDecoderLayer(v2.DeepseekV2DecoderLayer):
    """Llama's attention, then the MoE block or, in a dense layer, a plain MLP."""

    def __init__(self, config: DeepseekConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)
        ours: Any = config
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(ours, layer_idx)
        self.mlp = DeepseekMoE(config) if config.is_moe_layer(layer_idx) else v2.DeepseekV2MLP(ours)
        self.input_layernorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DeepseekPreTrainedModel(OwnModel, v2.DeepseekV2PreTrainedModel):
    """What transformers has to know of the family."""

    config_class = DeepseekConfig
    _no_split_modules = ["DeepseekDecoderLayer"]
    _keep_in_fp32_modules_strict = None  # V2's router is kept in float32 from transformers 5.24 on; this one never was
    _can_record_outputs = {
        "hidden_states": DeepseekDecoderLayer,
        "attentions": LlamaAttention,
        "router_logits": OutputRecorder(DeepseekRouter, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepseekRouter):
            initialization.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


class DeepseekModel(DeepseekPreTrainedModel, v2.DeepseekV2Model):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: DeepseekConfig):
        _register_names()
        PreTrainedModel.__init__(self, config)
        ours: Any = config
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(DeepseekDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DeepseekRotaryEmbedding(ours)
        self.gradient_checkpointing = False
        self.post_init()

    def __setstate__(self, state: dict[str, Any]) -> None:
        _register_names()  # in the process that reads a pickle, too
        super().__setstate__(state)


class DeepseekForCausalLM(DeepseekPreTrainedModel, v2.DeepseekV2ForCausalLM):
    """The language model: next-token logits and, with `labels`, their mean cross-entropy in nats (no balance loss)."""

    def __init__(self, config: DeepseekConfig):
        PreTrainedModel.__init__(self, config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def _register() -> None:
    AutoConfig.register("deepseek", DeepseekConfig, exist_ok=True)
    AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)


@cache
def _register_names() -> None:
    """The checkpoint conversion: with the first model, because transformers then builds those of all its families."""
    mapping = get_checkpoint_conversion_mapping("deepseek_v2")  # the same names of experts' matrices
    assert mapping is not None
    register_checkpoint_conversion_mapping("deepseek", mapping, overwrite=True)


_register()
