"""A matrix that is stored as several tensors, packed numbers and their scales, and is read as numbers."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moe_lens.errors import CheckpointError
from moe_lens.model.experts.stored_bits import Parts, StoredBits, Unpack, Whole
from moe_lens.model.loading.checkpoint import FLOATS, OpenFiles, StoredTensor

Tensors = Mapping[str, StoredTensor]
FP8 = ("F8_E4M3", "F8_E5M2")
"""What safetensors calls floats of 8 bits."""

__all__ = ["FP8", "Found", "PackedTensor", "Parts", "Tensors", "Unpack", "beside", "lacks", "made_of"]


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """A matrix, or one for each expert; `name` is the one that it has where it is not packed."""

    parts: Tensors = field(default_factory=dict)
    """What it is made of, by role."""
    unpack: Unpack = field(default=lambda parts: parts["weight"])
    """From the parts of one matrix to its numbers in float32."""
    to: torch.dtype = torch.float32
    """What it is read in."""
    said: tuple[StoredTensor, ...] = ()
    """What lies beside the parts, and has been read."""

    def read(self, files: OpenFiles, experts: Sequence[int] | None = None) -> Tensor:
        """Its numbers; of several experts one after the other, so that few are in float32 at a time.

        Args:
            files: Opened when something of them is first read.
            experts: Of which to unpack the numbers, where it is one matrix for each; all, if not given.

        Raises:
            CheckpointError: the parts do not fit one another, or stand for numbers that are NaN or infinite.
        """
        with self._named():
            found = self._whole(files).read(range(self._count) if experts is None else experts)
        self._prove(found.aminmax())
        return found if len(self.shape) == 3 else found[0]

    def bits(self, files: OpenFiles) -> StoredBits:
        """Its parts as they are stored, proved to be those of numbers.

        Raises:
            CheckpointError: the parts do not fit one another, or stand for numbers that are NaN or infinite.
        """
        with self._named():
            found = self._whole(files)
            ends = [end for expert in range(self._count) for end in found.read([expert]).aminmax()]
        self._prove(ends)
        return found

    def _prove(self, ends: Iterable[Tensor]) -> None:
        if not all(bool(end.isfinite()) for end in ends):
            raise CheckpointError(f"{self.file}: {self.name} is NaN or infinite in places")

    @property
    def nbytes(self) -> int:
        """Bytes that its parts take in their files."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def files(self) -> set[Path]:
        """The files that its parts are in."""
        return {file for part in self.parts.values() for file in part.files}

    @property
    def _count(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    def _whole(self, files: OpenFiles) -> Whole:
        parts = {role: part.read(files) for role, part in self.parts.items()}
        for role, part in parts.items():  # of one that is divided by, what is infinite would come out as zero
            if role in _SCALES and part.element_size() > 1 and not bool(part.isfinite().all()):
                raise CheckpointError(
                    f"{self.file}: {self.name} is NaN or infinite in places, as is {self.parts[role].name}"
                )
        return Whole.of(parts, self.unpack, self.shape, self.to)

    @contextmanager
    def _named(self) -> Generator[None]:
        try:
            yield
        except (ValueError, RuntimeError, IndexError) as error:
            raise CheckpointError(f"{self.file}: {self.name} cannot be unpacked: {error}") from error


Found = Iterator[PackedTensor]
_SCALES = ("scale", "second", "global", "absmax", "nested_absmax", "quant_map", "nested_quant_map")
"""Roles of parts that are numbers: floating point or, in a byte, a power of two or a place in a table."""


def made_of(
    name: str,
    parts: Tensors,
    shape: tuple[int, ...],
    unpack: Unpack,
    said: tuple[StoredTensor, ...] = (),
    in_bytes: str = "",
) -> PackedTensor:
    """The tensor that `parts` are, of which the first says in which file it is.

    Args:
        name: That it has.
        parts: By role.
        shape: Of its numbers.
        unpack: See `PackedTensor`.
        said: See `PackedTensor`.
        in_bytes: The role of the scales that the format stores in bytes, powers of two or places in a table; the bytes
            of others are no numbers.

    Raises:
        CheckpointError: its numbers are floating point of 16 bits or more, or its scales whole numbers.
    """
    for role, part in parts.items():
        scales = (*FLOATS, *FP8, "F8_E8M0", *(["U8"] if role == in_bytes else []))
        if (part.dtype not in scales) if role in _SCALES else (part.dtype in FLOATS):
            raise CheckpointError(f"{part.file}: {part.name} is {part.dtype}, which {name} cannot be unpacked with")
    return PackedTensor(next(iter(parts.values())).file, name, shape, "BF16", parts, unpack, said=said)


def beside(tensors: Tensors, name: str, roles: Mapping[str, str]) -> dict[str, StoredTensor]:
    """By role, those of the tensors `name` + ending that are there."""
    return {role: tensors[name + ending] for role, ending in roles.items() if name + ending in tensors}


def lacks(stored: StoredTensor, what: str) -> CheckpointError:
    """The error of a packed tensor that is not whole."""
    return CheckpointError(f"{stored.file}: {stored.name} is packed ({stored.dtype}), and its {what} is missing")
