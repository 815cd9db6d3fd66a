"""A second device where there is none: its numbers are in main memory, and tensors of it refuse those of main memory.

What a GPU refuses is refused: an operation on tensors of both places, and numpy. The numbers are the processor's, to
the bit. There are no gradients, and only what goes through torch's functions is seen; `torch.cuda` knows of no device.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
_MOVES = {"_to_copy", "copy_"}
_BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}
_OF_MEMORY = {"tolist", "untyped_storage", "data_ptr", "__repr__"}


class OnCuda(Tensor):
    """A tensor of the pretended device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnCuda":
        made: Any = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("cpu"),
        )
        made.held = held.detach()
        return made

    device = property(lambda _: CUDA)  # pyright: ignore[reportAssignmentType]
    is_cuda = property(lambda _: True)  # pyright: ignore[reportAssignmentType]

    def as_subclass(self, cls: type[Tensor]) -> Any:  # noqa: ARG002
        """Itself: it can be of one class alone."""
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG003
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        strange = [value for value in given if not isinstance(value, OnCuda) and value.dim()]
        indices = name in _BY_INDEX and isinstance(args[0], OnCuda)
        if strange and name not in _MOVES and not indices:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu")
        out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if name.endswith("_") or "out" in kwargs:  # in place: the very tensor that was given
            return kwargs.get("out", args[0]) if isinstance(out, Tensor) else out
        return tree_map(_on_cuda, out)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnCuda) else value


def _on_cuda(value: Any) -> Any:
    return OnCuda(value) if isinstance(value, Tensor) and not isinstance(value, OnCuda) else value


class PretendedDevice(TorchFunctionMode):
    """While it is entered, "cuda" and "cuda:0" name the device."""

    def __init__(self) -> None:
        super().__init__()
        self.called = set[str]()
        """Names of functions of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        first: Any = args[0] if args else None
        self.called.add(name)
        if isinstance(first, OnCuda) and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if isinstance(first, OnCuda) and name in _OF_MEMORY:
            return func(first.held, *args[1:], **kwargs)
        if name in ("cpu", "cuda") and isinstance(first, Tensor):
            return _moved(first, name)
        if name == "to":
            return self._to(first, args[1:], kwargs)
        if (place := kwargs.get("device")) is not None and torch.device(place).type == "cuda":
            made = func(*tree_map(_held, args), **{**tree_map(_held, kwargs), "device": "cpu"})
            return _on_cuda(made)
        if place is not None and torch.device(place).type == "cpu":
            return func(*tree_map(_held, args), **kwargs)
        return func(*args, **kwargs)

    def _to(self, x: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        given = [*args, kwargs.pop("device", None), kwargs.pop("other", None)]
        places = [torch.device(value) for value in given if isinstance(value, str | torch.device)]
        places += [value.device for value in given if isinstance(value, Tensor)]
        dtypes = [value for value in given if isinstance(value, torch.dtype)]
        dtypes += [value.dtype for value in given if isinstance(value, Tensor)]
        for dtype in [*dtypes, *([kwargs["dtype"]] if kwargs.get("dtype") else [])]:
            x = x.type(dtype)
        if places and places[0].type == "meta":
            return torch.empty_like(_held(x), device="meta")
        return _moved(x, places[0].type) if places else x


def _moved(x: Tensor, place: str) -> Tensor:
    if x.is_meta or isinstance(x, OnCuda) == (place == "cuda"):
        return x
    return OnCuda(x) if place == "cuda" else _held(x)
