"""Saving a wrapped model under the names that its family's checkpoints have, so that it loads again as it is."""

import copy
import inspect
import warnings
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from moe_lens.errors import InputError, UnsupportedModelError, one_line
from moe_lens.model.experts.stored_bits import KeptMatrices
from moe_lens.model.families.deepseek_config import DeepseekConfig
from moe_lens.model.hf_compat import (
    WeightConverter,
    WeightRenaming,
    get_model_conversion_mapping,
    rename_source_key,
    revert_weight_conversion,
)
from moe_lens.model.loading.left_on_disk import files_in_use
from moe_lens.model.loading.quantising import VARIANT, packed_in, quantise
from moe_lens.model.loading.state_dict import check_numbers, check_own, original_state
from moe_lens.model.loading.stored_file import stamp_of
from moe_lens.scratch import folder_made

_SHARD = "2GB"
_WORDS = frozenset(
    word
    for function in (PreTrainedModel.save_pretrained, PreTrainedModel.push_to_hub)
    for word in inspect.signature(function).parameters
    if word not in ("self", "save_directory", "state_dict", "kwargs", "deprecated_kwargs")
) | {"safe_serialization"}


def save_pretrained(
    model: PreTrainedModel, original_names: Collection[str], tokenizer: Any, folder: Path, **kwargs: Any
) -> None:
    """Transformers' `save_pretrained`, of the model as it was before it was wrapped.

    Raises:
        UnsupportedModelError: what would be written does not load as this model; nothing is written.
        InputError: the folder is a file, is what the model is read from in every pass, or cannot be written; or an
            argument that transformers' does not have.
    """
    for word in kwargs.keys() - _WORDS:
        raise InputError(f"save_pretrained has no argument {word!r}; it has {', '.join(sorted(_WORDS))}")
    if kwargs.pop("safe_serialization", True) is not True:
        raise InputError("save_pretrained: safe_serialization=False is not taken; weights are written as safetensors")
    if folder.is_file():
        raise InputError(f"{folder} is a file; expected a folder, which need not exist")
    kept = [packed.scheme for _, packed in packed_in(model) if isinstance(packed, KeptMatrices)]
    if kept:
        raise UnsupportedModelError(
            f"this model has the bits of its checkpoint ({kept[0]}), {model.name_or_path}, which is already what would "
            'be written: copy that folder; or load the model without quantize="stored" to save its numbers'
        )
    if isinstance(model.config, DeepseekConfig) and not kwargs.get("save_original_format", True):
        raise InputError(
            "save_pretrained: a DeepSeekMoE is read under the names of its original checkpoint alone; leave "
            "save_original_format out"
        )
    check_own(model)
    if folder.resolve() in {file.resolve().parent for file in files_in_use(model)}:
        raise InputError(
            f"{folder} holds the files that this model reads its parameters from in every pass: expected another folder"
        )
    state = original_state(model, original_names)
    packed = packed_in(model)
    if not packed:
        check_numbers(model)
    _check_class(model, state, packed[0][1].scheme if packed else None)
    if packed:
        quantiser: Any = model.hf_quantizer
        quantiser.state = state
        kwargs = {"variant": VARIANT, **kwargs, "save_original_format": False}
        numbers = nullcontext()
    else:
        numbers = _as_numbers(model)
    if any(value.is_meta for value in state.values()):
        kwargs.setdefault("max_shard_size", _SHARD)  # transformers reads a whole file's worth before it writes it
    way_back = _readable(model, state) if kwargs.get("save_original_format", True) else nullcontext()
    with numbers, way_back, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        try:
            made = folder_made(folder, whole=not kwargs.get("push_to_hub"))  # what a hub does not take is still whole
            with made, _instead_of_older(folder, kwargs.get("variant")):
                type(model).save_pretrained(model, folder, state_dict=state, **kwargs)
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
        except StrictDataclassError as error:
            raise UnsupportedModelError(f"transformers does not write this config: {one_line(error)}") from error
        except (SafetensorError, OSError) as error:
            if isinstance(error, OSError) and error.errno is None:  # of a hub
                raise
            left = f"; what {folder} holds is no whole model" if folder.is_dir() else ""
            raise InputError(f"{folder} cannot be written: {error}{left}") from error


def _check_class(model: PreTrainedModel, state: Mapping[str, Tensor], scheme: Any) -> None:
    """Refuse a model whose state is not that of its family's class for its config, which is all that loading builds.

    Raises:
        UnsupportedModelError: a parameter was added, taken out or reshaped; or the config is no model's.
    """
    kinds = (kind for kind in type(model).__mro__ if kind.__module__.startswith(("transformers.models.", "moe_lens.")))
    kind: Any = next(kinds, type(model))
    try:
        with torch.device("meta"):
            made = kind._from_config(
                type(model.config).from_dict(copy.deepcopy(model.config.to_dict()))
            )  # as it is read
        if scheme is not None:
            quantise(made, scheme)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError, StrictDataclassError) as error:
        raise UnsupportedModelError(f"no {kind.__name__} can be made of this config: {one_line(error)}") from error
    wanted, own = ({name: tuple(value.shape) for name, value in of.items()} for of in (made.state_dict(), state))
    differ = [name for name in {**own, **wanted} if own.get(name) != wanted.get(name)]
    if differ:
        ours, theirs = (str(of.get(differ[0], "absent")) for of in (own, wanted))
        more = f", and {len(differ) - 1} more differ" if len(differ) > 1 else ""
        raise UnsupportedModelError(
            f"what would be written does not load as this model: {differ[0]} is {ours}, and {theirs} in a "
            f"{kind.__name__} of its config{more}; nothing was written. Merge adapters and put replaced modules back, "
            "or say in the config what was changed"
        )


@contextmanager
def _instead_of_older(folder: Path, variant: str | None) -> Generator[None]:
    """Take weights away that an earlier save left in a folder, and that would be read in place of those written here.

    Transformers removes older shards, but no `model.safetensors` when it writes shards, and reads that one file first.
    """
    dot = f".{variant}" if variant else ""
    ways = [folder / f"model{dot}.safetensors", folder / f"model.safetensors.index{dot}.json"]
    found = {file: stamp_of(file) for file in ways if file.is_file()}
    yield
    written = [file for file in ways if file.is_file() and found.get(file) != stamp_of(file)]
    for file in found.keys() - written if written else ():
        file.unlink(missing_ok=True)


@contextmanager
def _as_numbers(model: PreTrainedModel) -> Generator[None]:
    """While it is saved, a model that was unpacked when it was loaded says nothing of how its numbers were packed."""
    of_model, of_config = vars(model), vars(model.config)
    said = {name: of_model.pop(name) for name in ("hf_quantizer", "quantization_method") if name in of_model}
    told = {name: of_config.pop(name) for name in ("quantization_config",) if name in of_config}
    try:
        yield
    finally:
        of_model.update(said)
        of_config.update(told)


@contextmanager
def _readable(model: PreTrainedModel, state: Mapping[str, Tensor]) -> Generator[None]:
    """While it is saved, the model has a way back to stored names from which transformers finds its parameters again.

    Transformers writes by undoing what it did at loading. After loading with dequantisation it would write the packed
    format's names (of a gpt-oss, `…_blocks`) for numbers that are no longer packed, and read none of them again.
    """
    model_: Any = model
    loaded = vars(model).get("_weight_conversions")
    try:
        for conversions in (loaded, None):  # None: as a model that was not loaded at all
            model_._weight_conversions = conversions
            lost = _unreadable(model, state)
            if not lost:
                yield
                return
    finally:
        if loaded is None:
            vars(model).pop("_weight_conversions", None)
        else:
            model_._weight_conversions = loaded
    raise UnsupportedModelError(
        f"transformers would write {lost[0]} and {len(lost) - 1} more under names that it does not read again; nothing "
        "was written. model.state_dict() holds all parameters"
    )


def _unreadable(model: PreTrainedModel, state: Mapping[str, Tensor]) -> list[str]:
    """Names that saving would write and loading would not read, found without touching a number."""
    every = {name: value.to("meta") for name, value in state.items()}
    own = {name: value for name, value in every.items() if name not in model.all_tied_weights_keys}
    try:
        stored = revert_weight_conversion(model, own)
    except (ValueError, RuntimeError, KeyError, NotImplementedError):  # of FP8, for one, there is no way back
        return list(own)
    ways = get_model_conversion_mapping(model)
    renamings = [way for way in ways if isinstance(way, WeightRenaming)]
    converters = [way for way in ways if isinstance(way, WeightConverter)]
    return [name for name in stored if not {_read_as(name, model, every, renamings, converters), name} & every.keys()]


def _read_as(
    name: str, model: PreTrainedModel, every: dict[str, Tensor], renamings: list[Any], converters: list[Any]
) -> str:
    """The parameter that transformers' loader takes a stored tensor for."""
    return rename_source_key(name, renamings, converters, model.base_model_prefix, every)[0]
