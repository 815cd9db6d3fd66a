"""Configs of Ling and Ring, first and second generation: the original's names; anything else is refused."""

from typing import Any, ClassVar, Self, no_type_check

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

# Kinds of rope scaling, and the keys that each has beside rope_theta; yarn may have two more.
_ROPE_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
}
_RANGE = {"beta_fast", "beta_slow"}

# Keys that the original's code does not read.
_UNREAD = ("embedding_dropout", "output_dropout", "pretraining_tp", "max_window_layers", "mtp_loss_scaling_factor")
_UNREAD += (
    "use_sliding_window",
    "sliding_window",
    "moe_router_enable_shared_expert",
    "moe_router_enable_routed_scaling",
)

# Keys of related families, with the values under which they say nothing: any other value is another mathematics.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_bias": (False,),
    "use_rmsnorm": (None, True),
    "norm_softmax": (None, False),
    "mlp_bias": (None, False),
    "topk_method": (None, "noaux_tc"),
    "router_dtype": (None, "fp32"),
    "pruned_heads": (None, {}),
    "per_layer_config": (None,),
    "add_cross_attention": (None, False),
    "tie_encoder_decoder": (None, False),
}
_FIRST = {
    "topk_method": (None, "greedy"),
    "router_dtype": (None,),
    "score_function": (None, "softmax"),
    "moe_router_enable_expert_bias": (None, False),
    "routed_scaling_factor": (None, 1),
    "n_group": (None, 0, 1),
    "topk_group": (None, 0, 1),
    "use_qk_norm": (None, False),
    "partial_rotary_factor": (None, 1),
}
_SECOND = {
    "score_function": (None, "sigmoid"),
    "moe_router_enable_expert_bias": (None, True),
    "norm_head": (None, False),
}

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_shared_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
    "rms_norm_eps",
)
# A config.json without one of these would silently get the defaults of another size of model.
_REQUIRED = tuple(name for name in _POSITIVE if name not in ("head_dim", "max_position_embeddings", "rms_norm_eps"))


@no_type_check  # `strict` checks types itself, and takes keys beyond the fields, which a second checker would refuse
@strict
class BailingConfig(PreTrainedConfig):
    """What both generations have. `rope_theta` and `rope_scaling` are kept in `rope_parameters`, as in transformers 5.

    Raises:
        UnsupportedModelError: an activation or rope scaling that Ling does not have, or a key that is neither known nor
            known to be harmless, for it may change the mathematics.
    """

    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    # What transformers' GLM-4.5, of whose parts the models are made, calls them.
    attribute_map: ClassVar[dict[str, str]] = {
        "n_routed_experts": "num_experts",
        "num_local_experts": "num_experts",
        "n_shared_experts": "num_shared_experts",
        "attention_bias": "use_qkv_bias",
    }
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    vocab_size: int = 126464
    hidden_size: int = 2048
    intermediate_size: int = 5632
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int | None = None
    num_experts: int = 64
    num_shared_experts: int = 2
    num_experts_per_tok: int = 6
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 16384
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict[str, Any] | None = None
    use_qkv_bias: bool = False
    attention_dropout: int | float | None = 0.0
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        for key in _UNREAD:
            kwargs.pop(key, None)
        rotated = kwargs.get("partial_rotary_factor") or 1.0
        neutral = {
            **_NEUTRAL,
            **self.neutral,
            "moe_shared_expert_intermediate_size": (None, self.num_shared_experts * self.moe_intermediate_size),
            "rotary_dim": (None, int(rotated * self.head_dim)),
        }
        if "partial_rotary_factor" not in neutral:
            kwargs.pop("partial_rotary_factor", None)
        refuse_unknown(kwargs, neutral, "Ling", self.model_type)
        super().__post_init__(partial_rotary_factor=rotated, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """The config of a config.json, of which the shape of the model must not be left to defaults."""
        given = {**config_dict, **kwargs}
        if absent := [key for key in _REQUIRED if given.get(key) is None]:
            raise ValueError(f"config.json lacks {', '.join(absent)}, without which the model's shape is unknown")
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The config in the original's words, so that whatever reads the hub's checkpoints reads ours."""
        content = super().to_dict()
        original_rope(content)
        return {**content, "use_bias": False}  # true is the original's default

    def validate_architecture(self) -> None:
        """Refuse what the family does not have, and sizes that contradict one another."""
        check_activation(self.hidden_act)
        check_sizes(self, _POSITIVE, ("first_k_dense_replace",), "num_experts")
        if self.head_dim is None or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; expected an even number")
        rope = dict(self.rope_parameters or {})
        rope.pop("partial_rotary_factor", None)
        allowed = _RANGE if rope.get("rope_type") == "yarn" else set()
        check_rope({key: value for key, value in rope.items() if key not in allowed}, _ROPE_KEYS, "Ling")


@no_type_check
@strict
class BailingMoeConfig(BailingConfig):
    """Config of Ling and Ring, first generation (`inclusionAI/Ling-lite*`, `Ling-plus*`, `Ling-Coder-lite*`).

    The second generation has the same model type on the hub; its architecture, or that its experts are scored by a
    sigmoid, tells it apart, and `from_dict` then gives its config.
    """

    model_type = "bailing_moe"
    neutral = _FIRST
    use_qk_norm: ClassVar[bool] = False
    n_group: ClassVar[int] = 1
    topk_group: ClassVar[int] = 1
    routed_scaling_factor: ClassVar[float] = 1.0

    norm_head: bool = False
    """Whether the unembedding is still to be divided by the norms of its columns: in a checkpoint, not in a model."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of a config.json: of its own generation."""
        named = config_dict.get("architectures") or ()
        if any("MoeV2" in name for name in named) or config_dict.get("score_function") == "sigmoid":
            return BailingMoeV2Config.from_dict({**config_dict, "model_type": "bailing_moe_v2"}, **kwargs)
        return super().from_dict(config_dict, **kwargs)


@no_type_check
@strict
class BailingMoeV2Config(BailingConfig):
    """Config of Ling and Ring, second generation (`inclusionAI/Ling-*-2.0`, `Ling-1T`, `Ring-*-2.0`).

    The layers behind the last, which predict several tokens ahead, are left out.
    """

    model_type = "bailing_moe_v2"
    neutral = _SECOND

    num_shared_experts: int = 1
    first_k_dense_replace: int = 1
    rms_norm_eps: float = 1e-6
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 1.0
    use_qk_norm: bool = True
    num_nextn_predict_layers: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The config in the original's words."""
        rotated = (self.rope_parameters or {}).get("partial_rotary_factor", 1.0)
        return {**super().to_dict(), "partial_rotary_factor": rotated, "score_function": "sigmoid"}

    def validate_architecture(self) -> None:
        """Refuse what the family does not have, and sizes that contradict one another."""
        super().validate_architecture()
        if not self.norm_topk_prob:
            raise UnsupportedModelError(
                "The config has norm_topk_prob = False; Ling 2 always divides weights by their sum."
            )
