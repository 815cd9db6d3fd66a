"""Arguments of `from_pretrained`, held against the kinds that they take; of others, transformers fails inside."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from moe_lens.errors import InputError, a_kind
from moe_lens.model.hf_compat import QuantizationConfigMixin

_FLAG = (bool, np.bool_), "True or False"
_TEXT = (str,), "a string"
_PATH = (str, os.PathLike), "a path"
_NAMED = (Mapping,), "a dictionary"
_KERNEL = (str, Mapping), "a name, or a dictionary of names"
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "adapter_kwargs": _NAMED,
    "attn_implementation": _KERNEL,
    "cache_dir": _PATH,
    "dtype": ((str, torch.dtype, Mapping), "a dtype or its name"),
    "experts_implementation": _KERNEL,
    "force_download": _FLAG,
    "generation_config": ((GenerationConfig,), "a GenerationConfig"),
    "gguf_file": _PATH,
    "key_mapping": ((Mapping,), "a dictionary from patterns of names to names"),
    "local_files_only": _FLAG,
    "low_cpu_mem_usage": _FLAG,
    "max_memory": ((Mapping,), "a dictionary of sizes by place, such as {0: '20GiB', 'cpu': '60GiB'}"),
    "num_hidden_layers": ((int, np.integer), "a whole number"),
    "offload_buffers": _FLAG,
    "offload_folder": _PATH,
    "offload_state_dict": _FLAG,
    "proxies": _NAMED,
    "quantization_config": ((Mapping, QuantizationConfigMixin), "a config of transformers, such as BitsAndBytesConfig"),
    "revision": _TEXT,
    "subfolder": _PATH,
    "token": ((str, bool), "a string, or whether to use the one that is stored"),
    "torch_dtype": ((str, torch.dtype, Mapping), "a dtype or its name"),
    "use_safetensors": _FLAG,
    "variant": _TEXT,
    "weights_only": _FLAG,
}
"""By name, the kinds of value and what they are called. All may be None."""


def check_kinds(kwargs: Mapping[str, Any]) -> None:
    """Refuse a value of a kind that an argument does not take.

    Args:
        kwargs: Of `from_pretrained`.

    Raises:
        InputError: Names the argument, what came and what is expected.
    """
    for word, value in kwargs.items():
        if isinstance(value, Tensor | np.ndarray):
            raise InputError(f"from_pretrained: {word} is {a_kind(value)}, and no argument is one")
        kinds, expected = _KINDS.get(word, ((object,), ""))
        number = isinstance(value, bool) and bool not in kinds and object not in kinds
        if value is not None and (number or not isinstance(value, kinds)):
            raise InputError(f"from_pretrained: {word} is {a_kind(value)}; expected {expected}")
        names = [*value.keys(), *value.values()] if word == "key_mapping" and isinstance(value, Mapping) else []
        if not all(isinstance(name, str) for name in names):
            raise InputError(f"from_pretrained: key_mapping holds other things than strings; expected {expected}")
