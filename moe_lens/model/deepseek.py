"""`model_type "deepseek"` for transformers: the DeepSeekMoE of arXiv 2401.06066, of `deepseek-ai/deepseek-moe-16b-*`.

Transformers has DeepSeek-V2 and V3 but not this first one, and the hub's own code for it no longer imports. The model is
DeepSeek-V2's shell with Llama's attention and a router of its own; experts run through transformers' experts interface
(`eager`, `grouped_mm`, …). Importing this module registers the family with `AutoConfig`, `AutoModel`,
`AutoModelForCausalLM` and the checkpoint conversion, so that `from_pretrained` reads, and `save_pretrained` writes, the
original tensor names (`model.layers.N.mlp.experts.E.gate_proj.weight`, …).
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import RopeParameters, dynamic_rope_update
from transformers.modeling_utils import PreTrainedModel
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.utils.output_capturing import OutputRecorder

from moe_lens.errors import UnsupportedModelError

_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
_ROPE_KEYS = {"default": set(), "linear": {"factor"}, "dynamic": {"factor"}}

# Keys of related families, with the values under which they say nothing: any other value is another mathematics.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "routed_scaling_factor": (None, 1, 1.0),
    "topk_method": (None, "greedy"),
    "n_group": (None, 0, 1),
    "topk_group": (None, 0, 1),
    "ep_size": (None, 1),
    "mlp_bias": (None, False),
    "sliding_window": (None,),
    "q_lora_rank": (None,),
    "kv_lora_rank": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "pruned_heads": (None, {}),
    "per_layer_config": (None,),
    "is_decoder": (None, False, True),
    "add_cross_attention": (None, False),
    "tie_encoder_decoder": (None, False),
}
# Keys that transformers writes or reads itself, in any family, and that leave the mathematics alone.
_HOUSEKEEPING = frozenset(
    """
    _attn_implementation_autoset _attn_implementation_internal _commit_hash _experts_implementation_internal
    _from_model_config _name_or_path attn_implementation auto_map experts_implementation finetuning_task
    gradient_checkpointing model_type name_or_path num_labels output_attentions prefix problem_type quantization_config rope_scaling
    rope_theta sep_token_id task_specific_params tokenizer_class torch_dtype torchscript transformers_weights use_bfloat16
    use_return_dict
    """.split()
)


def _generation_keys() -> set[str]:
    """Names of sampling settings, which old configs carry and transformers drops."""
    from transformers import GenerationConfig

    return set(GenerationConfig._get_default_generation_params())


@strict
class DeepseekConfig(PreTrainedConfig):
    """Config of DeepSeekMoE in the original's words and with its defaults; the world is closed.

    A key that is neither known nor known to be harmless raises `UnsupportedModelError`, for it may change the mathematics.
    """

    model_type = "deepseek"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "n_routed_experts"}
    mlp_bias: ClassVar[bool] = False

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: int | float | None = 0.0
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        known = _HOUSEKEEPING | _generation_keys()
        for key, value in list(kwargs.items()):
            if key == "head_dim":
                harmless: tuple[Any, ...] = (None, self.hidden_size // max(self.num_attention_heads, 1))
            elif key in _NEUTRAL:
                harmless = _NEUTRAL[key]
            elif key in known:
                continue
            else:
                raise UnsupportedModelError(
                    f"The config has {key} = {value!r}, which DeepSeekMoE (model_type deepseek) does not know and which may "
                    f"change its mathematics. Remove the key if it does not, or load the model under its own model_type."
                )
            if value not in harmless:
                raise UnsupportedModelError(
                    f"The config has {key} = {value!r}; DeepSeekMoE (model_type deepseek) is computed as if it were "
                    f"{' or '.join(map(repr, harmless))}, so this model's results would be wrong."
                )
            del kwargs[key]
        super().__post_init__(**kwargs)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` has routed experts, by the original's rule."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def validate_architecture(self) -> None:
        """Refuse what the family does not have, and sizes that contradict one another."""
        if self.scoring_func != "softmax":
            raise UnsupportedModelError(
                f"The config has scoring_func = {self.scoring_func!r}; DeepSeekMoE scores its experts by 'softmax'."
            )
        if self.hidden_act not in _ACTIVATIONS:
            raise UnsupportedModelError(
                f"The config has hidden_act = {self.hidden_act!r}; expected one of {', '.join(_ACTIVATIONS)}."
            )
        for name in ("n_routed_experts", "num_experts_per_tok"):
            if getattr(self, name) is None:
                raise UnsupportedModelError(f"The config gives no {name}: a model without routed experts is not a MoE.")
        sizes = (
            "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads n_routed_experts num_experts_per_tok moe_layer_freq max_position_embeddings rms_norm_eps"
        )
        for name in sizes.split():
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")
        for name in ("first_k_dense_replace", "n_shared_experts"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, more than the {self.n_routed_experts} experts there are"
            )
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} does not give each of {self.num_attention_heads} heads an even width"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        self._validate_rope()

    def _validate_rope(self) -> None:
        rope = dict(self.rope_parameters or {})
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        if kind not in _ROPE_KEYS:
            raise UnsupportedModelError(
                f"The config has rope scaling {kind!r}; DeepSeekMoE knows {', '.join(map(repr, _ROPE_KEYS))}."
            )
        unknown = set(rope) - _ROPE_KEYS[kind] - {"rope_theta", "type", "rope_type"}
        if unknown:
            raise UnsupportedModelError(f"The config's rope scaling {kind!r} has unknown keys {sorted(unknown)}.")
        for key in _ROPE_KEYS[kind]:
            if not isinstance(rope.get(key), int | float) or rope[key] < 1:
                raise ValueError(f"rope scaling {kind!r} has {key} = {rope.get(key)!r}; expected a number of at least 1")


class DeepseekRMSNorm(v2.DeepseekV2RMSNorm):
    """RMSNorm in float32, or in float64 for a float64 model (transformers' own would round that to float32)."""

    def forward(self, hidden_states: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class DeepseekRotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary tables from float32 frequencies, in float32, or in float64 for a float64 model."""

    @torch.no_grad()
    @dynamic_rope_update
    def forward(
        self, x: Float[Tensor, "batch pos d"], position_ids: Int[Tensor, "#batch pos"]
    ) -> tuple[Float[Tensor, "#batch pos head"], Float[Tensor, "#batch pos head"]]:
        wide = torch.promote_types(x.dtype, torch.float32)
        angles = position_ids[..., None].to(wide) * self.inv_freq.to(x.device, wide)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class DeepseekRouter(nn.Module):
    """Softmax over all experts in the model's dtype, then top-k, then, if the config says so, weights that sum to one."""

    def __init__(self, config: DeepseekConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim))

    def forward(
        self, hidden_states: Float[Tensor, "*rows d"]
    ) -> tuple[Float[Tensor, "tokens n_experts"], Float[Tensor, "tokens top_k"], Int[Tensor, "tokens top_k"]]:
        logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        weights, indices = logits.softmax(dim=-1).topk(self.top_k, dim=-1, sorted=False)
        if self.top_k > 1 and self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights, indices


class DeepseekMoE(nn.Module):
    """Routed experts and, where there are any, shared experts fused into one MLP (paper, eq. 9–11)."""

    def __init__(self, config: DeepseekConfig):
        super().__init__()
        self.gate = DeepseekRouter(config)
        self.experts = v2.DeepseekV2Experts(config)
        shared_width = (config.n_shared_experts or 0) * config.moe_intermediate_size
        self.shared_experts = v2.DeepseekV2MLP(config, intermediate_size=shared_width) if shared_width else None

    def forward(self, hidden_states: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        _, weights, indices = self.gate(hidden_states)
        routed = self.experts(hidden_states.reshape(-1, hidden_states.shape[-1]), indices, weights)
        routed = routed.view(hidden_states.shape)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden_states)


class DeepseekDecoderLayer(v2.DeepseekV2DecoderLayer):
    """Llama's attention, then the MoE block or, in a dense layer, a plain MLP."""

    def __init__(self, config: DeepseekConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = DeepseekMoE(config) if config.is_moe_layer(layer_idx) else v2.DeepseekV2MLP(config)
        self.input_layernorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DeepseekPreTrainedModel(v2.DeepseekV2PreTrainedModel):
    """What transformers has to know of the family."""

    config: DeepseekConfig
    config_class = DeepseekConfig
    _no_split_modules = ["DeepseekDecoderLayer"]
    _can_record_outputs = {
        "hidden_states": DeepseekDecoderLayer,
        "attentions": LlamaAttention,
        "router_logits": OutputRecorder(DeepseekRouter, index=0),
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for its decorator in the source of this very module, but it stands in V2's

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Transformers' choice, but for float64, which its default `grouped_mm` cannot compute."""
        if requested_experts is None and torch.get_default_dtype() == torch.float64:
            requested_experts = "eager"
        return super().get_correct_experts_implementation(requested_experts)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepseekRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


class DeepseekModel(DeepseekPreTrainedModel, v2.DeepseekV2Model):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: DeepseekConfig):
        PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(DeepseekDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DeepseekRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class DeepseekForCausalLM(DeepseekPreTrainedModel, v2.DeepseekV2ForCausalLM):
    """The language model; `forward` returns the next-token logits and, with `labels`, their mean cross-entropy in nats."""

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
    mapping = get_checkpoint_conversion_mapping("deepseek_v2")
    register_checkpoint_conversion_mapping("deepseek", mapping, overwrite=True)


_register()
