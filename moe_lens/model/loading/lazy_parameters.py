"""The original's tensors, one per expert and matrix, read straight into transformers' packed parameters.

Transformers' own loader collects a layer's matrices and concatenates copies of them, which costs up to 70 % of the
weights in extra memory. Here every parameter of the model is a lazy tensor that, when transformers asks for it, is
allocated once, in its final dtype, and filled one stored tensor at a time; transformers still decides where it goes
(`device_map`).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_lens.errors import CheckpointError
from moe_lens.model.loading.checkpoint import FLOATS, Checkpoint, OpenFiles, StoredTensor
from moe_lens.model.loading.formats.packed_tensor import PackedTensor

_PACKED = re.compile(r"(?P<experts>.*\.mlp\.experts)\.(?P<matrix>gate_up_proj|down_proj)")


class StoredPart(NamedTuple):
    """A stored tensor and the block of a parameter that it fills."""

    name: str
    place: Any
    """Index of the block in the parameter."""
    shape: tuple[int, ...]


def parts_of(name: str, shape: tuple[int, ...]) -> list[StoredPart]:
    """The stored tensors that make up the parameter `name`: itself, or one or two matrices for each expert."""
    match = _PACKED.fullmatch(name)
    if match is None:
        return [StoredPart(name, ..., shape)]
    n_experts, rows, columns = shape
    if match["matrix"] == "down_proj":
        matrices = [("down_proj", slice(0, rows))]
    else:
        matrices = [("gate_proj", slice(0, rows // 2)), ("up_proj", slice(rows // 2, rows))]
    return [
        StoredPart(f"{match['experts']}.{e}.{matrix}.weight", (e, block), (block.stop - block.start, columns))
        for e in range(n_experts)
        for matrix, block in matrices
    ]


def parameter_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Every stored parameter of a model; a tied one is stored once, under the name it is tied to."""
    tied = model.all_tied_weights_keys
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


def stored_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the original checkpoint format has for parameters of `shapes`."""
    return {part.name: part.shape for name, shape in shapes.items() for part in parts_of(name, shape)}


@dataclass(frozen=True)
class LazyParameter:
    """A parameter that is read when it is indexed by `...`, as transformers does with a slice of a safetensors file."""

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[StoredPart]
    """The stored tensors that it is made of, in the order of their first numbers."""

    def __getitem__(self, _: Any) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype)
        files = OpenFiles()  # a few at most: a layer's experts may straddle two shards
        for part in self.parts:
            out[part.place].copy_(self.read(part, files))
        return out

    def read(self, part: StoredPart, files: OpenFiles, experts: Sequence[int] | None = None) -> Tensor:
        """One of its parts in numbers; where the part is one matrix for each expert, those of some alone.

        Raises:
            CheckpointError: See `checked`.
        """
        stored = self.stored(part)
        if experts is not None and isinstance(stored, PackedTensor):
            return self.checked(part, stored.read(files, experts))
        found = self.checked(part, stored.read(files))
        return found if experts is None else found[list(experts)]

    @cached_property
    def plain(self) -> bool:
        """Whether its parts are stored as it has them, neither packed nor to be converted."""
        stored = map(self.stored, self.parts)
        return all(type(part) is StoredTensor and part.dtype in FLOATS for part in stored)

    def stored(self, part: StoredPart) -> StoredTensor:
        """Where one of its parts is."""
        return self.checkpoint.tensors[part.name]

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """The narrowest dtype that holds what is stored."""
        return reduce(torch.promote_types, {FLOATS[self.stored(part).dtype] for part in self.parts})

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes of all its parts in the checkpoint."""
        if not self.plain:
            return sum(self.stored(part).nbytes for part in self.parts)
        return sum(math.prod(part.shape) * FLOATS[self.stored(part).dtype].itemsize for part in self.parts)

    def checked(self, part: StoredPart, value: Tensor) -> Tensor:
        """A part that was read.

        Raises:
            CheckpointError: It has NaN, Inf, or numbers that `dtype` cannot hold.
        """
        return _finite(value, part.name, self.stored(part), self.dtype)


def _finite(value: Tensor, name: str, stored: StoredTensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself, unless it has NaN, Inf or numbers that `dtype` cannot hold."""
    if not value.is_floating_point():
        return value
    low, high = value.aminmax()
    largest = max(-low.item(), high.item()) if bool(torch.isfinite(low) & torch.isfinite(high)) else float("nan")
    if largest <= torch.finfo(dtype).max:
        return value
    if largest != largest:
        bad = (~torch.isfinite(value)).sum().item()
        raise CheckpointError(f"{stored.file}: {name} has {bad} numbers that are NaN or infinite, of {value.numel()}.")
    raise CheckpointError(
        f"{stored.file}: {name} reaches {largest:.4g}, more than {dtype} can hold. Load it as bfloat16 or float32."
    )


def lazy_state_dict(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, LazyParameter]:
    """All parameters of a model, in transformers' packed names, each to be read when asked for."""
    return {
        name: LazyParameter(checkpoint, name, shape, dtype, parts_of(name, shape)) for name, shape in shapes.items()
    }
