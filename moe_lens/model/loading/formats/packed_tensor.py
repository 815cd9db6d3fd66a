"""A matrix that is stored as several tensors, packed numbers and their scales, and is read as numbers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_lens.errors import CheckpointError
from moe_lens.model.loading.checkpoint import OpenFiles, StoredTensor

Parts = Mapping[str, Tensor]
Unpack = Callable[[Parts], Tensor]
Tensors = Mapping[str, StoredTensor]
FP8 = ("F8_E4M3", "F8_E5M2")
"""What safetensors calls floats of 8 bits."""


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """A matrix, or one for each expert; `name` is the one that it has where it is not packed."""

    parts: Tensors = field(default_factory=dict)
    """What it is made of, by role."""
    unpack: Unpack = field(default=lambda parts: parts["weight"])
    """From the parts of one matrix to its numbers in float32."""
    to: torch.dtype = torch.float32
    """What it is read in."""

    def read(self, files: OpenFiles) -> Tensor:
        """Its numbers; of several experts one after the other, so that few are in float32 at a time.

        Raises:
            CheckpointError: the parts do not fit one another.
        """
        parts = {role: part.read(files) for role, part in self.parts.items()}
        out = torch.empty(self.shape, dtype=self.to)
        try:
            if len(self.shape) == 3:
                for expert, matrix in enumerate(out):
                    matrix.copy_(self.unpack({role: _of_expert(part, expert) for role, part in parts.items()}))
            else:
                out.copy_(self.unpack(parts))
        except (ValueError, RuntimeError, IndexError) as error:
            raise CheckpointError(f"{self.file}: {self.name} cannot be unpacked: {error}") from error
        return out


Found = Iterator[PackedTensor]


def _of_expert(part: Tensor, expert: int) -> Tensor:
    return part if part.numel() == 1 else part[expert]


def made_of(name: str, parts: Tensors, shape: tuple[int, ...], unpack: Unpack) -> PackedTensor:
    """The tensor that `parts` are, of which the first says in which file it is."""
    return PackedTensor(next(iter(parts.values())).file, name, shape, "BF16", parts, unpack)


def beside(tensors: Tensors, name: str, roles: Mapping[str, str]) -> dict[str, StoredTensor]:
    """By role, those of the tensors `name` + ending that are there."""
    return {role: tensors[name + ending] for role, ending in roles.items() if name + ending in tensors}


def lacks(stored: StoredTensor, what: str) -> CheckpointError:
    """The error of a packed tensor that is not whole."""
    return CheckpointError(f"{stored.file}: {stored.name} is packed ({stored.dtype}), and its {what} is missing")
