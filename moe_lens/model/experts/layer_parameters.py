"""Parameters of routers and experts in TransformerLens's orientation, as views."""

from collections.abc import Callable, Mapping

from torch import Tensor

from moe_lens.errors import InputError


class LayerParameters:
    """`W[layer]` or `W[layer, expert]`: a view of the model's own parameter, so that writing to it edits the model."""

    def __init__(self, name: str, views: Mapping[int, Callable[[], Tensor]]):
        self.name, self._views = name, views

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have this parameter."""
        return tuple(self._views)

    def __getitem__(self, key: int | tuple[int, int]) -> Tensor:
        """The parameter of a layer [expert, …] or of one expert.

        Raises:
            InputError: a layer without experts, or an expert that does not exist or has no parameters.
        """
        layer, expert = key if isinstance(key, tuple) else (key, None)
        if layer not in self._views:
            raise InputError(f"{self.name}[{layer}]: layer {layer} has none; MoE layers are {list(self._views)}")
        view = self._views[layer]()
        if expert is None:
            return view
        if not -len(view) <= expert < len(view):
            raise InputError(f"{self.name}[{layer}, {expert}]: expected an expert from 0 to {len(view) - 1}")
        return view[expert]

    def __repr__(self) -> str:
        """Name and layers."""
        return f"{self.name}[{', '.join(map(str, self._views))}]"
