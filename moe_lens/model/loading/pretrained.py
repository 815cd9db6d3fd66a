"""Models by name or folder: whole, or an error that names file and tensor."""

import copy
import importlib.resources
import logging
import os
import re
import traceback
from typing import Any, Literal

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from moe_lens.errors import CheckpointError, InputError, UnsupportedModelError, a_kind, one_line
from moe_lens.model.families.deepseek import DeepseekConfig
from moe_lens.model.families.refusals import ABSENT
from moe_lens.model.families.table import check_release
from moe_lens.model.hf_compat import resolve_revision
from moe_lens.model.loading.checkpoint import EMBEDDED, FLOATS, HUB_ARGUMENTS, find_file, read_config
from moe_lens.model.loading.config_json import read_object
from moe_lens.model.loading.deepseek_checkpoint import check_sizes, load_deepseek
from moe_lens.model.loading.depth import counts_its_list, cut_layer_types, first_layers, keep_first
from moe_lens.model.loading.device_map import slow_dtype
from moe_lens.model.loading.dispatch import places
from moe_lens.model.loading.formats.view import packing_of
from moe_lens.model.loading.gguf_file import find_gguf, read_gguf_config
from moe_lens.model.loading.machine import slowdown
from moe_lens.model.loading.quantising import METHOD, VARIANT
from moe_lens.model.loading.stored_view import read_packing
from moe_lens.model.loading.through_transformers import OF_LOADING, UNREADABLE, load_by_transformers
from moe_lens.model.loading.tokenizer import check_vocabulary, has_tokenizer, load_tokenizer

__all__ = ["EMBEDDED", "load_pretrained", "load_tokenizer", "resolve_name"]

Trust = bool | Literal["tokenizer"]
_LOG = logging.getLogger(__name__)


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
            Without `device_map`, or with "auto", they go where there is room; `max_memory` bounds it.

    Returns:
        The model in evaluation mode, and its tokenizer or None where the checkpoint has none that can be read.

    Raises:
        CheckpointError: something is missing, unexpected, misshapen, unreadable, NaN or infinite.
        UnsupportedModelError: a model_type, or a feature of its config, that is not known.
        InputError: an argument that neither transformers nor the model reads.
    """
    source = find_gguf(resolve_name(str(name_or_path)), kwargs)
    given = {key: kwargs.pop(key) for key in HUB_ARGUMENTS & kwargs.keys()}
    hub = {key: value for key, value in given.items() if value is not None}
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
        for word in ("first_n_layers", "num_hidden_layers"):
            if kwargs.get(word) is not None:
                raise InputError(f"{gguf}: transformers reads all layers of a GGUF file: leave {word} out")
        given_words = {word for word, value in kwargs.items() if value is not None}
        path, raw, settings = read_gguf_config(source, gguf, hub, UNREADABLE, given_words)
        if "config" not in given_words:  # which says all of it
            kwargs |= {name: value for name, value in settings.items() if name not in kwargs}
    layers = kwargs.pop("first_n_layers", None)
    if kwargs.get("num_hidden_layers") is not None and counts_its_list(raw):
        raise InputError(
            f"num_hidden_layers has no effect in a {raw['model_type']}, whose config counts its list of layers; pass "
            "first_n_layers"
        )
    _check_dtype(path, raw, kwargs)
    word = None if layers is None else first_layers(raw, layers)
    kwargs |= word or {}
    check_release(raw["model_type"])
    if layers is not None and word is None and kwargs.get("config") is None:
        kwargs["config"] = source
    _read_given_config(source, raw["model_type"], hub, kwargs)
    if layers is not None and word is None:
        config: Any = copy.deepcopy(kwargs["config"])
        keep_first(config, layers)
        kwargs["config"] = config
    said = packing_of(raw)
    if said is not None and said.get("quant_method") == METHOD:
        kwargs["variant"] = VARIANT
    read_packing(raw, kwargs)
    own = raw["model_type"] == DeepseekConfig.model_type
    if adapter is not None:
        raise UnsupportedModelError(
            f"{adapter}: beside the weights lies an adapter of PEFT. Merge it first "
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
            model = load_deepseek(source, path, raw, hub, kwargs)
        else:
            model = load_by_transformers(source, raw, hub, {**kwargs, "trust_remote_code": trust_remote_code is True})
    except CheckpointError as error:
        if _of_angles(error.__cause__):
            raise _no_angles(source, error.__cause__) from error
        raise
    except TypeError as error:  # transformers hands what it does not read to the model's own __init__
        if _of_angles(error):
            raise _no_angles(source, error) from error
        word = re.search(r"got an unexpected keyword argument '(\w+)'", str(error))
        if word is None or word[1] not in kwargs:
            raise
        raise InputError(f"from_pretrained has no argument {word[1]!r}, and {path} no such setting") from error
    # Of an argument, or of a package that it needs: what is wrong with the checkpoint has been found by then.
    except (ImportError, ValueError) as error:
        raise InputError(f"transformers cannot load {source}: {one_line(error)}") from error
    cut_layer_types(model.config)
    model.config.name_or_path = model.name_or_path = str(name_or_path)
    return model, _tokenizer(model, source, hub, trusted=trust_remote_code in (True, "tokenizer"), gguf=gguf)


def _of_angles(error: BaseException | None) -> bool:
    """Whether it was raised where a config's rotary angles are read."""
    frames = traceback.walk_tb(error.__traceback__) if isinstance(error, TypeError | LookupError) else ()
    return any(re.search("rope|rotary", frame.f_code.co_qualname, re.IGNORECASE) for frame, _ in frames)


def _no_angles(source: str, error: BaseException | None) -> InputError:
    return InputError(
        f"transformers makes no rotary angles of rope_parameters (rope_scaling) in {source} or in these arguments "
        f"({type(error).__name__}: {error}); expected all of them, as {{'rope_type': 'yarn', 'rope_theta': 1e4, "
        "'factor': 2.0}: an argument replaces what config.json has"
    )


def _check_dtype(path: Any, raw: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Refuse a config.json whose dtype is none that torch has, or none to compute in where no other is asked for.

    Raises:
        CheckpointError: names it.
    """
    asked = next((kwargs[word] for word in ("dtype", "torch_dtype") if kwargs.get(word) is not None), "auto")
    for part in (raw, raw.get("text_config") or {}):
        for word in ("dtype", "torch_dtype"):
            said = part.get(word)
            if said is None or isinstance(said, dict):  # the second: one for each part
                continue
            dtype = getattr(torch, said, None) if isinstance(said, str) else said
            unknown = isinstance(said, str) and dtype is None
            if unknown or (asked == "auto" and dtype not in FLOATS.values()):
                instead = "" if unknown else '; or pass dtype="bfloat16"'
                raise CheckpointError(
                    f"{path}: {word} is {said!r}; expected bfloat16, float16, float32 or float64{instead}"
                )


def _read_given_config(source: str, model_type: str, hub: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Put the config itself in the place of its folder, file or name; AutoModel would not read it, in silence.

    Args:
        source: Of the weights.
        model_type: That its config.json names.
        hub: See `HUB_ARGUMENTS`; the revision is the weights' own.
        kwargs: Of `from_pretrained`; what changes a config changes this one. Changed.

    Raises:
        InputError: It cannot be read, is of another kind of model, or is something else.
    """
    given = kwargs.get("config")
    if given is None:
        kwargs.pop("config", None)
    if given is None or isinstance(given, PreTrainedConfig):
        return
    wanted = "expected a config of transformers, or the folder, file or name on the hub of one"
    if not isinstance(given, str | os.PathLike):
        raise InputError(f"config is {a_kind(given)}; {wanted}")
    elsewhere = {} if str(given) == source else dict.fromkeys(("revision", "subfolder"))
    where = {key: value for key, value in (hub | elsewhere).items() if value is not None}
    words = {key: kwargs.pop(key) for key in sorted(kwargs.keys() - OF_LOADING)}
    try:
        said, _ = PreTrainedConfig.get_config_dict(str(given), **where)
        read: Any = AutoConfig.from_pretrained(str(given), return_unused_kwargs=True, **where, **words)
    except UNREADABLE as error:
        raise InputError(f"config is {str(given)!r}, which cannot be read ({error}); {wanted}") from error
    config, left = read
    if config.model_type != model_type:
        raise InputError(f"config {str(given)!r} is of the type {config.model_type}, and {source} holds a {model_type}")
    if model_type == DeepseekConfig.model_type:
        check_sizes(str(given), said)
    kwargs |= {**left, "config": config}


def warn_if_slow(model: PreTrainedModel) -> None:
    """Say so where a processor is to compute a large model in a dtype that it is slow in."""
    if slow := slow_dtype(model.dtype, places(model), slowdown):
        _LOG.warning('%s. dtype="float32" (--dtype float32) is quicker, and takes twice the memory', slow.capitalize())


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
