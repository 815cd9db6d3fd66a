"""The config of DeepSeekMoE: the original's names and defaults; anything else is refused."""

from typing import Any, ClassVar, no_type_check

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from moe_lens.errors import UnsupportedModelError
from moe_lens.model.families.closed_config import (
    check_activation,
    check_rope,
    check_sizes,
    original_rope,
    refuse_unknown,
)
from moe_lens.model.hf_compat import RopeParameters

# Kinds of rope scaling, and the keys that each has beside rope_theta.
_ROPE_KEYS: dict[str, set[str]] = {"default": set(), "linear": {"factor"}, "dynamic": {"factor"}}

# Keys of related families, with the values under which they say nothing: any other value is another mathematics.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "routed_scaling_factor": (None, 1),
    "topk_method": (None, "greedy"),
    "n_group": (None, 1),
    "topk_group": (None, 1),
    "ep_size": (None, 1),
    "mlp_bias": (None, False),
    "sliding_window": (None,),
    "q_lora_rank": (None,),
    "kv_lora_rank": (None,),
    "partial_rotary_factor": (None, 1),
    "pruned_heads": (None, {}),
    "per_layer_config": (None,),
    "add_cross_attention": (None, False),
    "tie_encoder_decoder": (None, False),
}

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_layer_freq",
    "max_position_embeddings",
    "rms_norm_eps",
)


@no_type_check  # `strict` checks types itself, and takes keys beyond the fields, which a second checker would refuse
@strict
class DeepseekConfig(PreTrainedConfig):
    """Config of DeepSeekMoE (arXiv 2401.06066; `deepseek-ai/deepseek-moe-16b-*`).

    Fields are the original's; `rope_theta` and `rope_scaling` are read and written as such, and kept in
    `rope_parameters`, as everywhere in transformers 5. `aux_loss_alpha`, `seq_aux` and `pretraining_tp` concern
    training: they are carried, not used.

    Raises:
        UnsupportedModelError: a scoring function, activation or rope scaling that DeepSeekMoE does not have, or a key
            that is neither known nor known to be harmless, for it may change the mathematics.
    """

    model_type = "deepseek"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "n_routed_experts"}
    mlp_bias: ClassVar[bool] = False  # transformers' MLP asks for it

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    n_shared_experts: int | None = None
    n_routed_experts: int = 64
    num_experts_per_tok: int = 6
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
    rope_parameters: RopeParameters | dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: int | float | None = 0.0
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        neutral = {**_NEUTRAL, "head_dim": (None, self.hidden_size // max(self.num_attention_heads, 1))}
        refuse_unknown(kwargs, neutral, "DeepSeekMoE", self.model_type)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The config in the original's words, so that whatever reads the hub's checkpoints reads ours."""
        content = super().to_dict()
        original_rope(content)
        return content

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` has routed experts, by the original's rule."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def validate_architecture(self) -> None:
        """Refuse what the family does not have, and sizes that contradict one another."""
        if self.scoring_func != "softmax":
            raise UnsupportedModelError(
                f"The config has scoring_func = {self.scoring_func!r}; DeepSeekMoE scores its experts by 'softmax'."
            )
        check_activation(self.hidden_act)
        if self.num_attention_heads > 0 and self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} does not give each of {self.num_attention_heads} heads an even width"
            )
        check_sizes(self, _POSITIVE, ("first_k_dense_replace", "n_shared_experts"), "n_routed_experts")
        check_rope(dict(self.rope_parameters or {}), _ROPE_KEYS, "DeepSeekMoE")
