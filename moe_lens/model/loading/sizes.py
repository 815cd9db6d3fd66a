"""How many bytes a model takes: as it is stored, in another dtype, or packed in 4 or 8 bits."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from moe_lens.model.experts.quantised import Wish
from moe_lens.model.loading.checkpoint import FLOATS, Checkpoint
from moe_lens.model.loading.device_map import Size
from moe_lens.model.loading.quantising import matrices_of, packed_width

_LAYER = re.compile(r"(.*?\.\d+)\.")
"""A tensor's layer: what stands before the first number of its name, and the number."""
_EXPERTS = re.compile(r"\.experts(\.|$)")


def size_of(
    numbers: Mapping[str, int],
    dtype: torch.dtype,
    *,
    streamed: bool = False,
    stored: Mapping[str, int] | None = None,
) -> Size:
    """Bytes of parameters in a dtype.

    Args:
        numbers: how many values each tensor has, by name.
        dtype: that they are loaded in.
        streamed: whether they can be read from the checkpoint itself. Names are then those in the model.
        stored: bytes of each there; those of `dtype` if not given.
    """
    size = _size({name: number * dtype.itemsize for name, number in numbers.items()})
    if not streamed:
        return replace(size, modules={})
    return replace(size, stored=_size(stored or {}).modules)


def packed_size(
    model: PreTrainedModel, dtype: torch.dtype, scheme: Wish, widths: Mapping[str, float] | None = None
) -> Size:
    """Bytes that a model takes when it is packed.

    Args:
        model: Of transformers; it need hold no numbers.
        dtype: Of what is not packed.
        scheme: "nf4", "fp4", "int8" or "stored".
        widths: Of "stored": bytes of a number of each parameter that stays packed, by name.

    Raises:
        UnsupportedModelError: an unknown family, or experts that cannot be cut into the scheme's blocks.
    """
    tied, parameters = model.all_tied_weights_keys, dict(model.named_parameters())
    if scheme == "stored":
        packed = widths or {}
    else:
        packed = {name: packed_width(scheme, parameters[name].shape) for name in matrices_of(model, scheme)}
    size = _size(
        {
            name: round(p.numel() * packed.get(name, dtype.itemsize))
            for name, p in parameters.items()
            if name not in tied
        }
    )
    return replace(size, modules={}, packed=True)


def stored_packed_size(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Size:
    """Bytes that a model takes that was saved packed.

    Args:
        checkpoint: Where it is.
        dtype: Of what is not packed; None for what is stored.
    """
    widths = {"I8": 1, "U8": 1} | {name: kind.itemsize for name, kind in FLOATS.items()}
    sizes = dict[str, int]()
    for name, stored in checkpoint.tensors.items():
        width = widths.get(stored.dtype, 8)
        if dtype is not None and stored.dtype in FLOATS and not name.endswith(".scale"):
            width = dtype.itemsize
        sizes[name] = math.prod(stored.shape) * width
    return replace(_size(sizes), modules={}, packed=True)


def _size(sizes: Mapping[str, int]) -> Size:
    """The sum of tensors' bytes, those of the largest layer, and those of modules: experts last."""
    layers: dict[str, int] = {}
    modules: dict[str, int] = {}
    for name, size in sizes.items():
        found = _LAYER.match(name)
        for group, key in ((layers, found[1] if found else name), (modules, name.rpartition(".")[0])):
            group[key] = group.get(key, 0) + size
    order = sorted(modules, key=lambda module: _EXPERTS.search(module) is not None)
    return Size(sum(layers.values()), max(layers.values(), default=0), {module: modules[module] for module in order})
