"""`model_type "bailing_moe"` for transformers: Ling and Ring (`inclusionAI/Ling-*`), first and second generation.

Transformers has no code for either. Of its models, GLM-4.5 has the same layers: grouped-query attention, whose heads
the second generation norms, and half of whose width it rotates; a router by sigmoid, bias and groups; shared experts;
dense layers first. The first generation routes by softmax instead. Attention's matrix for queries, keys and values is
one in the checkpoint, and three here; `save_pretrained` writes the original names.
"""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel
from transformers.models.glm4_moe import modeling_glm4_moe as glm

from moe_lens.model.families.bailing_config import BailingMoeConfig, BailingMoeV2Config
from moe_lens.model.families.deepseek import DeepseekRouter
from moe_lens.model.families.own_model import OwnModel
from moe_lens.model.hf_compat import (
    OutputRecorder,
    Split,
    WeightConverter,
    WeightRenaming,
    get_checkpoint_conversion_mapping,
    initialization,
    register_checkpoint_conversion_mapping,
)

__all__ = ["BailingMoeForCausalLM", "BailingMoeModel", "BailingMoeV2ForCausalLM", "BailingMoeV2Model", "norm_columns"]


class BailingMoeRouter(DeepseekRouter):
    """DeepSeekMoE's router, with its softmax in float32."""

    def affinities(self, logits: Float[Tensor, "tokens n_experts"]) -> Float[Tensor, "tokens n_experts"]:
        """Softmax over all experts, in float32 or wider."""
        return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class BailingMoeDecoderLayer(glm.Glm4MoeDecoderLayer):
    """A layer of the first generation."""

    def __init__(self, config: BailingMoeConfig, layer_idx: int):
        ours: Any = config  # transformers' parts are annotated with their own family's config
        super().__init__(ours, layer_idx)
        if isinstance(self.mlp, glm.Glm4MoeMoE):
            moe: Any = self.mlp
            moe.gate = BailingMoeRouter(config)


class _Bailing(OwnModel):
    """What transformers has to know of both generations."""

    _keys_to_ignore_on_load_unexpected = None  # GLM's own

    def __setstate__(self, state: dict[str, Any]) -> None:
        _register_names()  # in the process that reads a pickle, too
        super().__setstate__(state)


class BailingMoePreTrainedModel(_Bailing, glm.Glm4MoePreTrainedModel):
    """The first generation's router computes in the model's dtype."""

    config_class = BailingMoeConfig
    _no_split_modules = ["BailingMoeDecoderLayer"]
    _keep_in_fp32_modules_strict = None
    _can_record_outputs = {
        "hidden_states": BailingMoeDecoderLayer,
        "attentions": glm.Glm4MoeAttention,
        "router_logits": OutputRecorder(BailingMoeRouter, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BailingMoeRouter):
            initialization.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


class BailingMoeV2PreTrainedModel(_Bailing, glm.Glm4MoePreTrainedModel):
    """The second generation's."""

    config_class = BailingMoeV2Config


class BailingMoeModel(BailingMoePreTrainedModel, glm.Glm4MoeModel):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: BailingMoeConfig):
        _build(self, config, BailingMoeDecoderLayer)


class BailingMoeV2Model(BailingMoeV2PreTrainedModel, glm.Glm4MoeModel):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: BailingMoeV2Config):
        _build(self, config, glm.Glm4MoeDecoderLayer)


def _build(model: Any, config: Any, layer: Any) -> None:
    _register_names()
    PreTrainedModel.__init__(model, config)
    model.padding_idx, model.vocab_size = config.pad_token_id, config.vocab_size
    model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
    model.layers = nn.ModuleList(layer(config, i) for i in range(config.num_hidden_layers))
    model.norm = glm.Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    model.rotary_emb = glm.Glm4MoeRotaryEmbedding(config)
    model.gradient_checkpointing = False
    model.post_init()


class BailingMoeForCausalLM(BailingMoePreTrainedModel, glm.Glm4MoeForCausalLM):
    """The first generation's language model."""

    def __init__(self, config: BailingMoeConfig):
        PreTrainedModel.__init__(self, config)
        self.model = BailingMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; an unembedding that is stored with other norms (`norm_head`) is divided by them."""
        loaded = super().from_pretrained(*args, **kwargs)
        model: Any = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.norm_head:
            model.lm_head.weight.data = norm_columns(model.lm_head.weight.data)
            model.config.norm_head = False
        return loaded


class BailingMoeV2ForCausalLM(BailingMoeV2PreTrainedModel, glm.Glm4MoeForCausalLM):
    """The second generation's language model."""

    def __init__(self, config: BailingMoeV2Config):
        PreTrainedModel.__init__(self, config)
        self.model = BailingMoeV2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def norm_columns(weight: Float[Tensor, "vocabulary d"]) -> Float[Tensor, "vocabulary d"]:
    """An unembedding divided by the norms of its columns, in float32, as the first generation computes with it."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return (wide / (wide.norm(p=2, dim=0, keepdim=True) + 1e-7)).to(weight.dtype)


def _register() -> None:
    families: Any = (
        (BailingMoeConfig, BailingMoeModel, BailingMoeForCausalLM),
        (BailingMoeV2Config, BailingMoeV2Model, BailingMoeV2ForCausalLM),
    )
    for config, model, causal in families:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)


@cache
def _register_names() -> None:
    """The checkpoint conversion: with the first model, because transformers then builds those of all its families."""
    experts = get_checkpoint_conversion_mapping("glm4_moe")
    assert experts is not None
    names = {
        r"^model\.word_embeddings\.": "model.embed_tokens.",
        r"\.attention\.dense\.": ".self_attn.o_proj.",
        r"\.attention\.query_layernorm\.": ".self_attn.q_norm.",
        r"\.attention\.key_layernorm\.": ".self_attn.k_norm.",
        r"\.mlp\.gate\.expert_bias": ".mlp.gate.e_score_correction_bias",
    }
    projections = [f"self_attn.{part}_proj" for part in ("q", "k", "v")]
    joined = WeightConverter("attention.query_key_value", projections, operations=[Split(dim=0)])
    renamed = [WeightRenaming(stored, here) for stored, here in names.items()]
    for model_type in (BailingMoeConfig.model_type, BailingMoeV2Config.model_type):
        register_checkpoint_conversion_mapping(model_type, [*experts, *renamed, joined], overwrite=True)


_register()
