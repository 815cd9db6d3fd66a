"""Weights of linear layers and tables as `W_*` reads them: what the module computes with, wherever that is kept."""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.errors import UnsupportedModelError
from moe_lens.model.experts.offloaded_experts import numbers_of
from moe_lens.model.experts.packed import ReadOnly
from moe_lens.model.experts.quantised import library
from moe_lens.model.hooks.bypassed import forward_of, replaced
from moe_lens.model.tl_compat import GeneralizedComponent

_READING = ContextVar("reading", default=False)

_MULTIPLY = {
    ("torch.nn.modules.linear", "Linear.forward"),
    ("moe_lens.model.experts.packed", "PackedLinear.forward"),
    ("bitsandbytes.nn.modules", "Linear4bit.forward"),
    ("bitsandbytes.nn.modules", "Linear8bitLt.forward"),
}
"""Forwards of linear layers that multiply by their weight, and do nothing else but add a bias."""


def weight_of(module: Any, name: str = "weight") -> Any:
    """The weight of a module; a read-only copy of one that is kept elsewhere or packed by bitsandbytes.

    Raises:
        UnsupportedModelError: the module has none, or a forward of somebody's own: see `refuse_own_forward`.
    """
    refuse_own_forward(module)
    weight = numbers_of(module, name)
    if type(weight).__name__ not in ("Params4bit", "Int8Params"):
        return weight
    packed: Any = weight
    if type(weight).__name__ == "Int8Params":
        scales = packed.SCB if module.state.SCB is None else module.state.SCB
        found = library().int8_vectorwise_dequant(weight.data, scales)
    elif getattr(packed.quant_state, "packing_format_for_cpu", False):  # an order that only bitsandbytes' product reads
        unit = torch.eye(packed.quant_state.shape[-1], dtype=packed.quant_state.dtype)
        found = library().gemv_4bit(unit, weight, state=packed.quant_state).T
    else:
        found = library().dequantize_4bit(weight.data, packed.quant_state)
    return found.detach().as_subclass(ReadOnly)


def refuse_own_forward(module: nn.Module) -> None:
    """Refuse a linear layer whose weight is not all that it computes with, such as one with an adapter, or with scales.

    Raises:
        UnsupportedModelError: it has no weight, or its forward does something else; names it.
    """
    function, kind = forward_of(module), type(module).__name__
    known = (getattr(function, "__module__", ""), getattr(function, "__qualname__", "")) in _MULTIPLY
    if not known or not isinstance(getattr(module, "weight", None), Tensor):
        raise UnsupportedModelError(
            f"{replaced(module) or f'a {kind} computes by more than its weight'}: W_Q, W_O, W_U and their like are "
            "weights of layers that multiply by them, and nothing else. Merge what was added into the layer's weight, "
            "or, of packed layers, load their folder with HookedMoE.from_pretrained"
        )


class ReadableWeight(GeneralizedComponent):
    """A wrapper that, while a named parameter is read of it, takes weight and bias from where they are kept.

    At other times they are the module's own attributes, which transformers asks for, to save them for one.
    """

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias") and _READING.get() and self.original_component is not None:
            return weight_of(self.original_component, name)
        return super().__getattr__(name)


class ReadableTable(GeneralizedComponent):
    """The wrapper of an embedding, whose output stays as it is: TransformerLens's is cast to the table's dtype."""

    @property
    def W_E(self) -> Tensor:
        """The table, [d_vocab, d_model]."""
        table: Any = self.original_component
        changed = replaced(table) or (None if hasattr(table, "weight") else f"a {type(table).__name__} has no weight")
        if changed is not None:
            raise UnsupportedModelError(
                f"{changed}: W_E is a table that is looked up, and nothing else; cache['hook_embed'] has what it gives"
            )
        return numbers_of(table)

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Look up; hooks do not see a single id, as which multimodal models look a placeholder up."""
        table: Any = self.original_component
        if not input_ids.dim():
            return table(input_ids)
        out = table(self.hook_in(input_ids), *args, **kwargs)
        return self._hook_scaled_output(out, self.hook_out, self._output_contribution_scale)


@contextmanager
def reading() -> Generator[None]:
    """While a parameter is read by TransformerLens's name."""
    before = _READING.set(True)
    try:
        yield
    finally:
        _READING.reset(before)
