"""Layers as transformers names their parts, where a component of another part has such a name.

In a Gemma 4, `layers[3].mlp` of transformers is the dense MLP, and `blocks[3].mlp` the experts: the blocks that are
wrapped around its layers stand in its list of them, which shows each under transformers' names.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from moe_lens.model.tl_compat import GeneralizedComponent

_BY_PATH = frozenset(("get_buffer", "get_parameter", "get_submodule", "set_submodule"))
"""What looks names up inside a module."""


class LayerByItsNames:
    """A block, of which the names that transformers' layer has are that layer's; in all else the block itself."""

    __slots__ = ("_block",)

    def __init__(self, block: GeneralizedComponent):
        object.__setattr__(self, "_block", block)

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """That of the block: a module, and a component."""
        return type(self._block)

    def _owner(self, name: str) -> Any:
        block = self._block
        taken = name in _BY_PATH or (name in block.submodules and hasattr(block.original_component, name))
        return block.original_component if taken else block

    def __getattr__(self, name: str) -> Any:
        return getattr(self._owner(name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._owner(name), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._owner(name), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        return self._block(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return self._block is block_of(other)

    def __hash__(self) -> int:
        return hash(self._block)

    def __repr__(self) -> str:
        return repr(self._block)

    def __dir__(self) -> Iterable[str]:
        return dir(self._block)

    def __copy__(self) -> "LayerByItsNames":
        return LayerByItsNames(copy.copy(self._block))

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerByItsNames":
        return LayerByItsNames(copy.deepcopy(self._block, memo))

    def __reduce_ex__(self, _: Any) -> Any:
        return LayerByItsNames, (self._block,)


def block_of(layer: Any) -> Any:
    """The block that is seen by transformers' names; anything else as it is."""
    return object.__getattribute__(layer, "_block") if type(layer) is LayerByItsNames else layer


def _seen(layer: Any) -> Any:
    return LayerByItsNames(layer) if isinstance(layer, GeneralizedComponent) else layer


class LayersByTheirNames(nn.ModuleList):
    """The same modules as in a list of blocks, whatever is done to either; each is shown as `LayerByItsNames`."""

    def __init__(self, blocks: Iterable[nn.Module] = ()):
        self.__dict__["blocks"] = nn.ModuleList()
        super().__init__()
        self.__dict__["blocks"] = blocks if isinstance(blocks, nn.ModuleList) else nn.ModuleList(map(block_of, blocks))

    @property
    def _modules(self) -> dict[str, Any]:
        return self.__dict__["blocks"]._modules

    @_modules.setter
    def _modules(self, modules: dict[str, Any]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.__dict__["blocks"]._modules = {name: block_of(module) for name, module in modules.items()}

    @property
    def training(self) -> bool:
        """That of the list of blocks."""
        return self.__dict__["blocks"].training

    @training.setter
    def training(self, mode: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.__dict__["blocks"].training = mode

    def __getattr__(self, name: str) -> Any:
        return _seen(getattr(self.__dict__["blocks"], name))

    def __getitem__(self, idx: Any) -> Any:
        found = self.__dict__["blocks"][idx]
        return LayersByTheirNames(found) if isinstance(found, nn.ModuleList) else _seen(found)

    def __iter__(self) -> Iterator[Any]:
        return map(_seen, self.__dict__["blocks"])

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            setattr(self.__dict__["blocks"], name, block_of(value))
        else:
            super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Put a module into the list of blocks."""
        self.__dict__["blocks"].add_module(name, block_of(module))

    def insert(self, index: int, module: nn.Module) -> None:
        """Put a module in front of one of the list."""
        self.__dict__["blocks"].insert(index, block_of(module))


def show_by_their_names(model: nn.Module, path: str) -> None:
    """Let transformers' list of layers, in a wrapped model, show each under transformers' names where they differ.

    Args:
        model: That of transformers.
        path: Where the list is.
    """
    holder, _, name = path.rpartition(".")
    blocks: Any = model.get_submodule(path)
    if any(_differ(block) for block in blocks if isinstance(block, GeneralizedComponent)):
        setattr(model.get_submodule(holder), name, LayersByTheirNames(blocks))


def _differ(block: GeneralizedComponent) -> bool:
    layer = block.original_component
    return any(part.name not in (name, None) and hasattr(layer, name) for name, part in block.submodules.items())
