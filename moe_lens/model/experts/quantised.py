"""Matrices in 4 or 8 bits: kept packed, read expert by expert, and multiplied without keeping what was unpacked.

bitsandbytes packs and unpacks 4 bits. "nf4" is the NormalFloat of QLoRA (arXiv 2305.14314), "fp4" a float of 4 bits:
blocks of 64 numbers share a scale in float32, 4.5 bits a number. "int8" has a scale for each stored row, 8 bits and
little more; it is packed here, since bitsandbytes' kernel for CUDA takes float16 alone. Matrices are given to it flat,
expert by expert: on the CPU it reads blocks across rows that are no multiple of 64 wrongly; and unpacked in parts:
on CUDA it counts numbers in 32 bits.
"""

import importlib
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, Self, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe_lens.errors import InputError, UnsupportedModelError

Scheme = Literal["nf4", "fp4", "int8"]
Multiply = Callable[[Tensor, Tensor], Tensor]
BLOCK = 64
"""Numbers that share a scale in 4 bits."""
AT_ONCE = 2**28
"""Numbers that are unpacked at a time, at most: 1 GiB in float32."""


def library() -> Any:
    """Bitsandbytes' functions, without the kernels that it would fetch from a hub and run.

    Raises:
        InputError: it is not installed.
    """
    if sys.modules.get("bitsandbytes") is not None:
        return importlib.import_module("bitsandbytes.functional")
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    disabled, kernels = log.disabled, sys.modules.get("kernels")
    log.disabled = True  # it would say that there are no kernels
    sys.modules["kernels"] = None  # pyright: ignore[reportArgumentType]  # importing it now raises ImportError
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise InputError("weights in 4 and 8 bits need bitsandbytes: pip install 'moe-lens[quant]'") from error
    finally:
        log.disabled = disabled
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels


def check_scheme(scheme: Any) -> Scheme:
    """The scheme, if it is one and bitsandbytes is there.

    Raises:
        InputError: it is none, or bitsandbytes is not installed.
    """
    if scheme not in get_args(Scheme):
        raise InputError(f"quantize is {scheme!r}; expected one of {', '.join(map(repr, get_args(Scheme)))}")
    library()
    return scheme


def check_blocks(name: str, shape: Sequence[int], scheme: Scheme) -> None:
    """Refuse matrices that cannot be cut into a scheme's blocks.

    Raises:
        UnsupportedModelError: 4 bits, and a matrix that is no multiple of 64 numbers.
    """
    if scheme != "int8" and math.prod(shape[1:]) % BLOCK:
        raise UnsupportedModelError(
            f"{name}: a matrix of {' × '.join(map(str, shape[1:]))} numbers is no multiple of {BLOCK}, the block of "
            f'"{scheme}"; quantize="int8" takes it'
        )


class PackedMatrices(nn.Module):
    """Matrices of one shape, one for each expert, in 4 or 8 bits; `read` unpacks those that are asked for."""

    data: Tensor
    """The packed numbers [expert, …]."""
    scale: Tensor
    """Scales [expert, block or row], in float32 whatever the model computes in."""

    def __init__(self, data: Tensor, scale: Tensor, scheme: Scheme, shape: Sequence[int], dtype: torch.dtype):
        super().__init__()
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.scheme: Scheme = scheme
        self.shape, self.dtype = torch.Size(shape), dtype

    @classmethod
    @torch.no_grad()
    def pack(cls, weight: Float[Tensor, "expert rows columns"], scheme: Scheme, name: str = "weight") -> Self:
        """Pack matrices; of those on the meta device, make the room.

        Args:
            weight: What is packed, in the dtype that it is unpacked to.
            scheme: "nf4", "fp4" or "int8".
            name: What it is called in messages.

        Raises:
            UnsupportedModelError: see `check_blocks`.
        """
        functional, (n_experts, n_rows, n_columns) = library(), weight.shape
        check_blocks(name, weight.shape, scheme)
        if weight.is_meta:
            int8 = scheme == "int8"
            size = (n_experts, n_rows, n_columns) if int8 else (n_experts, n_rows * n_columns // 2)
            data = torch.empty(size, dtype=torch.int8 if int8 else torch.uint8, device="meta")
            scales = n_rows if int8 else n_rows * n_columns // BLOCK
            scale = torch.empty(n_experts, scales, dtype=torch.float32, device="meta")
            return cls(data, scale, scheme, weight.shape, weight.dtype)
        if scheme == "int8":
            packed = [_rows_in_int8(matrix) for matrix in weight.unbind()]
        else:
            flat = [functional.quantize_4bit(m.flatten(), blocksize=BLOCK, quant_type=scheme) for m in weight.unbind()]
            packed = [(data.flatten(), state.absmax) for data, state in flat]
        data, scale = (torch.stack(parts) for parts in zip(*packed, strict=True))
        return cls(data, scale.float(), scheme, weight.shape, weight.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: ARG002
        """Move with the model; a change of dtype changes what is unpacked to, never the scales."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        moved = fn(self.data)
        self.data, self.scale = moved, self.scale.to(moved.device)
        return self

    @torch.no_grad()
    def read(self, experts: Sequence[int] | Tensor | slice = slice(None)) -> Float[Tensor, "expert rows columns"]:
        """The matrices of some experts, unpacked."""
        data, scale = self.data[experts], self.scale[experts]
        some = max(1, AT_ONCE // math.prod(self.shape[1:]))
        if 0 < len(data) <= some:
            return self._unpacked(data, scale)
        out = data.new_empty((len(data), *self.shape[1:]), dtype=self.dtype)
        for begin in range(0, len(data), some):
            part = slice(begin, begin + some)
            out[part] = self._unpacked(data[part], scale[part])
        return out

    def _unpacked(self, data: Tensor, scale: Tensor) -> Float[Tensor, "expert rows columns"]:
        functional, shape = library(), (len(data), *self.shape[1:])
        if self.scheme == "int8":
            return (data * (scale / 127)[..., None]).to(self.dtype)
        state = functional.QuantState(
            absmax=scale.flatten(),
            shape=torch.Size([math.prod(shape)]),
            code=functional.get_4bit_type(self.scheme, device=data.device),
            blocksize=BLOCK,
            quant_type=self.scheme,
            dtype=self.dtype if self.dtype != torch.float64 else torch.float32,
        )
        return functional.dequantize_4bit(data.flatten()[:, None], state).to(self.dtype).view(shape)

    def numel(self) -> int:
        """Numbers that are packed."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return self.data.nbytes + self.scale.nbytes

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.data.device

    def extra_repr(self) -> str:
        """Scheme and shape."""
        return f"{self.scheme}, {tuple(self.shape)}"


def _rows_in_int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as whole numbers from −127 to 127, and of each row the number that 127 stands for."""
    scale = matrix.abs().amax(-1).float()
    steps = 127 / scale.clamp_min(torch.finfo(torch.float32).tiny)
    return (matrix.float() * steps[:, None]).round().to(torch.int8), scale


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


_WHY = "its parameters are packed in 4 or 8 bits, or kept elsewhere and read when they are needed"


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
    def forward(
        ctx: Any, x: Tensor, read: Callable[[], Tensor], multiply: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        ctx.read, ctx.multiply, ctx.dtype = read, multiply, x.dtype
        return multiply(x, read())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.multiply(grad_outputs[0], ctx.read().mT).to(ctx.dtype), None, None


def packed_product(x: Tensor, read: Callable[[], Tensor], multiply: Multiply) -> Tensor:
    """`multiply(x, read())` whose gradient with respect to x reads again: between the two passes nothing is kept."""
    return _Product.apply(x, read, multiply)


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed; `weight` unpacks it."""

    packed: PackedMatrices

    @classmethod
    def convert(cls, linear: nn.Linear, name: str, weight: Tensor, scheme: Scheme) -> None:
        """Give a linear layer a packed weight, in place."""
        packed = PackedMatrices.pack(weight[None], scheme, name)
        del linear.weight
        linear.__class__ = cls
        linear.add_module("packed", packed)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A copy [out_features, in_features], to be read only."""
        return self.packed.read()[0].as_subclass(ReadOnly)

    def forward(self, input: Tensor) -> Tensor:
        """X Wᵀ + b."""
        out, bias = packed_product(input, lambda: self.packed.read()[0].mT, torch.matmul), self._parameters["bias"]
        return out if bias is None else out + bias
