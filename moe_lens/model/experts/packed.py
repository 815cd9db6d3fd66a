"""Matrices that are not there as numbers until they are read: what they offer, and products that keep nothing.

Two kinds are `Packed`: those that moe_lens packs itself (`quantised.py`), and those that stay in the bits of their
checkpoint (`stored_bits.py`). A third is kept elsewhere (`offloaded_experts.py`).
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moe_lens.errors import InputError

Multiply = Callable[[Tensor, Tensor], Tensor]


class Packed(nn.Module):
    """Matrices of one shape, one for each expert, in few bits; `read` unpacks those that are asked for."""

    scheme: str
    """How they are packed, in a word or two."""
    shape: torch.Size
    """[expert, rows, columns]."""
    dtype: torch.dtype
    """What they are unpacked to."""

    @abstractmethod
    def read(self, experts: Sequence[int] | Tensor | slice = slice(None)) -> Float[Tensor, "expert rows columns"]:
        """The matrices of some experts, unpacked."""

    def numel(self) -> int:
        """Numbers that are packed."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next(self.buffers()).device

    def extra_repr(self) -> str:
        """Scheme and shape."""
        return f"{self.scheme}, {tuple(self.shape)}"


@runtime_checkable
class ReadableMatrices(Protocol):
    """Matrices, one for each expert, that are not there as numbers until they are read."""

    shape: torch.Size
    """[expert, rows, columns], as stored."""
    dtype: torch.dtype
    """Of what is read."""
    device: torch.device
    """Of what is read."""

    def read(self, experts: Sequence[int] | Tensor) -> Float[Tensor, "expert rows columns"]:
        """The matrices of some experts."""
        ...


class ReadOnly(Tensor):
    """A copy of numbers that are kept packed or elsewhere: writing to it would leave the model as it is, and raises."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG003
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        in_place = name.endswith("_") and not name.startswith("__") and name != "requires_grad_"
        if isinstance(args[0] if args else None, cls) and (in_place or name == "__setitem__" or name.startswith("__i")):
            raise InputError(f"{name} writes to a copy, which leaves the model as it is: {_WHY}")
        if isinstance(kwargs.get("out"), cls):
            raise InputError(f"{name}(out=…) writes to a copy, which leaves the model as it is: {_WHY}")
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            if isinstance(out, Tensor) and any(_shares(out, given) for given in args if isinstance(given, cls)):
                return out.as_subclass(cls)
        return out


_WHY = (
    "its parameters are packed in 4 or 8 bits, kept elsewhere and read when they are needed, or computed from others "
    "(torch's prune, parametrize)"
)


def _shares(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0


@dataclass(frozen=True)
class Matrices:
    """Such matrices as a kernel wants them, [expert, in, out]: an index reads, and nothing that was read is kept."""

    packed: ReadableMatrices
    transposed: bool
    """Whether they are stored [in, out]."""
    count: int
    """How many of the experts, the first ones, are meant."""
    columns: slice = field(default_factory=lambda: slice(None))
    """Which columns."""

    @property
    def shape(self) -> torch.Size:
        """[expert, in, out]."""
        _, rows, columns = self.packed.shape
        n_in, n_out = (rows, columns) if self.transposed else (columns, rows)
        return torch.Size([self.count, n_in, len(range(*self.columns.indices(n_out)))])

    @property
    def dtype(self) -> torch.dtype:
        """What they are unpacked to."""
        return self.packed.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.packed.device

    def __len__(self) -> int:
        """How many matrices."""
        return self.count

    def numel(self) -> int:
        """Numbers that are packed."""
        return math.prod(self.shape)

    def narrowed(self, columns: slice) -> "Matrices":
        """Some of the columns."""
        return replace(self, columns=columns)

    def __getitem__(self, experts: Any) -> Tensor:
        """One expert's matrix [in, out], or those of several [expert, in, out]: a copy, to be read only."""
        if isinstance(experts, int):
            return self[[experts]][0]
        if isinstance(experts, slice):
            experts = range(*experts.indices(self.count))
        return self.read(experts if isinstance(experts, Tensor) else list(experts)).as_subclass(ReadOnly)

    def read(self, experts: Sequence[int] | Tensor) -> Float[Tensor, "expert in out"]:
        """The matrices of some experts."""
        found = self.packed.read(experts)
        return (found if self.transposed else found.mT)[..., self.columns]


class _Product(torch.autograd.Function):
    """A product with matrices that are unpacked again for the gradient instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Callable[[], Tensor], multiply: Multiply) -> Tensor:
        ctx.read, ctx.multiply, ctx.dtype = read, multiply, x.dtype
        return multiply(x, read())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.multiply(grad_outputs[0], ctx.read().mT).to(ctx.dtype), None, None


def packed_product(x: Tensor, read: Callable[[], Tensor], multiply: Multiply) -> Tensor:
    """`multiply(x, read())` whose gradient with respect to x reads again: between the two passes nothing is kept."""
    return _Product.apply(x, read, multiply)


class _Linear(torch.autograd.Function):
    """The same of a linear layer, as torch computes it: a bias that is added later is rounded otherwise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, read: Callable[[], Tensor]) -> Tensor:
        ctx.read, ctx.dtype = read, x.dtype
        return F.linear(x, read(), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), (of_x, of_bias, _) = grad_outputs, ctx.needs_input_grad
        return (
            torch.matmul(grad, ctx.read()).to(ctx.dtype) if of_x else None,
            grad.reshape(-1, grad.shape[-1]).sum(0) if of_bias else None,
            None,
        )


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed; `weight` unpacks it."""

    packed: Packed

    @classmethod
    def convert(cls, linear: nn.Linear, packed: Packed) -> None:
        """Give a linear layer a packed weight, the one matrix of `packed`, in place."""
        del linear.weight
        linear.__class__ = cls
        linear.add_module("packed", packed)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A copy [out_features, in_features], to be read only."""
        return self.packed.read()[0].as_subclass(ReadOnly)

    def forward(self, input: Tensor) -> Tensor:
        """X Wᵀ + b."""
        return _Linear.apply(input, self._parameters["bias"], lambda: self.packed.read()[0])
