"""Models by transformers' own loader: what it would fill with random numbers is an error."""

import contextlib
import copy
import math
import re
import struct
from collections.abc import Collection
from typing import Any, NamedTuple

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
)

from moe_lens.errors import CheckpointError, one_line
from moe_lens.model.hf_compat import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from moe_lens.model.hf_compat import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from moe_lens.model.loading.checkpoint import Checkpoint, not_whole
from moe_lens.model.loading.depth import layer_of, list_of_layers, read_depth
from moe_lens.model.loading.device_map import Size
from moe_lens.model.loading.dispatch import Placing, needs_disk
from moe_lens.model.loading.formats.packed_tensor import PackedTensor
from moe_lens.model.loading.formats.view import method_of, packing_of
from moe_lens.model.loading.kept_bits import kept_by_transformers, lazy_bits, widths
from moe_lens.model.loading.lazy_parameters import LazyParameter
from moe_lens.model.loading.left_on_disk import check_resident, is_finite, keep_dtypes, watch_files
from moe_lens.model.loading.load_streamed import load_streamed
from moe_lens.model.loading.quantising import VARIANT, PackingConfig
from moe_lens.model.loading.sizes import packed_size, size_of, stored_packed_size
from moe_lens.model.loading.stored_parts import misfits, stored_parameters
from moe_lens.model.loading.stored_view import LazyTensor, locate

UNREADABLE = (ImportError, OSError, ValueError, LookupError, RuntimeError, StrictDataclassError, struct.error)
"""What transformers raises of a checkpoint that it cannot read."""
OF_LOADING = frozenset(
    (
        *("config", "dtype", "torch_dtype", "quantization_config", "variant", "use_safetensors", "trust_remote_code"),
        "gguf_file",
    )
)
"""Arguments of `from_pretrained` that a config would take for its own."""


def load_by_transformers(
    source: str, raw: dict[str, Any], hub: dict[str, Any], kwargs: dict[str, Any]
) -> PreTrainedModel:
    """A family that is transformers' own: headers are checked for contradictions, the model for what was not loaded."""
    model_type = raw["model_type"]
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    own = whole is None or (model_type in CAUSAL and whole not in (raw.get("architectures") or ()))
    loader = AutoModelForCausalLM if own else AutoModelForImageTextToText
    size, seen, stay, readable, stored = None, None, set[str](), None, None
    if kwargs.get("use_safetensors") is not False and "gguf_file" not in kwargs:
        asked, packing = _asked_dtype(raw, kwargs), kwargs.get("quantization_config")
        checkpoint, differs = locate(source, raw, hub, kwargs.get("variant"), asked or torch.bfloat16)
        dtype, stored = asked or checkpoint.dtype, checkpoint
        if kwargs.get("variant") == VARIANT:
            stored = None  # its whole numbers are as they are meant
            size = stored_packed_size(checkpoint, asked)
        elif isinstance(packing, PackingConfig) and raw["model_type"] in CONFIG_MAPPING:
            model = _unmade(loader, source, hub, kwargs, dtype)
            _refuse_misfits(source, model, checkpoint, kwargs)
            if packing.scheme == "stored":
                kept = kept_by_transformers(model, checkpoint, kwargs.get("key_mapping"))
                packing.method, packing.widths = method_of(packing_of(raw) or {}), widths(model, kept)
                stay = {stored.name for found in kept.values() for stored in found}
            size = packed_size(model, dtype, packing.scheme, packing.widths)
        elif packing is None:
            blocks = kwargs.get("num_layers") or kwargs.get("num_hidden_layers") or math.inf
            size = _size(checkpoint, dtype, float(blocks))
            native = raw["model_type"] in CONFIG_MAPPING and not kwargs.get("trust_remote_code")
            if native and needs_disk(kwargs, size.total):
                readable = _readable(loader, source, hub, kwargs, checkpoint, dtype)
                size = readable.size if readable else size
        kwargs = {**kwargs, "use_safetensors": True}
        if differs:
            seen, kwargs["dtype"] = checkpoint, dtype
    with Placing(kwargs, size) as placing:
        if readable and placing.streamed:
            kind, config, left = _class_and_config(loader, source, hub, placing.arguments)
            model = load_streamed(kind, config, readable.parameters, readable.dtype, **left)
            read_generation_config(model, source, hub, kwargs)
        else:
            model = load_through_transformers(loader, source, hub, placing.arguments, seen, stay)
            if stored is not None:
                _refuse_misfits(source, model, stored, kwargs)
            keep_dtypes(model)
            check_resident(model)
        return placing.keep(model)


class _Readable(NamedTuple):
    """What can be read from a checkpoint whenever it is needed."""

    parameters: dict[str, LazyParameter]
    dtype: torch.dtype
    size: Size


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


def _refuse_misfits(source: str, model: PreTrainedModel, checkpoint: Checkpoint, kwargs: dict[str, Any]) -> None:
    if problems := misfits(model, checkpoint, kwargs.get("key_mapping")):
        raise not_whole(source, problems)


def _unmade(loader: Any, source: str, hub: dict[str, Any], kwargs: dict[str, Any], dtype: torch.dtype) -> Any:
    """The model, without numbers."""
    try:
        kind, config, _ = _class_and_config(loader, source, hub, kwargs)
        with torch.device("meta"):
            return kind._from_config(copy.deepcopy(config), dtype=dtype)
    except UNREADABLE as error:
        raise CheckpointError(f"transformers cannot load {source}: {one_line(error)}") from error


def _readable(
    loader: Any, source: str, hub: dict[str, Any], kwargs: dict[str, Any], checkpoint: Checkpoint, dtype: torch.dtype
) -> _Readable | None:
    """A model's parameters where they are stored; None if transformers has to convert them."""
    model = _unmade(loader, source, hub, kwargs, dtype)
    depth = read_depth(model.config, AutoConfig.from_pretrained(source, **hub))
    parameters = stored_parameters(model, checkpoint, dtype, depth, kwargs.get("key_mapping"))
    if parameters is None:
        return None
    numbers = {name: math.prod(parameter.shape) for name, parameter in parameters.items()}
    stored = {name: parameter.stored_bytes for name, parameter in parameters.items()}
    return _Readable(parameters, dtype, size_of(numbers, dtype, streamed=True, stored=stored))


def load_through_transformers(
    loader: Any,
    source: str,
    hub: dict[str, Any],
    kwargs: dict[str, Any],
    seen: Checkpoint | None = None,
    stay: Collection[str] = (),
) -> PreTrainedModel:
    """Load by `loader.from_pretrained`; whatever it would fill with random numbers is an error here.

    Args:
        loader: A class of transformers.
        source: Folder or name on the hub.
        hub: See `HUB_ARGUMENTS`.
        kwargs: Of `from_pretrained`.
        seen: The checkpoint, where it is another view than that of its files.
        stay: Names in it of packed tensors that stay packed.
    """
    how = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        if seen is None:
            model, info = loader.from_pretrained(source, **how, **hub, **kwargs)
        else:
            kind, arguments = _from_view(loader, source, hub, kwargs, seen, stay)
            model, info = kind.from_pretrained(None, **how, **arguments)
            read_generation_config(model, source, hub, kwargs)
        read = {name: kwargs[name] for name in ("trust_remote_code", "gguf_file") if name in kwargs}
        own = AutoConfig.from_pretrained(source, **read, **hub)
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        raise CheckpointError(f"transformers cannot load {source}: {one_line(error)}") from error
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
    problems += [f"{name} is NaN or infinite in places" for name, p in model.named_parameters() if not is_finite(p)]
    if problems:
        raise not_whole(source, problems)
    own_memory(model)
    watch_files(model, prove=True)
    return model


def own_memory(model: torch.nn.Module) -> None:
    """Copy what transformers maps from a file, or it would change with the file when that is written to.

    Args:
        model: As it was loaded. Memory that torch has not allocated itself cannot be resized.
    """
    for value in (*model.parameters(), *model.buffers()):
        if value.device.type == "cpu" and not value.untyped_storage().resizable():
            value.data = value.data.clone()


def read_generation_config(model: Any, source: str, hub: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Give a model the checkpoint's own generation config, unless one was passed."""
    if kwargs.get("generation_config") is None:
        with contextlib.suppress(OSError):  # it has none: the one that was made from the model's config stays
            model.generation_config = GenerationConfig.from_pretrained(source, **hub)


def _from_view(
    loader: Any, source: str, hub: dict[str, Any], kwargs: dict[str, Any], seen: Checkpoint, stay: Collection[str]
) -> tuple[Any, dict[str, Any]]:
    """A class of transformers, and arguments by which it loads what was read, as if nothing had been packed."""
    kind, config, left = _class_and_config(loader, source, hub, kwargs)
    asked = {name: kwargs[name] for name in ("dtype", "quantization_config") if name in kwargs}
    state = {
        name: lazy_bits(stored) if name in stay and isinstance(stored, PackedTensor) else LazyTensor(stored)
        for name, stored in seen.tensors.items()
    }
    return kind, {**left, **asked, "config": config, "state_dict": state}


def _class_and_config(
    loader: Any, source: str, hub: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """A class of transformers, its config that does not say how numbers are stored, and the arguments left."""
    plain = {name: value for name, value in kwargs.items() if name not in OF_LOADING}
    loaded: Any = kwargs.get("config")
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
        if getattr(part, "norm_head", False):
            part.norm_head = False
    return kind, config, left
