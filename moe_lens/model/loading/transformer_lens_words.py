"""TransformerLens's words for loading a model: each is done as it means, or answered by what to write instead."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from moe_lens.errors import InputError, UnsupportedModelError, a_kind
from moe_lens.model.devices import usable_device
from moe_lens.model.loading.checkpoint import FLOATS
from moe_lens.model.loading.loading_words import check_kinds

PROCESSING: dict[str, bool] = {
    "fold_ln": True,
    "center_writing_weights": True,
    "center_unembed": True,
    "fold_value_biases": True,
    "refactor_factored_attn_matrices": False,
}
"""What TransformerLens does to weights, and whether it does so by default."""

_DTYPES = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
_INSTEAD = {
    "hf_model": "HookedMoE.from_hf(hf_model, tokenizer) wraps a model that is loaded",
    "model_class": "the class follows from config.json; HookedMoE.from_hf(model, tokenizer) wraps a model of any other",
    "hf_config_overrides": "pass what it holds as arguments, as transformers' from_pretrained takes them",
    "n_ctx": "attention here is as long as the text; max_position_embeddings=… changes the model's own config",
    "checkpoint_index": "a checkpoint of the training is a revision: revision=…",
    "checkpoint_value": "a checkpoint of the training is a revision: revision=…",
    "checkpoint_label": "a checkpoint of the training is a revision: revision=…",
    "load_weights": "HookedMoE.from_hf(AutoModelForCausalLM.from_config(config)) wraps a model with random weights",
    "model_name": "the name is the first argument",
    "local_path": "a folder is the first argument",
    "state_dict": "model.load_state_dict(…) reads one into a model that is loaded",
    "output_loading_info": "a checkpoint that is not whole is an error here",
    "ignore_mismatched_sizes": "a tensor of another shape than config.json asks for is an error here",
}
_NO_WISH = {"output_loading_info", "ignore_mismatched_sizes"}
"""Of those, the ones that may be said if they are off."""

_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


class Asked(NamedTuple):
    """What was asked of a loaded model, beside what transformers does."""

    tokenizer: Any
    """To use instead of the checkpoint's; None for that."""
    padding_side: str | None
    prepend_bos: bool | None


def read_words(kwargs: dict[str, Any]) -> Asked:
    """Take TransformerLens's words off the arguments of `from_pretrained`, and put transformers' in their place.

    Args:
        kwargs: The arguments; changed.

    Raises:
        UnsupportedModelError: Weights are to be processed.
        InputError: A word that has another name here, or a value that it cannot have.
    """
    check_kinds(kwargs)
    refuse_processing({name: kwargs.pop(name) for name in PROCESSING.keys() & kwargs.keys()})
    for word, instead in _INSTEAD.items():
        if kwargs.get(word) is not None and not (word in _NO_WISH and kwargs[word] is False):
            shown = repr(kwargs[word]) if isinstance(kwargs[word], str | int | float) else f"({a_kind(kwargs[word])})"
            raise InputError(f"from_pretrained: {word}={shown} is not taken; {instead}")
        kwargs.pop(word, None)
    n_devices = kwargs.pop("n_devices", None)
    if n_devices not in (None, 1):
        raise InputError(f'from_pretrained: n_devices={n_devices!r} is not taken; device_map="auto" spreads the layers')
    if kwargs.pop("move_to_device", True) is False:
        raise InputError('from_pretrained: move_to_device=False is not taken; device="cpu" keeps the model where it is')
    _read_device(kwargs)
    for word in ("dtype", "torch_dtype"):
        if isinstance(kwargs.get(word), str | torch.dtype):
            kwargs[word] = _read_dtype(word, kwargs[word])
    if (layers := kwargs.get("first_n_layers")) is not None:
        if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
            raise InputError(f"from_pretrained: first_n_layers is {layers!r}; expected a whole number from 1")
        if kwargs.get("num_hidden_layers", layers) != layers:
            raise InputError(
                f"from_pretrained: got first_n_layers={layers!r} and num_hidden_layers="
                f"{kwargs['num_hidden_layers']!r}; expected one of them"
            )
    side, bos = kwargs.pop("default_padding_side", None), kwargs.pop("default_prepend_bos", None)
    if side not in (None, "left", "right"):
        raise InputError(f"from_pretrained: default_padding_side is {side!r}; expected 'left' or 'right'")
    if bos not in (None, True, False):
        raise InputError(f"from_pretrained: default_prepend_bos is {bos!r}; expected True or False")
    return Asked(kwargs.pop("tokenizer", None), side, bos)


def _read_device(kwargs: dict[str, Any]) -> None:
    device = kwargs.pop("device", None)
    if device is None:
        _check_device_map(kwargs.get("device_map"))
        return
    if kwargs.get("device_map") is not None:
        raise InputError(f"from_pretrained: got device={device!r} and device_map; expected one of them")
    device = usable_device(device, "from_pretrained: device", meta=True)
    kwargs["device_map"] = None if device.type == "cpu" else {"": device}  # None: transformers' word for the processor


def _read_dtype(word: str, asked: str | torch.dtype) -> str | torch.dtype:
    said = _DTYPES.get(asked, asked) if isinstance(asked, str) else asked
    meant = getattr(torch, said.removeprefix("torch."), None) if isinstance(said, str) else said
    if said == "auto" or meant in FLOATS.values():
        return said if said == "auto" else meant  # pyright: ignore[reportReturnType]
    known = ", ".join(sorted(str(dtype) for dtype in FLOATS.values()))
    raise InputError(f"from_pretrained: {word} is {asked!r}; expected 'auto' or one of {known}")


def _check_device_map(device_map: Any) -> None:
    if device_map is None or isinstance(device_map, Mapping) or device_map in _SPREAD:
        return
    try:
        torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"from_pretrained: device_map is {device_map!r}; expected one of {', '.join(_SPREAD)}, a device such as "
            "'cpu' or 'cuda:0', or a dictionary of devices by module"
        ) from error


def refuse_processing(asked: Mapping[str, Any]) -> None:
    """Raise where something is to be done to weights.

    Args:
        asked: Names of `PROCESSING`, and whether they are asked for.

    Raises:
        UnsupportedModelError: One is.
    """
    on = sorted(name for name, wanted in asked.items() if wanted)
    if on:
        raise UnsupportedModelError(
            f"{', '.join(on)}: the weights here are the model's own. Folding norms into packed experts is wrong for "
            "some families and inexact in bfloat16; hook names and logit attribution work without it. Leave it out, or "
            "say enable_compatibility_mode(no_processing=True)"
        )
