"""Parameters of routers and experts in TransformerLens's orientation, as views."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from moe_lens.errors import InputError
from moe_lens.model.experts import split_branches


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
            InputError: a layer without experts.
        """
        layer, expert = key if isinstance(key, tuple) else (key, None)
        if layer not in self._views:
            raise InputError(f"{self.name}[{layer}]: layer {layer} has none; MoE layers are {list(self._views)}")
        view = self._views[layer]()
        return view if expert is None else view[expert]

    def __repr__(self) -> str:
        """Name and layers."""
        return f"{self.name}[{', '.join(map(str, self._views))}]"


def first_product(experts: Any, branch: int, interleaved: bool) -> Tensor:
    """W_gate (branch 0) or W_in (branch 1) of all experts, [expert, d_model, d_expert]."""
    weight = experts.gate_up_proj if experts.has_gate else experts.up_proj
    matrix = weight if experts.is_transposed else weight.mT
    return split_branches(matrix, interleaved)[branch] if experts.has_gate else matrix


def second_product(experts: Any) -> Tensor:
    """W_out of all experts, [expert, d_expert, d_model]."""
    return experts.down_proj if experts.is_transposed else experts.down_proj.mT
