"""Parameters of modules whose numbers accelerate keeps elsewhere, for those who ask between two passes.

In a pass they come by themselves. Outside one, a parameter is on the meta device and has a shape alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from jaxtyping import Float
from torch import Tensor, nn

from moe_lens.errors import InputError
from moe_lens.model.experts.packed import ReadOnly


def is_elsewhere(module: nn.Module, name: str = "weight") -> bool:
    """Whether a module's parameter is kept elsewhere, and not there now."""
    parameter = getattr(module, name, None)
    return isinstance(parameter, Tensor) and parameter.is_meta and has_offloaded_params(module)


def device_of(module: Any, name: str = "weight") -> torch.device:
    """Where a module's parameter is, or comes to in a pass."""
    if not is_elsewhere(module, name):
        return getattr(module, name).device
    place = module._hf_hook.execution_device
    return torch.device("cpu" if place is None else place)


def numbers_of(module: Any, name: str = "weight") -> Any:
    """A module's parameter (None if it has none), or a read-only copy of one, read from where it is kept."""
    parameter = getattr(module, name)
    if not is_elsewhere(module, name):
        return parameter
    return module._hf_hook.weights_map[name].to(device_of(module, name), parameter.dtype).as_subclass(ReadOnly)


def every_parameter(module: nn.Module) -> Iterator[Tensor]:
    """All parameters of a module and those within, as `numbers_of` gives them, one at a time."""
    for part in module.modules():
        for name, _ in part.named_parameters(recurse=False):
            yield numbers_of(part, name)


def without_numbers(module: nn.Module) -> str | None:
    """The first parameter or buffer on the meta device whose numbers are kept nowhere; None where all have some."""
    for owner, part in module.named_modules():
        for name, value in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            if value.is_meta and not is_elsewhere(part, name):
                return f"{owner}.{name}".lstrip(".")
    return None


def renew_placeholders(model: nn.Module) -> None:
    """Put new parameters in the places of those that are kept elsewhere, so that `check_unwritten` counts from now.

    transformers has initialised the old ones, which counts as writing, before it put them away.
    """
    renewed: dict[int, nn.Parameter] = {}
    for module, name, old in _put_away(model):
        if old.is_meta:
            made = renewed.setdefault(id(old), nn.Parameter(torch.empty_like(old), old.requires_grad))
            module._parameters[name] = made


def check_unwritten(model: nn.Module) -> None:
    """Nothing, where no parameter that is kept elsewhere was written to since the last pass, which would be lost.

    Raises:
        InputError: one was, or another one was put in its place; names it.
    """
    for module, name, parameter in _put_away(model):
        if not parameter.is_meta or (not parameter.is_inference() and parameter._version):
            path = next(path for path, part in model.named_modules() if part is module)
            found = f"{path}.{name}".replace("_original_component.", "")
            raise InputError(
                f"{found} was written to and is kept elsewhere (on disk, or in main memory for a GPU): every "
                "pass reads it from there, and what was written is lost. Load the model again, with this part in "
                "memory (device_map, max_memory or quantize), to write to it; or edit what it computes with hooks"
            )


def _put_away(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Modules with parameters that accelerate puts away after each pass, with their names.

    And what a wrapper calls by another name (`mlp.b_out`): still the placeholder that was there when it was made.
    """
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if "disk" not in places and not ("cpu" in places and len(places) > 1):
        return  # asked before every pass
    for module in model.modules():
        aliases = ((n, value) for n, value in vars(module).items() if isinstance(value, nn.Parameter) and value.is_meta)
        own = module._parameters.items() if has_offloaded_params(module) else ()
        for name, parameter in (*own, *aliases):
            if parameter is not None:
                yield module, name, parameter


class at_hand(ExitStack):  # noqa: N801  # used as a function is
    """While parameters of some modules that are kept elsewhere are in memory; what is entered are those modules.

    Names that TransformerLens gives them (`mlp.W_out`) are those of what is in memory meanwhile.
    """

    def __init__(self, *modules: Any):
        super().__init__()
        self.inside = [part for module in modules if isinstance(module, nn.Module) for part in module.modules()]
        self.away = [
            part for part in self.inside if any(is_elsewhere(part, n) for n, _ in part.named_parameters(recurse=False))
        ]

    def __enter__(self) -> Any:
        for module in self.away:
            self.enter_context(align_module_device(module))
        for module in self.inside if self.away else ():
            held = vars(module)
            for alias, path in getattr(type(module), "property_aliases", {}).items():
                if isinstance(old := held.get(alias), Tensor) and old.is_meta:
                    self.callback(held.__setitem__, alias, old)
                    held[alias] = attrgetter(path)(module)
        return self.away


@dataclass(frozen=True)
class StoredMatrices:
    """Matrices of experts, one parameter of theirs, that are kept elsewhere; `read` reads those that are asked for."""

    holder: Any
    """The module that owns the parameter."""
    name: str
    """What it is called there."""
    cut: Callable[[Tensor], Tensor]
    """From the parameter to one matrix for each expert."""

    @property
    def shape(self) -> torch.Size:
        """[expert, rows, columns], as stored."""
        return self.cut(self._parameter).shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameter."""
        return self._parameter.dtype

    @property
    def device(self) -> torch.device:
        """Where they come to."""
        return device_of(self.holder, self.name)

    @property
    def _parameter(self) -> Tensor:
        return getattr(self.holder, self.name)

    def is_floating_point(self) -> bool:
        """Whether they are numbers that a kernel can use."""
        return self._parameter.is_floating_point()

    def element_size(self) -> int:
        """Bytes of a number."""
        return self._parameter.element_size()

    def numel(self) -> int:
        """Numbers in all of them."""
        return self._parameter.numel()

    def read(self, experts: Sequence[int] | Tensor) -> Float[Tensor, "expert rows columns"]:
        """The matrices of some experts."""
        weights = self.holder._hf_hook.weights_map
        numbers = [int(expert) for expert in experts]
        source: Any = getattr(getattr(weights, "dataset", None), "state_dict", None)
        if hasattr(source, "some") and self.shape == self._parameter.shape:
            found = source.some(f"{weights.prefix}{self.name}", numbers)
        else:
            found = self.cut(weights[self.name])[numbers]
        return found.to(self.device, self.dtype)
