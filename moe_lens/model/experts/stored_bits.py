"""Matrices that stay in the bits of their checkpoint: each stored tensor byte for byte, and what unpacks them.

What unpacks them when the model computes is what unpacks them when a model is loaded in 16 bits, so that the numbers
are the same. Loading stacks, joins and transposes stored matrices; of packed ones that is noted, and done when they are
read: `torch.stack`, `torch.cat` and `torch.transpose` take them.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from moe_lens.model.experts.packed import Packed

Parts = Mapping[str, Tensor]
Unpack = Callable[[Parts], Tensor]
"""From the parts of one matrix, by role, to its numbers in float32."""


class StoredBits(nn.Module):
    """A matrix [rows, columns], or one for each expert [expert, rows, columns], that is unpacked when it is read."""

    shape: torch.Size
    dtype: torch.dtype
    """What it is unpacked to."""

    @abstractmethod
    def read(self, experts: Sequence[int]) -> Float[Tensor, "expert rows columns"]:
        """The matrices of some experts; what has no axis of experts is that of one."""

    def contiguous(self) -> "StoredBits":
        """Itself: what is read is contiguous."""
        return self

    def from_behind(self, axis: int) -> int:
        """An axis, counted from the last one, which has no expert before it."""
        found = axis if axis < 0 else axis - len(self.shape)
        if found < -2:
            raise ValueError(f"stored bits are joined and transposed within matrices, not along axis {axis}")
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> "StoredBits":  # noqa: ARG003
        return _NOTED[func](*args, **(kwargs or {}))


class Whole(StoredBits):
    """Matrices as the bytes of the tensors that they are stored as.

    Args:
        parts: Bytes by role [expert, bytes]; [1, bytes] of what all experts share.
        kinds: Dtype and shape of the tensor of one expert, by role.
        unpack: For each expert, or one for all.
        shape: [rows, columns] or [expert, rows, columns].
        dtype: What they are unpacked to.
    """

    def __init__(
        self,
        parts: Mapping[str, UInt8[Tensor, "_ bytes"]],
        kinds: Mapping[str, tuple[torch.dtype, torch.Size]],
        unpack: Sequence[Unpack],
        shape: Sequence[int],
        dtype: torch.dtype,
    ):
        super().__init__()
        for role, part in parts.items():
            self.register_buffer(role, part)
        self.kinds, self.unpack = dict(kinds), tuple(unpack)
        self.shape, self.dtype = torch.Size(shape), dtype

    @classmethod
    def of(cls, parts: Parts, unpack: Unpack, shape: Sequence[int], dtype: torch.dtype) -> Self:
        """A stored tensor; of several experts, a part of more than one number has their axis first."""
        found, kinds = dict[str, Tensor](), dict[str, tuple[torch.dtype, torch.Size]]()
        for role, part in parts.items():
            each = len(shape) == 3 and part.numel() != 1
            n = len(part) if each else 1
            found[role] = part.reshape(n, part.numel() // n).view(torch.uint8)
            kinds[role] = part.dtype, part.shape[1:] if each else part.shape
        return cls(found, kinds, [unpack], shape, dtype)

    @torch.no_grad()
    def read(self, experts: Sequence[int]) -> Float[Tensor, "expert rows columns"]:
        """Unpacked one after the other, so that few numbers are in float32 at a time."""
        some = next(self.buffers())
        out = torch.empty((len(experts), *self.shape[-2:]), dtype=self.dtype, device=some.device)
        for matrix, expert in zip(out, experts, strict=True):
            parts = {
                role: _of(part, expert).view(self.kinds[role][0]).view(self.kinds[role][1])
                for role, part in self.named_buffers()
            }
            # cast first: a copy that casts and transposes takes three times as long
            matrix.copy_(_of(self.unpack, expert)(parts).to(self.dtype))
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model; a change of dtype changes what is unpacked to, never the bits."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


class Joined(StoredBits):
    """Matrices that are one in the model, side by side."""

    def __init__(self, parts: Sequence[StoredBits], axis: int):
        super().__init__()
        self.parts, self.axis = nn.ModuleList(parts), axis
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        self.shape, self.dtype = torch.Size(shape), parts[0].dtype

    def read(self, experts: Sequence[int]) -> Float[Tensor, "expert rows columns"]:
        """Each unpacked, then joined."""
        return torch.cat([part.read(experts) for part in self.parts], self.axis)  # pyright: ignore[reportCallIssue]


class Turned(StoredBits):
    """Matrices that the model has transposed."""

    def __init__(self, part: StoredBits):
        super().__init__()
        self.part, self.dtype = part, part.dtype
        self.shape = torch.Size([*part.shape[:-2], part.shape[-1], part.shape[-2]])

    def read(self, experts: Sequence[int]) -> Float[Tensor, "expert rows columns"]:
        """Unpacked, then transposed."""
        return self.part.read(experts).mT.contiguous()


def _of(each: Any, expert: int) -> Any:
    return each[expert if len(each) > 1 else 0]


def _cat(parts: Sequence[StoredBits], dim: int = 0) -> StoredBits:
    return parts[0] if len(parts) == 1 else Joined(parts, parts[0].from_behind(dim))


def _transpose(part: StoredBits, dim0: int, dim1: int) -> StoredBits:
    assert {part.from_behind(dim0), part.from_behind(dim1)} == {-1, -2}
    return Turned(part)


def _stack(parts: Sequence[Any], dim: int = 0) -> StoredBits:
    """One for each expert, stored as the first one is."""
    first, n = parts[0], len(parts)
    assert dim == 0 and len(first.shape) == 2
    if isinstance(first, Joined):
        return Joined([_stack(of) for of in zip(*(part.parts for part in parts), strict=True)], first.axis)
    if isinstance(first, Turned):
        return Turned(_stack([part.part for part in parts]))
    if any((part.kinds, part.shape) != (first.kinds, first.shape) for part in parts):
        raise ValueError("matrices that are stored in different shapes cannot be those of one layer's experts")
    found = {role: torch.cat([part.get_buffer(role) for part in parts]) for role in first.kinds}
    return Whole(
        found, first.kinds, [unpack for part in parts for unpack in part.unpack], (n, *first.shape), first.dtype
    )


_NOTED: dict[Any, Callable[..., StoredBits]] = {torch.stack: _stack, torch.cat: _cat, torch.transpose: _transpose}


class KeptMatrices(Packed):
    """Matrices in the bits of their checkpoint, one for each expert."""

    def __init__(self, bits: StoredBits, method: str):
        super().__init__()
        bits = bits if len(bits.shape) == 3 else _stack([bits])
        # in memory of their own: a tensor that was read from a file can be a view of it
        self.bits, self.scheme = bits._apply(torch.clone), f"{method} as stored"
        self.shape, self.dtype = bits.shape, bits.dtype

    def read(self, experts: Sequence[int] | Tensor | slice = slice(None)) -> Float[Tensor, "expert rows columns"]:
        """The matrices of some experts, unpacked."""
        which = experts.cpu() if isinstance(experts, Tensor) else experts
        return self.bits.read(torch.arange(self.shape[0])[which].tolist())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model; a change of dtype changes what is unpacked to."""
        super()._apply(fn, recurse)
        self.dtype = next(part.dtype for part in self.bits.modules() if isinstance(part, Whole))
        return self
