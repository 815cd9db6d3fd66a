"""Loading a model of which a part stays in its checkpoint: placed by a map, moved by accelerate, read by us."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import get_balanced_memory, set_module_tensor_to_device
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moe_lens.errors import InputError
from moe_lens.model.experts.offloaded_experts import is_elsewhere, numbers_of
from moe_lens.model.families.table import family_of
from moe_lens.model.loading.checksum import checksum
from moe_lens.model.loading.depth import list_of_layers
from moe_lens.model.loading.dispatch import place_of
from moe_lens.model.loading.key_mapping import WRAPPER
from moe_lens.model.loading.lazy_parameters import LazyParameter
from moe_lens.model.loading.left_on_disk import retype
from moe_lens.model.loading.streamed_weights import StreamedWeights, streamed_weights

_OF_LOADING = frozenset(
    {"offload_folder", "offload_buffers", "offload_state_dict", "low_cpu_mem_usage", "max_memory", "disable_mmap"}
) | {"key_mapping", "weights_only", "adapter_kwargs", "adapter_name"}
"""Arguments of `from_pretrained` that mean nothing where nothing is written, no file is mapped and none is a pickle, or
have been used to find the parameters."""
_OTHER_WAYS = frozenset(
    {"quantization_config", "tp_plan", "tp_size", "device_mesh", "distributed_config", "kernel_config", "use_kernels"}
) | {"allow_all_kernels", "state_dict", "proxies", "tqdm_class", "gguf_file", "variant"}
"""Arguments that ask for another way of loading, unless they are None or False."""


def load_streamed(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    parameters: Mapping[str, LazyParameter],
    dtype: torch.dtype,
    device_map: str | Mapping[str, Any],
    max_memory: Any = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A model whose parameters are where a map says; those on "disk" are read from the checkpoint in every pass.

    Args:
        kind: Class of the model.
        config: Of the model; not changed.
        parameters: All that it has, and the buffers that are saved, each once.
        dtype: Of the model; parameters have their own.
        device_map: Places by the names of modules, or one of accelerate's words.
        max_memory: What accelerate may use, where it divides the model.
        kwargs: The other arguments of `from_pretrained`, and what the model itself takes.

    Raises:
        CheckpointError: A parameter that is not on disk holds NaN or infinities.
        InputError: The map has a name that is none of the model's.
    """
    model_: Any = kind
    generation = kwargs.pop("generation_config", None)
    idle = _OF_LOADING | {name for name in _OTHER_WAYS & kwargs.keys() if not kwargs[name]}
    wanted = {name: value for name, value in kwargs.items() if name not in idle}
    with init_empty_weights(include_buffers=False):
        model: Any = model_._from_config(copy.deepcopy(config), dtype=dtype, **wanted)
    retype(model, {name: parameter.dtype for name, parameter in parameters.items()})
    tied: dict[str, str] = model.all_tied_weights_keys
    places = _places(model, tied, device_map, max_memory)
    computes = next((place for place in places.values() if place not in ("cpu", "disk")), "cpu")
    where = {name: place_of(name, places) for name in parameters}
    for name, _ in model.named_buffers():  # they are small, and stay
        if name in where:
            where[name] = computes
        else:
            set_module_tensor_to_device(model, name, computes)
    elsewhere = [name for name, place in where.items() if place == "disk"]
    resident = StreamedWeights(parameters)
    kept = {}
    for name, place in where.items():
        if place == "cpu" != computes:
            kept[name] = resident[name]
        elif place != "disk":
            set_module_tensor_to_device(model, name, place, value=resident[name], dtype=parameters[name].dtype)
    model.tie_weights()
    weights: Any = StreamedWeights(parameters, elsewhere, tied, kept, resident.stamps)
    # An index that is empty, and not None: accelerate would write what is on disk a second time.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following device_map keys do not match")  # those of single tensors
        dispatch_model(model, places, state_dict=weights, offload_index={}, skip_keys=model._skip_keys_device_placement)
    model.eval()
    if generation is not None:
        model.generation_config = generation
    return model


def _places(
    model: Any, tied: Mapping[str, str], device_map: str | Mapping[str, Any], max_memory: Any
) -> dict[str, Any]:
    """Places of the modules that own parameters, and of saved buffers that other modules own."""
    if isinstance(device_map, str):
        apart = model._no_split_modules
        low = device_map == "balanced_low_0"
        room = get_balanced_memory(model, max_memory, no_split_module_classes=apart, low_zero=low)
        return dict(infer_auto_device_map(model, room, no_split_module_classes=apart))
    computes: Any = next((place for place in device_map.values() if place not in ("cpu", "disk")), "cpu")
    known = {"", *dict(model.named_modules()), *dict(model.named_parameters())}
    if unknown := ", ".join(map(repr, sorted(device_map.keys() - known))):
        raise InputError(
            f"device_map: {unknown} is no module or parameter of the model; expected names such as "
            f"{next(iter(model._modules))!r} or '{list_of_layers(model)}.0'"
        )
    owned = {name: [own for own, _ in module.named_parameters(recurse=False)] for name, module in model.named_modules()}
    wanted = {
        name: place_of(tied.get(first := f"{name}.{own[0]}".lstrip("."), first), device_map)
        for name, own in owned.items()
        if own
    }
    resident = family_of(model.config).resident
    wanted |= {name: computes for name, place in wanted.items() if place == "disk" and name.endswith(resident)}
    places: dict[str, Any] = {}
    for name, place in wanted.items():
        if any(name.startswith(f"{outer}.") for outer in places):
            continue
        if all(place == inner for other, inner in wanted.items() if other.startswith(f"{name}.")):
            places[name] = place
        else:  # a place of the module would be that of the modules within; what it owns beside them is small
            places |= {f"{name}.{own}": computes for own in owned[name]}
    for name, _ in model.named_buffers():
        if place_of(name, places, None) is None:
            places[name] = computes
    return places


def checksum_of(model: nn.Module, name: str, parameter: Tensor) -> bytes:
    """That of a parameter, in memory or not; see `checksum`.

    Args:
        model: Wrapped or not.
        name: Of the parameter in it.
        parameter: It.
    """
    owner, _, own = name.rpartition(".")
    if parameter.is_meta and is_elsewhere(model.get_submodule(owner), own):
        weights = streamed_weights(model)
        if weights is not None and (found := weights.checksums().get(name.replace(WRAPPER, ""))) is not None:
            return found
        parameter = numbers_of(model.get_submodule(owner), own)
    return checksum(parameter)
