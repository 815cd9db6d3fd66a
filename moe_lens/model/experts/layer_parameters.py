"""Parameters of routers and experts in TransformerLens's orientation, as views."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lens.checked import checked
from moe_lens.errors import InputError
from moe_lens.ids import ids, one_id
from moe_lens.model.experts.packed import Matrices


@checked
class LayerParameters:
    """`W[layer]` or `W[layer, expert]`: a view of the model's own parameter, so that writing to it edits the model."""

    def __init__(self, name: str, views: Mapping[int, Callable[[], Tensor | Matrices]]):
        self.name, self._views = name, views

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have this parameter."""
        return tuple(self._views)

    def __len__(self) -> int:
        """How many layers have this parameter."""
        return len(self._views)

    def __iter__(self) -> Iterator[Tensor]:
        """The parameter of each of `layers`, in order."""
        return (self[layer] for layer in self._views)

    @property
    def shape(self) -> torch.Size:
        """[layer, expert, …], where all layers agree.

        Raises:
            InputError: they do not.
        """
        shapes = {layer: tuple(view().shape) for layer, view in self._views.items()}
        if len(set(shapes.values())) != 1:
            raise InputError(f"{self.name} has no one shape: layers differ, {shapes}")
        return torch.Size([len(shapes), *next(iter(shapes.values()))])

    def __getitem__(self, key: Any) -> Tensor:
        """The parameter of a layer [expert, …], of one expert […], or of several [expert, …]: numbers, a mask, a slice.

        `W[layer, ...]` are all of them; `W[layer, None]`, which would be a new axis in torch, is refused. One expert's
        is a view, so is a slice; that of several numbers, in their order, or of a mask is a copy. Of packed matrices
        all are copies that refuse to be written to, and only those that are asked for are unpacked.

        Raises:
            InputError: a layer without experts, or experts that do not exist or have no parameters.
        """
        layer, experts = key if isinstance(key, tuple) and len(key) == 2 else (key, ...)
        try:
            layer = one_id(f"{self.name}[layer]", layer)
        except InputError:
            raise InputError(
                f"{self.name}[{key!r}]: expected {self.name}[layer] or {self.name}[layer, expert], with numbers from 0"
            ) from None
        if layer not in self._views:
            raise InputError(f"{self.name}[{layer}]: layer {layer} has none; MoE layers are {list(self._views)}")
        view = self._views[layer]()
        if experts is ...:
            return view[:] if isinstance(view, Matrices) else view
        what = f"{self.name}[{layer}, expert]"
        if isinstance(experts, slice):
            for end in (experts.start, experts.stop):
                one_id(what, end or 0, len(view) + 1)
            return view[experts]
        if isinstance(experts, Tensor | np.ndarray) and experts.ndim == 1 or isinstance(experts, list | set | range):
            several = ids(what, experts)
            several.check(what, len(view))
            return view[list(several) if several.mask is not None else [int(number) for number in experts]]
        return view[one_id(what, experts, len(view))]

    def __reduce_ex__(self, _: Any) -> Any:
        """A view without its model would be none."""
        raise InputError(
            f"{self.name} is a view of a model's parameters, and is neither pickled nor copied; take "
            f"{self.name}[layer].clone(), or model.state_dict()"
        )

    def __repr__(self) -> str:
        """Name and layers."""
        return f"{self.name}[{', '.join(map(str, self._views))}]"
