"""What is on disk while a model is in use comes in the dtypes that transformers' loader gives, or is refused."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_lens.errors import InputError
from moe_lens.model.families.table import family_of
from moe_lens.model.loading.streamed_weights import streamed_weights


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
