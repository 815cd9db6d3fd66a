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
from typing import Any, Literal, Self, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.errors import InputError, UnsupportedModelError
from moe_lens.model.experts.packed import Packed

Scheme = Literal["nf4", "fp4", "int8"]
Wish = Scheme | Literal["stored"]
"""What `quantize` can ask for: to pack anew, or to keep what the checkpoint has packed."""
BLOCK = 64
"""Numbers that share a scale in 4 bits."""
AT_ONCE = 2**28
"""Numbers that are unpacked at a time, at most: 1 GiB in float32."""
IN_CACHE = 2**18
"""Of 8 bits on a processor: 1 MiB in float32, which stays in a core's cache until it is rounded."""


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


def check_wish(wish: Any) -> Wish:
    """What `quantize` asks for, if that exists, and bitsandbytes is there where it is needed.

    Raises:
        InputError: there is no such thing, or bitsandbytes is not installed.
    """
    return wish if wish == "stored" else check_scheme(wish, (*get_args(Scheme), "stored"))


def check_scheme(scheme: Any, known: Sequence[str] = get_args(Scheme)) -> Scheme:
    """The scheme, if it is one and bitsandbytes is there.

    Raises:
        InputError: it is none, or bitsandbytes is not installed.
    """
    if scheme not in get_args(Scheme):
        raise InputError(f"quantize is {scheme!r}; expected one of {', '.join(map(repr, known))}")
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


class PackedMatrices(Packed):
    """Matrices of one shape, one for each expert, in 4 or 8 bits; `read` unpacks those that are asked for."""

    data: Tensor
    """The packed numbers [expert, …]."""
    scale: Tensor
    """Scales [expert, block or row], in float32 whatever the model computes in."""

    def __init__(self, data: Tensor, scale: Tensor, scheme: Scheme, shape: Sequence[int], dtype: torch.dtype):
        super().__init__()
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.scheme = scheme
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
            return self._from_int8(data, scale / 127)
        state = functional.QuantState(
            absmax=scale.flatten(),
            shape=torch.Size([math.prod(shape)]),
            code=functional.get_4bit_type(self.scheme, device=data.device),
            blocksize=BLOCK,
            quant_type=self.scheme,
            dtype=self.dtype if self.dtype != torch.float64 else torch.float32,
        )
        return functional.dequantize_4bit(data.flatten()[:, None], state).to(self.dtype).view(shape)

    def _from_int8(self, data: Tensor, step: Tensor) -> Float[Tensor, "expert rows columns"]:
        out = data.new_empty(data.shape, dtype=self.dtype)
        rows = max(1, (IN_CACHE if data.device.type == "cpu" else AT_ONCE) // data.shape[-1])
        parts = (part.flatten(0, 1).split(rows) for part in (out, data, step[..., None]))
        for unpacked, numbers, steps in zip(*parts, strict=True):
            unpacked.copy_(numbers * steps)
        return out


def _rows_in_int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as whole numbers from −127 to 127, and of each row the number that 127 stands for."""
    scale = matrix.abs().amax(-1).float()
    steps = 127 / scale.clamp_min(torch.finfo(torch.float32).tiny)
    return (matrix.float() * steps[:, None]).round().to(torch.int8), scale
