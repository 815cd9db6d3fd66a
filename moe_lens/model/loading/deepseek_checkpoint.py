"""DeepSeekMoE from its files: every header is checked, then parameters are read one stored tensor at a time."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from moe_lens.errors import CheckpointError, InputError, UnsupportedModelError, a_kind
from moe_lens.model.families.deepseek import DeepseekConfig, DeepseekForCausalLM
from moe_lens.model.loading.checkpoint import Checkpoint, OpenFiles, not_whole
from moe_lens.model.loading.depth import PREDICTING, layer_of, read_depth
from moe_lens.model.loading.dispatch import Placing
from moe_lens.model.loading.formats.view import method_of, packing_of
from moe_lens.model.loading.kept_bits import kept_by_deepseek, lazy_parameter_bits, widths
from moe_lens.model.loading.key_mapping import mapped
from moe_lens.model.loading.lazy_parameters import lazy_state_dict, parameter_shapes, stored_shapes
from moe_lens.model.loading.load_streamed import load_streamed
from moe_lens.model.loading.quantising import VARIANT, PackingConfig
from moe_lens.model.loading.sizes import packed_size, size_of, stored_packed_size
from moe_lens.model.loading.stored_view import locate
from moe_lens.model.loading.through_transformers import load_through_transformers, read_generation_config

# A config.json without one of these would silently get the defaults of another size of model.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_routed_experts",
    "num_experts_per_tok",
)

# What these ask for happens inside transformers' own loader.
_OWN_LOADER = frozenset({"distributed_config", "tp_plan", "tp_size", "device_mesh", "gguf_file"})


def load_deepseek(
    source: str, path: Path, raw: dict[str, Any], hub: dict[str, Any], kwargs: dict[str, Any]
) -> PreTrainedModel:
    """Check every header, then let transformers place parameters that are read one stored tensor at a time."""
    config, kwargs = _deepseek_config(path, raw, kwargs)
    packed = kwargs.get("variant") == VARIANT
    if not packed:
        vars(config).pop("quantization_config", None)
    others = any(kwargs.get(word) is not None for word in _OWN_LOADER)
    if packed or kwargs.get("use_safetensors") is False or others:
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        wide = dtype if isinstance(dtype, torch.dtype) else None
        size = stored_packed_size(Checkpoint.locate(source, hub, VARIANT), wide) if packed else None
        with Placing({**kwargs, "config": config}, size) as placing:
            return placing.keep(load_through_transformers(DeepseekForCausalLM, source, hub, placing.arguments))
    checkpoint, shapes = _deepseek_checkpoint(source, config, raw, hub, kwargs)
    dtype = _dtype(kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto", config, checkpoint)
    parameters = lazy_state_dict(checkpoint, shapes, dtype)
    for name in ("variant", "use_safetensors", "key_mapping"):
        kwargs.pop(name, None)
    size, packing, state = None, kwargs.get("quantization_config"), dict[str, Any](parameters)
    if isinstance(packing, PackingConfig):
        unmade = _unmade(config, config.num_hidden_layers)
        if packing.scheme == "stored":
            kept = kept_by_deepseek(unmade, parameters)
            packing.method, packing.widths = method_of(packing_of(raw) or {}), widths(unmade, kept)
            state |= {name: lazy_parameter_bits(parameters[name]) for name in kept}
        size = packed_size(unmade, dtype, packing.scheme, packing.widths)
    elif packing is None:
        numbers = {name: math.prod(shape) for name, shape in shapes.items()}
        stored = {name: parameter.stored_bytes for name, parameter in parameters.items()}
        size = size_of(numbers, dtype, streamed=True, stored=stored)
    with Placing(kwargs, size) as placing:
        if placing.streamed:
            model = load_streamed(DeepseekForCausalLM, config, parameters, dtype, **placing.arguments)
        else:
            model = DeepseekForCausalLM.from_pretrained(
                None, config=config, state_dict=state, dtype=dtype, **placing.arguments
            )
            del model._weight_conversions  # none were needed to read; to write, transformers takes the registered ones
    read_generation_config(model, source, hub, kwargs)
    return model


def _deepseek_config(path: Path, raw: dict[str, Any], kwargs: dict[str, Any]) -> tuple[DeepseekConfig, dict[str, Any]]:
    """The config that was passed, or config.json changed by what was passed; and the arguments that are left."""
    if (config := kwargs.get("config")) is not None:
        if not isinstance(config, DeepseekConfig):
            raise InputError(f"config is {a_kind(config)}; {path} needs a DeepseekConfig.")
        return config, {key: value for key, value in kwargs.items() if key != "config"}
    check_sizes(path, raw)
    dtypes = {key: kwargs[key] for key in ("dtype", "torch_dtype") if key in kwargs}
    others = {key: value for key, value in kwargs.items() if key not in (*dtypes, "quantization_config")}
    try:
        loaded: Any = DeepseekConfig.from_dict(dict(raw), return_unused_kwargs=True, **others)
        config, left = loaded
        config.validate()
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is no config of a DeepSeekMoE: {error}") from error
    if "quantization_config" in kwargs:
        left["quantization_config"] = kwargs["quantization_config"]
    return config, {**left, **dtypes}


def check_sizes(path: str | Path, raw: Mapping[str, Any]) -> None:
    """Refuse a config.json that leaves open how large the model is.

    Raises:
        CheckpointError: names the keys that are not there.
    """
    if absent := [key for key in _REQUIRED if raw.get(key) is None]:
        raise CheckpointError(f"{path} lacks {', '.join(absent)}, without which the model's shape is unknown.")


def _deepseek_checkpoint(
    source: str, config: DeepseekConfig, raw: dict[str, Any], hub: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[Checkpoint, dict[str, tuple[int, ...]]]:
    """The checkpoint, proved to hold what `config` asks for, and the shapes of the model's parameters."""
    checkpoint, _ = locate(source, raw, hub, kwargs.get("variant"))
    checkpoint = mapped(checkpoint, kwargs.get("key_mapping") or {})
    there = len(checkpoint.tensors)
    said = {name: raw[name] for name in ("num_hidden_layers", *PREDICTING) if isinstance(raw.get(name), int)}
    depth = read_depth(config, PreTrainedConfig(**said))
    for name in ("num_hidden_layers", "n_routed_experts"):  # a model of that many would take for ever to build
        if (asked := getattr(config, name)) > there:
            raise not_whole(source, [f"{checkpoint.places}: {name} is {asked}, but all tensors are {there}"])
    if depth.problems:
        raise not_whole(source, depth.problems)
    shapes = _shapes(config, depth.loaded)
    ahead = [name for name in checkpoint.tensors if layer_of(name, "model.layers") in depth.predicting]
    left_out = stored_shapes(_shapes(config, min(depth.own, there))) if depth.loaded < depth.own else {}
    tables = [name for name in checkpoint.tensors if name.endswith("rotary_emb.inv_freq")]  # rope_theta gives them
    head = _tied_head(checkpoint, config)
    checkpoint.check(stored_shapes(shapes), {**left_out, **dict.fromkeys([*ahead, *tables, *head])})
    return checkpoint, shapes


def _tied_head(checkpoint: Checkpoint, config: DeepseekConfig) -> list[str]:
    """The name of an unembedding that is stored although it is the embedding; the two must not differ."""
    head, embedding = (checkpoint.tensors.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if not config.tie_word_embeddings or head is None or embedding is None:
        return []
    files = OpenFiles()
    if head.shape != embedding.shape or not torch.equal(head.read(files), embedding.read(files)):
        raise not_whole(
            str(head.file.parent),
            [f"{head.file.name}: lm_head.weight differs from the embedding, and config.json says tie_word_embeddings"],
        )
    return ["lm_head.weight"]


def _shapes(config: DeepseekConfig, n_layers: int) -> dict[str, tuple[int, ...]]:
    """The parameters of a model of `config` that has `n_layers` layers."""
    return parameter_shapes(_unmade(config, n_layers))


def _unmade(config: DeepseekConfig, n_layers: int) -> DeepseekForCausalLM:
    """A model of `config` that has `n_layers` layers and no numbers."""
    config = copy.deepcopy(config)  # building a model writes to its config
    config.num_hidden_layers = n_layers
    with torch.device("meta"):
        return DeepseekForCausalLM(config)


def _dtype(asked: str | torch.dtype, config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """What was asked for; "auto" is what config.json says, or else what holds every stored tensor."""
    if asked == "auto":
        asked = config.dtype or checkpoint.dtype
    dtype = getattr(torch, asked, None) if isinstance(asked, str) else asked
    allowed = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    if dtype not in allowed:
        raise InputError(f"dtype is {asked!r}; expected 'auto' or one of {', '.join(map(str, allowed))}.")
    return dtype
