"""Parameters that TransformerLens reads of attention and MLPs by name, and the error where a part has none."""

from functools import partial
from operator import attrgetter
from typing import Any

from moe_lens.errors import AbsentParameterError
from moe_lens.model.hooks.readable_weight import reading
from moe_lens.model.tl_compat import GeneralizedComponent

OF_ATTENTION = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
OF_MLP = ("W_in", "W_out", "W_gate", "b_in", "b_out", "b_gate")


def absent(name: str, part: Any) -> AbsentParameterError:
    """The error for a parameter that a part of a layer does not have.

    Args:
        name: TransformerLens's.
        part: The module of transformers.
    """
    kind = type(part).__name__
    if name in OF_MLP:
        return AbsentParameterError(
            f"{name}: a {kind} has none of its own; matrices of experts are model.W_gate, W_in and W_out[layer, "
            "expert], and model.state_dict() holds all that there is, under transformers' names"
        )
    return AbsentParameterError(
        f"{name}: a {kind} has none, or none that is divided into heads; what it has is in "
        "model.blocks[layer].attn.original_component and in model.state_dict(), under transformers' names"
    )


class NamedParameters(GeneralizedComponent):
    """A component that reads TransformerLens's parameters wherever they are kept, and names absent ones."""

    def __getattr__(self, name: str) -> Any:
        if name in OF_ATTENTION or name in OF_MLP:  # what there is of them are properties, and not asked for here
            raise absent(name, self.original_component)
        return super().__getattr__(name)


def _read(name: str, part: NamedParameters) -> Any:
    with reading():
        return getattr(super(NamedParameters, part), name)


def _bias_of_mlp(name: str, part: NamedParameters) -> Any:
    """As it is now: TransformerLens would keep the parameter that there is when a model is wrapped."""
    if name not in part.property_aliases:
        raise absent(name, part.original_component)
    with reading():
        return attrgetter(part.property_aliases[name])(part)


for _name in (*OF_ATTENTION, *OF_MLP):
    setattr(NamedParameters, _name, property(partial(_bias_of_mlp if _name in OF_MLP[3:] else _read, _name)))
