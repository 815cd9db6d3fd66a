"""Which matrices of a packed checkpoint can stay in its own bits, and how transformers' loader gets those."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_lens.errors import InputError, UnsupportedModelError
from moe_lens.model.experts.stored_bits import StoredBits
from moe_lens.model.families.deepseek import DeepseekConfig
from moe_lens.model.loading.checkpoint import Checkpoint, OpenFiles, StoredTensor
from moe_lens.model.loading.formats.packed_tensor import PackedTensor
from moe_lens.model.loading.lazy_parameters import LazyParameter, lazy_state_dict, parameter_shapes
from moe_lens.model.loading.quantising import matrices_of
from moe_lens.model.loading.stored_parts import sources_of

Sources = Mapping[Any, Sequence[StoredTensor]]
"""Stored tensors that a parameter is made of: those that are stacked, one for each expert, under one key."""
INSTEAD = 'leave quantize out, or write quantize="nf4" or "int8", which packs its numbers anew'
_AXES = {"MergeModulelist": (0,), "Concatenate": (1, 2, -2, -1), "Transpose": (1, 2, -2, -1)}
"""What transformers does to matrices of experts that can be done when they are read, and along which axes."""


class LazyBits:
    """Stored bits that are read when they are indexed, as transformers does with a slice of a safetensors file."""

    def __init__(self, read: Callable[[], StoredBits]):
        self._read = read

    def __getitem__(self, _: Any) -> StoredBits:
        return self._read()


def kept_of(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, list[PackedTensor]]:
    """By parameter of a model, the packed tensors of its checkpoint that stay as they are, whatever its family.

    Args:
        model: Of transformers; it need hold no numbers.
        checkpoint: Its packed tensors under the names that they have unpacked.

    Raises:
        UnsupportedModelError: See `kept`.
        InputError: See `kept`.
    """
    if model.config.model_type != DeepseekConfig.model_type:
        return kept_by_transformers(model, checkpoint)
    shapes = parameter_shapes(model)
    return kept_by_deepseek(model, lazy_state_dict(checkpoint, shapes, torch.float32))


def kept_by_transformers(
    model: PreTrainedModel, checkpoint: Checkpoint, key_mapping: Mapping[str, str] | None = None
) -> dict[str, list[PackedTensor]]:
    """By parameter of a model, the packed tensors of its checkpoint that stay as they are.

    Args:
        model: Of transformers; it need hold no numbers.
        checkpoint: Its packed tensors under the names that they have unpacked.
        key_mapping: Of `from_pretrained`.

    Raises:
        UnsupportedModelError: See `kept`.
        InputError: See `kept`.
    """
    found = sources_of(model, checkpoint.tensors, key_mapping)
    sources = {
        parameter: {pattern: [checkpoint.tensors[name] for name in some] for pattern, some in names.items()}
        for parameter, (_, names) in found.items()
    }
    steps = {parameter: way.operations for parameter, (way, _) in found.items() if way is not None}
    return kept(model, sources, steps)


def kept_by_deepseek(model: PreTrainedModel, parameters: Mapping[str, LazyParameter]) -> dict[str, list[PackedTensor]]:
    """The same of a DeepSeekMoE, whose parameters are put together here.

    Args:
        model: It need hold no numbers.
        parameters: All of the model's.

    Raises:
        UnsupportedModelError: See `kept`.
        InputError: See `kept`.
    """
    sources = dict[str, dict[Any, list[StoredTensor]]]()
    for name, parameter in parameters.items():
        found = sources.setdefault(name, {})
        for part in parameter.parts:
            rows = None if part.place is ... else part.place[1].start
            found.setdefault(rows, []).append(parameter.stored(part))
    return kept(model, sources, {})


def kept(
    model: PreTrainedModel, sources: Mapping[str, Sources], steps: Mapping[str, Sequence[Any]]
) -> dict[str, list[PackedTensor]]:
    """By parameter of a model, the packed tensors that stay as they are.

    Routers, embeddings and unembedding are unpacked; so is a linear layer that is not stored as one matrix.

    Args:
        model: Of transformers; it need hold no numbers.
        sources: What each parameter is made of.
        steps: Transformers' operations that make a parameter of them, where there are any.

    Raises:
        UnsupportedModelError: experts that are packed, and cannot stay so; names them.
        InputError: nothing is packed.
    """
    found: dict[str, list[PackedTensor]] = {}
    for name, place in matrices_of(model, "stored").items():
        of = sources.get(name, {})
        packed = [stored for stacked in of.values() for stored in stacked if isinstance(stored, PackedTensor)]
        if not packed:
            continue
        parameter = model.get_parameter(name)
        if not isinstance(place.holder, nn.Linear):
            in_one = place.cut(parameter).shape != parameter.shape
            why = "the experts of a layer are one matrix" if in_one else _why_not(of, steps.get(name, ()))
            if why is not None:
                raise UnsupportedModelError(
                    f"{name} of this {model.config.model_type} cannot stay as it is stored ({why}): {INSTEAD}"
                )
        elif len(of) > 1 or len(packed) > 1 or steps.get(name):
            continue
        found[name] = packed
    if not found:
        raise InputError(f'quantize="stored": no experts or linear layers of this checkpoint are packed; {INSTEAD}')
    return found


def _why_not(sources: Sources, steps: Sequence[Any]) -> str | None:
    """What stands in the way of experts' matrices that are unpacked when they are read; None if nothing does."""
    for step in steps:
        axes = {value for name, value in vars(step).items() if name in ("dim", "dim0", "dim1")}
        if type(step).__name__ not in _AXES or not axes <= set(_AXES[type(step).__name__]):
            return f"transformers rearranges it while it is read: {step!r}"
    for stacked in sources.values():
        if any(not isinstance(stored, PackedTensor) for stored in stacked):
            return "some of its matrices are packed, and others not"
        if len({_form(stored) for stored in stacked}) > 1:
            return "its matrices are stored in different shapes or dtypes"
    return None


def _form(stored: Any) -> Any:
    return stored.shape, tuple((role, part.shape, part.dtype) for role, part in sorted(stored.parts.items()))


def widths(model: PreTrainedModel, kept: Mapping[str, Sequence[PackedTensor]]) -> dict[str, float]:
    """Bytes of a number of each parameter that stays packed, by name.

    Args:
        model: Of transformers.
        kept: See `kept`.
    """
    return {
        name: sum(part.nbytes for stored in found for part in stored.parts.values()) / model.get_parameter(name).numel()
        for name, found in kept.items()
    }


def lazy_bits(stored: PackedTensor) -> LazyBits:
    """A packed tensor, to be read as it is stored when transformers asks for it."""
    return LazyBits(lambda: stored.bits(OpenFiles()))


def lazy_parameter_bits(parameter: LazyParameter) -> LazyBits:
    """The same of a parameter of DeepSeekMoE: the matrices of each expert joined, then stacked."""

    def read() -> StoredBits:
        files = OpenFiles()
        by_expert = dict[Any, list[Any]]()
        for part in parameter.parts:
            stored = parameter.stored(part)
            assert isinstance(stored, PackedTensor)
            bits = replace(stored, to=parameter.dtype).bits(files)
            by_expert.setdefault(None if part.place is ... else part.place[0], []).append(bits)
        matrices: list[Any] = [torch.cat(parts, 0) for parts in by_expert.values()]
        return torch.stack(matrices) if len(parameter.shape) == 3 else matrices[0]  # pyright: ignore[reportReturnType]

    return LazyBits(read)
