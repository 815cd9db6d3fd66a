"""What is on disk while a model is in use comes in the dtypes that transformers' loader gives, or is refused."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import OffloadedWeightsLoader
from torch import nn
from transformers import PreTrainedModel

from moe_lens.errors import CheckpointError, InputError
from moe_lens.model.families.table import family_of
from moe_lens.model.loading.stored_file import changed, stamp_of
from moe_lens.model.loading.streamed_weights import StreamedWeights, streamed_weights


def loaded_dtypes(model: Any, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """By name, the dtypes that transformers' loader gives: a few modules stay in float32.

    Args:
        model: As it was built.
        tensors: Its parameters and buffers.
        dtype: That it is loaded in.
    """
    plan = {re.compile(kept.replace("*", ".*")): exact for kept, exact in model._get_dtype_plan(dtype).items()}
    return {
        name: next((exact for kept, exact in plan.items() if kept.search(name)), value.dtype)
        for name, value in tensors.items()
    }


def retype(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give parameters on the meta device these dtypes: what comes in their places is converted to them."""
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and parameter.dtype != (dtype := dtypes.get(name, parameter.dtype)):
            owner, _, own = name.rpartition(".")
            made = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
            model.get_submodule(owner).register_parameter(own, made)


def keep_dtypes(model: PreTrainedModel) -> None:
    """Have what transformers left on disk come in the dtypes that it loads: it would bring all in the model's own."""
    dtypes = loaded_dtypes(model, dict(model.named_parameters()), model.dtype)
    retype(model, dtypes)
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        index = getattr(getattr(getattr(hook, "weights_map", None), "dataset", None), "index", {})
        for name in dtypes.keys() & index.keys():
            if "safetensors_file" in index[name]:
                index[name]["dtype"] = str(dtypes[name]).removeprefix("torch.")


def files_in_use(model: nn.Module) -> set[Path]:
    """The checkpoint's files that a model reads its parameters from whenever it needs them."""
    weights = streamed_weights(model)
    found = set() if weights is None else set(weights.files)
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        index = getattr(getattr(getattr(hook, "weights_map", None), "dataset", None), "index", {})
        found |= {Path(told["safetensors_file"]) for told in index.values() if "safetensors_file" in told}
    return found


class WatchedWeights(OffloadedWeightsLoader):
    """What accelerate reads in every pass, refused if it is no longer what was loaded.

    Two models that were written to one `offload_folder`, for one, would share the files of the later.

    Args:
        weights: What accelerate reads it by.
        prove: Whether what is read for the first time is to be proved to be numbers.
    """

    def __init__(self, weights: OffloadedWeightsLoader, *, prove: bool):
        super().__init__(weights.state_dict, weights.save_folder, weights.index, weights.device)
        self._stamps = {path: stamp_of(path) for path in map(self._file, self.index)}
        self._unproved = set[str](self if prove else ())

    def __getitem__(self, key: str) -> Any:
        """A parameter.

        Raises:
            CheckpointError: It is NaN or infinite in places, or its file is not what it was when the model was loaded.
        """
        if key not in self.state_dict:
            path = self._file(key)
            if (stamp := stamp_of(path)) is None or stamp != self._stamps[path]:
                raise changed(path, "has changed")
        value = super().__getitem__(key)
        if key in self._unproved:
            if not is_finite(value):
                raise CheckpointError(f"{key} is NaN or infinite in places")
            self._unproved.discard(key)
        return value

    def _file(self, key: str) -> Path:
        told = self.index[key].get("safetensors_file")
        return Path(told) if told else Path(str(self.save_folder)) / f"{key}.dat"


def watch_files(model: nn.Module, *, prove: bool = False) -> None:
    """Have accelerate refuse files that are no longer what was loaded; see `WatchedWeights`.

    Args:
        model: Of transformers.
        prove: See `WatchedWeights`.
    """
    watched: dict[int, WatchedWeights] = {}
    for module in model.modules():
        weights: Any = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        found = getattr(weights, "dataset", None)
        if type(found) is OffloadedWeightsLoader and not isinstance(found.state_dict, StreamedWeights):
            weights.dataset = watched.setdefault(id(found), WatchedWeights(found, prove=prove))


def is_finite(parameter: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity in it; true of what is packed, or elsewhere."""
    if parameter.is_meta or not parameter.is_floating_point() or parameter.element_size() < 2 or not parameter.numel():
        return True  # offloaded or quantised: not readable here
    low, high = parameter.detach().aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_resident(model: PreTrainedModel) -> None:
    """Refuse places from which transformers would not bring numbers that a family reads by itself.

    Raises:
        InputError: some are on disk.
    """
    for name, module in model.named_modules() if (resident := family_of(model.config).resident) else ():
        if name.endswith(resident) and any(parameter.is_meta for parameter in module.parameters()):
            raise InputError(
                f"{name} would be on disk, and {model.config.model_type} reads it without calling it: give the model "
                "more memory, or a device_map that keeps this module in it"
            )
