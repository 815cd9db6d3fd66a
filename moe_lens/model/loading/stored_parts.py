"""The stored tensors that make up each parameter of a model of transformers, to be read whenever it is needed.

Most families store one matrix for each expert, which transformers' loader stacks, and joins gate and up projections.
What is stacked is read part by part; what is converted in other ways, as the loader does it.
"""

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_lens.model.hf_compat import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)
from moe_lens.model.loading.checkpoint import FLOATS, Checkpoint
from moe_lens.model.loading.converted import converted
from moe_lens.model.loading.depth import Depth, blocks_of, layer_of, list_of_layers
from moe_lens.model.loading.formats.packed_tensor import FP8
from moe_lens.model.loading.lazy_parameters import LazyParameter, StoredPart
from moe_lens.model.loading.left_on_disk import loaded_dtypes


def stored_parameters(
    model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype, depth: Depth, key_mapping: Any = None
) -> dict[str, LazyParameter] | None:
    """Every parameter and saved buffer of a model, each to be read from the checkpoint in the dtype that it has here.

    None where a tensor is missing, is left over or has another shape: transformers' loader then says what.

    Args:
        model: It need hold no numbers.
        checkpoint: Where they are.
        dtype: That the model is loaded in.
        depth: Layers of the checkpoint; those behind the last one that is loaded are left out.
        key_mapping: That of `from_pretrained`.
    """
    wanted: dict[str, torch.Tensor] = model.state_dict()
    layers, found = list_of_layers(model), sources_of(model, checkpoint.tensors, key_mapping)
    if layers is not None:
        found = {name: of for name, of in found.items() if layer_of(name, layers) not in depth.left_out}
    for name, source in model.all_tied_weights_keys.items():
        if name in found and source not in found:
            found[source] = found.pop(name)
    parts, tensors, left = dict[str, list[StoredPart]](), dict(checkpoint.tensors), set[str]()
    for name, (converter, names) in found.items():
        stacked = _parts(converter, names, checkpoint, wanted[name]) if name in wanted else None
        if stacked is not None:
            parts[name] = stacked
        elif converter is not None and names.keys() <= set(converter.source_patterns):
            sources = {pattern: [checkpoint.tensors[each] for each in some] for pattern, some in names.items()}
            for made, tensor in converted(converter, name, sources, model).items():
                if made in wanted and wanted[made].shape == tensor.shape:
                    parts[made], tensors[made] = [StoredPart(made, ..., tensor.shape)], tensor
                else:
                    left.add(made)
        else:
            left.add(name)
    if depth.problems or parts.keys() != wanted.keys() - model.all_tied_weights_keys.keys() or _refused(model, left):
        return None
    dtypes, view = loaded_dtypes(model, wanted, dtype), Checkpoint(checkpoint.files, tensors)
    return {name: LazyParameter(view, name, tuple(wanted[name].shape), dtypes[name], of) for name, of in parts.items()}


def misfits(model: PreTrainedModel, checkpoint: Checkpoint, key_mapping: Any = None) -> list[str]:
    """What is wrong with stored tensors and transformers' loader does not see, a line for each.

    It takes whole numbers for those of a parameter, has matrices of any shape packed, and asks for the shape of what
    stays on disk only when it is read.

    Args:
        model: As it was loaded; or as it is to be, on the meta device.
        checkpoint: What it is loaded from.
        key_mapping: That of `from_pretrained`.
    """
    wanted: dict[str, torch.Tensor] = model.state_dict()
    found = list[str]()
    layers, loaded = list_of_layers(model), blocks_of(model.config.get_text_config())
    for name, (converter, names) in sources_of(model, checkpoint.tensors, key_mapping).items():
        here = wanted.get(name)  # None: it was packed while it was loaded
        left_out = here is None and layers is not None and layer_of(name, layers) >= loaded
        if left_out or (here is not None and not here.is_floating_point()):
            continue
        stored = [checkpoint.tensors[each] for some in names.values() for each in some]
        whole = [each for each in stored if each.dtype not in (*FLOATS, *FP8)]
        found += [f"{each.file.name}: {each.name} is {each.dtype}, expected floating-point numbers" for each in whole]
        simple = converter is None or _stacks(converter)
        if here is None or not here.is_meta or not simple or whole:
            continue
        if _parts(converter, names, checkpoint, here) is None:
            shapes = ", ".join(sorted({str(each.shape) for each in stored}))
            found.append(f"{name} is stored as {shapes}, config.json asks for {tuple(here.shape)}")
    return found


Sources = tuple[WeightConverter | None, dict[str, list[str]]]
"""What makes a parameter, and the stored tensors that it takes, by pattern, in their order."""


def sources_of(model: PreTrainedModel, stored: Collection[str], key_mapping: Any = None) -> dict[str, Sources]:
    """What each parameter is made of, as transformers' loader finds it; names that it knows no parameter for, too.

    Args:
        model: It need hold no numbers.
        stored: Names of a checkpoint's tensors.
        key_mapping: That of `from_pretrained`.
    """
    transforms = get_model_conversion_mapping(model, dict(key_mapping) if key_mapping else None)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix, wanted = model.base_model_prefix, model.state_dict()
    found: dict[str, Sources] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], prefix, wanted)
        _, names = found.setdefault(target, (None if pattern is None else by_pattern[pattern], {}))
        names.setdefault(pattern or "", []).append(name)
    return found


def _parts(
    converter: WeightConverter | None, names: dict[str, list[str]], checkpoint: Checkpoint, wanted: torch.Tensor
) -> list[StoredPart] | None:
    """The blocks of a parameter, in the order of their first numbers; None if they are not simply stacked."""
    stored = {name: checkpoint.tensors[name] for some in names.values() for name in some}
    if any((tensor.dtype in FLOATS) != wanted.is_floating_point() for tensor in stored.values()):
        return None
    shape = tuple(wanted.shape)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if converter is None:
        (only, *others) = shapes
        return None if others or shapes[only] != shape else [StoredPart(only, ..., shape)]
    if not _stacks(converter) or len(shape) < 2 or not names.keys() <= set(converter.source_patterns):
        return None
    n_experts, n_rows, *rest = shape
    parts: list[StoredPart] = []
    for expert in range(n_experts):
        row = 0
        for pattern in converter.source_patterns:
            some = names.get(pattern, [])
            if len(some) != n_experts or shapes[some[expert]][1:] != tuple(rest):
                return None
            part = shapes[some[expert]]
            parts.append(StoredPart(some[expert], (expert, slice(row, row + part[0])), part))
            row += part[0]
        if row != n_rows:
            return None
    return parts


def _refused(model: PreTrainedModel, left: Collection[str]) -> set[str]:
    """Of names that are left over, those that transformers' loader does not pass over."""
    told: Any = SimpleNamespace(missing_keys=set(), unexpected_keys=set(left))
    model._adjust_missing_and_unexpected_keys(told)
    return told.unexpected_keys


def _stacks(converter: WeightConverter) -> bool:
    operations = [(type(each), getattr(each, "dim", None)) for each in converter.operations]
    return operations in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
