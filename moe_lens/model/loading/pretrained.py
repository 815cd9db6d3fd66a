"""Models by name or folder: whole, or an error that names file and tensor."""

import contextlib
import copy
import importlib.resources
import logging
import math
import re
import struct
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moe_lens.errors import CheckpointError, InputError, UnsupportedModelError
from moe_lens.model.families.deepseek import DeepseekConfig, DeepseekForCausalLM
from moe_lens.model.families.refusals import ABSENT
from moe_lens.model.families.table import check_release
from moe_lens.model.hf_compat import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from moe_lens.model.hf_compat import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, is_peft_available, resolve_revision
from moe_lens.model.loading.checkpoint import (
    HUB_ARGUMENTS,
    Checkpoint,
    OpenFiles,
    StoredTensor,
    find_file,
    not_whole,
    read_config,
)
from moe_lens.model.loading.config_json import read_object
from moe_lens.model.loading.depth import PREDICTING, layer_of, list_of_layers, read_depth
from moe_lens.model.loading.formats.view import packing_of
from moe_lens.model.loading.gguf_file import find_gguf, read_gguf_config
from moe_lens.model.loading.memory_plan import Size
from moe_lens.model.loading.packed_tensors import lazy_state_dict, parameter_shapes, stored_shapes
from moe_lens.model.loading.placement import Placing, size_of
from moe_lens.model.loading.quantising import METHOD, VARIANT
from moe_lens.model.loading.stored_names import mapped
from moe_lens.model.loading.stored_view import LazyTensor, locate, read_packing
from moe_lens.model.loading.streaming import load_streamed
from moe_lens.model.loading.tokenizer import check_vocabulary, has_tokenizer, load_tokenizer

__all__ = ["EMBEDDED", "load_pretrained", "load_tokenizer", "resolve_name"]

EMBEDDED = "tiny-deepseekmoe"
"""Name of the model that is part of the package."""

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

Trust = bool | Literal["tokenizer"]
_LOG = logging.getLogger(__name__)
_UNREADABLE = (ImportError, OSError, ValueError, LookupError, RuntimeError, StrictDataclassError, struct.error)
"""What transformers raises of a checkpoint that it cannot read."""


def resolve_name(name_or_path: str) -> str:
    """The folder of the embedded model for its name; any other name or path as it is."""
    if name_or_path != EMBEDDED:
        return name_or_path
    folder = importlib.resources.files("moe_lens") / "assets" / EMBEDDED
    if not folder.is_dir():
        raise CheckpointError(f"This installation of moe_lens lacks its embedded model {EMBEDDED}; install it again.")
    return str(folder)


def load_pretrained(
    name_or_path: str, *, trust_remote_code: Trust = False, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a causal language model and its tokenizer, refusing a checkpoint that is not whole.

    Args:
        name_or_path: name on the hub, folder, or "tiny-deepseekmoe" for the embedded model.
        trust_remote_code: whether to run code that comes with the checkpoint; "tokenizer" for the tokenizer's alone.
            DeepSeekMoE never needs it.
        kwargs: the loading arguments of transformers (`dtype`, `device_map`, `attn_implementation`, `revision`, …).
            Without `device_map`, or with "auto", `memory_plan` says where parameters go; `max_memory` bounds it.

    Returns:
        The model in evaluation mode, and its tokenizer or None where the checkpoint has none that can be read.

    Raises:
        CheckpointError: something is missing, unexpected, misshapen, unreadable, NaN or infinite.
        UnsupportedModelError: a model_type, or a feature of its config, that is not known.
        InputError: an argument that neither transformers nor the model reads.
    """
    source = find_gguf(resolve_name(str(name_or_path)), kwargs)
    hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS & kwargs.keys()}
    hub["revision"] = resolve_revision(
        source,
        hub.get("revision"),
        token=hub.get("token"),
        local_files_only=hub.get("local_files_only", False),
        cache_dir=hub.get("cache_dir"),
    )
    adapter = find_file(source, "adapter_config.json", hub)
    if kwargs.get("gguf_file") is None and adapter is not None and find_file(source, "config.json", hub) is None:
        base = read_object(adapter).get("base_model_name_or_path") or "a model that it does not name"
        raise UnsupportedModelError(
            f"{source} is an adapter of PEFT on {base}, not a model. Load that one; or merge the adapter into it "
            "(merge_and_unload) and load what save_pretrained then writes"
        )
    gguf = kwargs.get("gguf_file")
    if gguf is None:
        path, raw = read_config(source, hub)
    else:
        path, raw, sizes = read_gguf_config(source, gguf, hub, _UNREADABLE)
        kwargs |= {name: size for name, size in sizes.items() if name not in kwargs}
    check_release(raw["model_type"])
    said = packing_of(raw)
    if said is not None and said.get("quant_method") == METHOD:
        kwargs["variant"] = VARIANT
    read_packing(raw, kwargs)
    own = raw["model_type"] == DeepseekConfig.model_type
    if adapter is not None and (own or not is_peft_available()):
        raise UnsupportedModelError(
            f"{adapter}: beside the weights lies an adapter of PEFT, which would be left out. Merge it first "
            "(merge_and_unload) and load what save_pretrained then writes, or take it out of the folder"
        )
    if not own and raw["model_type"] not in CONFIG_MAPPING and trust_remote_code is not True:
        known = ABSENT.get(raw["model_type"])
        raise UnsupportedModelError(
            f"{path}: model_type {raw['model_type']!r}"
            + (f" ({known})" if known else "")
            + " is unknown to this version of transformers, and what is not its own code is not hooked. `moe-lens "
            "models` lists what is supported"
        )
    try:
        if own:
            model = _load_deepseek(source, path, raw, hub, kwargs)
        else:
            model = _load_other(source, raw, hub, {**kwargs, "trust_remote_code": trust_remote_code is True})
    except TypeError as error:  # transformers hands what it does not read to the model's own __init__
        word = re.search(r"got an unexpected keyword argument '(\w+)'", str(error))
        if word is None or word[1] not in kwargs:
            raise
        raise InputError(f"from_pretrained has no argument {word[1]!r}, and {path} no such setting") from error
    except ValueError as error:  # of an argument: what is wrong with the checkpoint has been found by then
        raise InputError(f"transformers cannot load {source}: {error}") from error
    model.config.name_or_path = model.name_or_path = str(name_or_path)
    return model, _tokenizer(model, source, hub, trusted=trust_remote_code in (True, "tokenizer"), gguf=gguf)


def _tokenizer(
    model: Any, source: str, hub: dict[str, Any], *, trusted: bool, gguf: str | None
) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer; one that cannot be read is no reason to refuse the weights."""
    if gguf is None and not has_tokenizer(source, hub):
        return None
    within = {} if gguf is None else {"gguf_file": gguf}
    try:
        tokenizer = load_tokenizer(source, trust_remote_code=trusted, **within, **hub)
    except CheckpointError as error:
        _LOG.warning("%s. The model is loaded without it, and reads tokens but no text", error)
        return None
    check_vocabulary(tokenizer, model.config.get_text_config().vocab_size, source)
    return tokenizer


def _load_deepseek(
    source: str, path: Path, raw: dict[str, Any], hub: dict[str, Any], kwargs: dict[str, Any]
) -> PreTrainedModel:
    """Check every header, then let transformers place parameters that are read one stored tensor at a time."""
    config, kwargs = _deepseek_config(path, raw, kwargs)
    packed = kwargs.get("variant") == VARIANT
    if not packed:
        vars(config).pop("quantization_config", None)
    if packed or kwargs.get("use_safetensors") is False or _OWN_LOADER & kwargs.keys():
        with Placing({**kwargs, "config": config}, None) as placing:
            return placing.keep(_load_through_transformers(DeepseekForCausalLM, source, hub, placing.arguments))
    checkpoint, shapes = _deepseek_checkpoint(source, config, raw, hub, kwargs)
    dtype = _dtype(kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto", config, checkpoint)
    parameters = lazy_state_dict(checkpoint, shapes, dtype)
    for name in ("variant", "use_safetensors", "key_mapping"):
        kwargs.pop(name, None)
    size = None
    if kwargs.get("quantization_config") is None:
        as_stored = all(type(stored) is StoredTensor for stored in checkpoint.tensors.values())
        numbers = {name: math.prod(shape) for name, shape in shapes.items()}
        size = size_of(numbers, dtype, streamed=as_stored)
    with Placing(kwargs, size) as placing:
        if placing.streamed:
            model = load_streamed(DeepseekForCausalLM, config, parameters, dtype, **placing.arguments)
        else:
            model = DeepseekForCausalLM.from_pretrained(
                None, config=config, state_dict=parameters, dtype=dtype, **placing.arguments
            )
            del model._weight_conversions  # none were needed to read; to write, transformers takes the registered ones
    _read_generation_config(model, source, hub, kwargs)
    return model


def _read_generation_config(model: Any, source: str, hub: dict[str, Any], kwargs: dict[str, Any]) -> None:
    if kwargs.get("generation_config") is None:
        with contextlib.suppress(OSError):  # it has none: the one that was made from the model's config stays
            model.generation_config = GenerationConfig.from_pretrained(source, **hub)


def _deepseek_config(path: Path, raw: dict[str, Any], kwargs: dict[str, Any]) -> tuple[DeepseekConfig, dict[str, Any]]:
    """The config that was passed, or config.json changed by what was passed; and the arguments that are left."""
    if (config := kwargs.get("config")) is not None:
        if not isinstance(config, DeepseekConfig):
            raise InputError(f"config is a {type(config).__name__}; {path} needs a DeepseekConfig.")
        return config, {key: value for key, value in kwargs.items() if key != "config"}
    if absent := [key for key in _REQUIRED if raw.get(key) is None]:
        raise CheckpointError(f"{path} lacks {', '.join(absent)}, without which the model's shape is unknown.")
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
    config = copy.deepcopy(config)  # building a model writes to its config
    config.num_hidden_layers = n_layers
    with torch.device("meta"):
        return parameter_shapes(DeepseekForCausalLM(config))


def _dtype(asked: str | torch.dtype, config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """What was asked for; "auto" is what config.json says, or else what holds every stored tensor."""
    if asked == "auto":
        asked = config.dtype or checkpoint.dtype
    dtype = getattr(torch, asked, None) if isinstance(asked, str) else asked
    allowed = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    if dtype not in allowed:
        raise InputError(f"dtype is {asked!r}; expected 'auto' or one of {', '.join(map(str, allowed))}.")
    return dtype


def _load_other(source: str, raw: dict[str, Any], hub: dict[str, Any], kwargs: dict[str, Any]) -> PreTrainedModel:
    """A family that is transformers' own: headers are checked for contradictions, the model for what was not loaded."""
    size, seen = None, None
    if kwargs.get("use_safetensors") is not False and "gguf_file" not in kwargs:
        dtype = _asked_dtype(raw, kwargs)
        checkpoint, differs = locate(source, raw, hub, kwargs.get("variant"), dtype or torch.bfloat16)
        if kwargs.get("quantization_config") is None and kwargs.get("variant") != VARIANT:
            size = _size(checkpoint, dtype or checkpoint.dtype, kwargs.get("num_hidden_layers") or math.inf)
        kwargs = {**kwargs, "use_safetensors": True}
        if differs:
            seen, kwargs["dtype"] = checkpoint, dtype or checkpoint.dtype
    model_type = raw["model_type"]
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    own = whole is None or (model_type in CAUSAL and whole not in (raw.get("architectures") or ()))
    loader = AutoModelForCausalLM if own else AutoModelForImageTextToText
    with Placing(kwargs, size) as placing:
        return placing.keep(_load_through_transformers(loader, source, hub, placing.arguments, seen))


def _asked_dtype(raw: dict[str, Any], kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype that was asked for, or else that of config.json; None if neither says one."""
    said = (part.get(word) for part in (raw, raw.get("text_config") or {}) for word in ("dtype", "torch_dtype"))
    asked = kwargs.get("dtype") or kwargs.get("torch_dtype") or "auto"
    asked = next(filter(None, said), None) if asked == "auto" else asked
    dtype = getattr(torch, asked, None) if isinstance(asked, str) else asked
    return dtype if isinstance(dtype, torch.dtype) else None


def _size(checkpoint: Checkpoint, dtype: torch.dtype, behind: float) -> Size:
    """Bytes of the layers that are loaded, those before `behind`."""
    return size_of(
        {
            name: math.prod(tensor.shape)
            for name, tensor in checkpoint.tensors.items()
            if (layer := re.search(r"\blayers\.(\d+)\.", name)) is None or int(layer[1]) < behind
        },
        dtype,
    )


def _load_through_transformers(
    loader: Any, source: str, hub: dict[str, Any], kwargs: dict[str, Any], seen: Checkpoint | None = None
) -> PreTrainedModel:
    """Load by `loader.from_pretrained`; whatever it would fill with random numbers is an error here.

    Args:
        loader: A class of transformers.
        source: Folder or name on the hub.
        hub: See `HUB_ARGUMENTS`.
        kwargs: Of `from_pretrained`.
        seen: The checkpoint, where it is another view than that of its files.
    """
    how = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        if seen is None:
            model, info = loader.from_pretrained(source, **how, **hub, **kwargs)
        else:
            kind, arguments = _from_view(loader, source, hub, kwargs, seen)
            model, info = kind.from_pretrained(None, **how, **arguments)
            _read_generation_config(model, source, hub, kwargs)
        read = {name: kwargs[name] for name in ("trust_remote_code", "gguf_file") if name in kwargs}
        own = AutoConfig.from_pretrained(source, **read, **hub)
    except torch.OutOfMemoryError:
        raise
    except _UNREADABLE as error:
        raise CheckpointError(f"transformers cannot load {source}: {error}") from error
    depth, layers = read_depth(model.config, own), list_of_layers(model)
    problems = [*depth.problems, *(f"{name} is missing" for name in sorted(info["missing_keys"]))]
    problems += [
        f"{name} is unexpected"
        for name in sorted(info["unexpected_keys"])
        if layers is None or layer_of(name, layers) not in depth.left_out
    ]
    problems += [
        f"{name} has shape {tuple(there)}, config.json asks for {tuple(here)}"
        for name, there, here in sorted(info["mismatched_keys"])
    ]
    problems += [str(message) for message in info.get("error_msgs", [])]
    problems += getattr(getattr(model, "hf_quantizer", None), "problems", [])
    problems += [f"{name} is NaN or infinite in places" for name, p in model.named_parameters() if not _is_finite(p)]
    if problems:
        raise not_whole(source, problems)
    return model


def _from_view(
    loader: Any, source: str, hub: dict[str, Any], kwargs: dict[str, Any], seen: Checkpoint
) -> tuple[Any, dict[str, Any]]:
    """A class of transformers, and arguments by which it loads what was read, as if nothing had been packed."""
    own = ("dtype", "torch_dtype", "quantization_config", "variant", "use_safetensors", "trust_remote_code")
    plain = {name: value for name, value in kwargs.items() if name not in own}
    loaded: Any = plain.pop("config", None)
    if isinstance(loaded, PreTrainedConfig):
        loaded = copy.deepcopy(loaded), plain
    else:
        loaded = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **hub, **plain)
    config, left = loaded
    causal = loader is AutoModelForCausalLM
    kind: Any = (MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)[type(config)]
    text = config.get_text_config()
    if kind.config_class is type(text):  # a text model, of which the config is a part of the whole model's
        config = text
    for part in (config, text):
        vars(part).pop("quantization_config", None)
    asked = {name: kwargs[name] for name in ("dtype", "quantization_config") if name in kwargs}
    state = {name: LazyTensor(stored) for name, stored in seen.tensors.items()}
    return kind, {**left, **asked, "config": config, "state_dict": state}


def _is_finite(parameter: torch.Tensor) -> bool:
    if parameter.is_meta or not parameter.is_floating_point() or parameter.element_size() < 2 or not parameter.numel():
        return True  # offloaded or quantised: not readable here
    low, high = parameter.detach().aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))
