"""What configs of the families that are our own share: the original's words, and refusal of what they do not know."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import GenerationConfig

from moe_lens.errors import UnsupportedModelError

_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

# Keys that transformers writes or reads itself, in any family, and that leave the mathematics alone.
_HOUSEKEEPING = frozenset(
    {
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation_internal",
        "_from_model_config",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "finetuning_task",
        "gradient_checkpointing",
        "is_decoder",
        "model_type",
        "name_or_path",
        "num_labels",
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "output_attentions",
        "prefix",
        "quantization_config",
        "rope_scaling",
        "rope_theta",
        "sep_token_id",
        "task_specific_params",
        "unsloth_fixed",
        "unsloth_version",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "use_bfloat16",
        "use_return_dict",
    }
) | frozenset(GenerationConfig._get_default_generation_params())


def refuse_unknown(
    kwargs: dict[str, Any], neutral: Mapping[str, tuple[Any, ...]], family: str, model_type: str
) -> None:
    """Take keys of a config that are no fields out of `kwargs`, and refuse those that may be another mathematics.

    Args:
        kwargs: Keys and values; what transformers itself reads stays in it.
        neutral: Keys of related families, with the values under which they say nothing.
        family: Its name in a message.
        model_type: Its model type there.

    Raises:
        UnsupportedModelError: a key that is not known, or has another value.
    """
    for key in kwargs.keys() - _HOUSEKEEPING:
        value = kwargs.pop(key)
        if key not in neutral:
            raise UnsupportedModelError(
                f"The config has {key} = {value!r}, which {family} does not know and which may "
                "change its mathematics. Remove the key if it does not, or load the model as what it is."
            )
        if value not in neutral[key]:
            raise UnsupportedModelError(
                f"The config has {key} = {value!r}; {family} (model_type {model_type}) computes as if it were "
                f"{' or '.join(map(repr, neutral[key]))}, so the results would be wrong."
            )


def check_activation(name: str) -> None:
    """Refuse an activation that an expert's MLP does not have.

    Raises:
        UnsupportedModelError: with those that it can have.
    """
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(f"The config has hidden_act = {name!r}; expected one of {', '.join(_ACTIVATIONS)}.")


def check_sizes(config: Any, positive: Iterable[str], others: Iterable[str], n_experts: str) -> None:
    """Refuse sizes that are no sizes, or contradict one another.

    Args:
        config: Has them.
        positive: Names of those that must be.
        others: Names of those that may be 0, or None.
        n_experts: Name of the number of experts.

    Raises:
        ValueError: names the field.
    """
    for name in positive:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} is {getattr(config, name)}; expected a positive number")
    for name in others:
        if (getattr(config, name) or 0) < 0:
            raise ValueError(f"{name} is {getattr(config, name)}; expected 0 or more")
    if config.num_experts_per_tok > getattr(config, n_experts):
        raise ValueError(
            f"num_experts_per_tok is {config.num_experts_per_tok}, but there are {getattr(config, n_experts)} experts"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {config.num_attention_heads} is no multiple of num_key_value_heads "
            f"{config.num_key_value_heads}"
        )


def check_rope(rope: Mapping[str, Any], kinds: Mapping[str, set[str]], family: str) -> None:
    """Refuse a rope scaling that a family does not have.

    Args:
        rope: `rope_parameters` of the config.
        kinds: The keys that each kind has beside rope_theta.
        family: Its name in a message.

    Raises:
        UnsupportedModelError: a kind, or a key of it, that is not known.
        ValueError: a number that is none, or is below 1.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in kinds:
        raise UnsupportedModelError(
            f"The config has rope scaling {kind!r}; {family} knows {', '.join(map(repr, kinds))}."
        )
    if unknown := rope.keys() - kinds[kind] - {"rope_theta", "type", "rope_type"}:
        raise UnsupportedModelError(f"The config's rope scaling {kind!r} has unknown keys {sorted(unknown)}.")
    for key in sorted(kinds[kind] | {"rope_theta"}):
        value = rope.get(key, 10000.0 if key == "rope_theta" else None)
        if not isinstance(value, int | float) or value < 1:
            raise ValueError(f"rope scaling {kind!r} has {key} = {value!r}; expected a number of at least 1")


def original_rope(content: dict[str, Any]) -> None:
    """Put `rope_parameters` of a config's content back into the original's words, rope_theta and rope_scaling."""
    rope = dict(content.pop("rope_parameters", None) or {})
    kind = rope.pop("rope_type", "default")
    content["rope_theta"] = rope.pop("rope_theta", 10000.0)
    rope.pop("partial_rotary_factor", None)
    content["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
