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
from moe_lens.model.hooks.bypassed import replaced
from moe_lens.model.tl_compat import GeneralizedComponent

_READING = ContextVar("reading", default=False)

PACKING = ("bitsandbytes", "torchao", "compressed_tensors", "gptqmodel")
"""Packages whose linear layers compute with their weight, packed."""


def weight_of(module: Any, name: str = "weight") -> Any:
    """The weight of a module; a read-only copy of one that is kept elsewhere or packed by bitsandbytes.

    Raises:
        UnsupportedModelError: the module has none, or a forward of somebody's own: see `refuse_own_forward`.
    """
    refuse_own_forward(module)
    weight = numbers_of(module, name)
    if type(weight).__name__ not in ("Params4bit", "Int8Params"):
        return weight
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # noqa: PLC0415  # takes a second

    state: Any = getattr(weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):  # an order that nothing of bitsandbytes but its product reads
        unit = torch.eye(state.shape[-1], dtype=state.dtype)
        return library().gemv_4bit(unit, weight, state=state).detach().T.as_subclass(ReadOnly)
    return dequantize_bnb_weight(weight, getattr(module, "state", None)).detach().as_subclass(ReadOnly)


def refuse_own_forward(module: nn.Module) -> None:
    """Refuse a module whose weight is not all that it computes with, such as a layer with an adapter.

    Raises:
        UnsupportedModelError: it has no weight, or its forward is somebody's own; names it.
    """
    changed = replaced(module, *PACKING)
    if changed is None and not isinstance(getattr(module, "weight", None), Tensor):
        changed = f"a {type(module).__name__} has no weight"
    if changed is not None:
        raise UnsupportedModelError(
            f"{changed}: W_Q, W_O, W_U and their like are weights of layers that multiply by them, and nothing else. "
            "Merge what was added into the layer's weight, or read what the model holds in model.state_dict()"
        )


class ReadableWeight(GeneralizedComponent):
    """A wrapper that, while a named parameter is read of it, takes weight and bias from where they are kept.

    At other times they are the module's own attributes, which transformers asks for, to save them for one.
    """

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias") and _READING.get() and self._modules.get("_original_component") is not None:
            return weight_of(self.original_component, name)
        return super().__getattr__(name)


class ReadableTable(GeneralizedComponent):
    """The wrapper of an embedding."""

    @property
    def W_E(self) -> Tensor:
        """[d_vocab, d_model]."""
        return weight_of(self.original_component)

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens's; hooks do not see a single id, as which multimodal models look a placeholder up."""
        table: Any = self.original_component
        return super().forward(input_ids, *args, **kwargs) if input_ids.dim() else table(input_ids)


@contextmanager
def reading() -> Generator[None]:
    """While a parameter is read by TransformerLens's name."""
    before = _READING.set(True)
    try:
        yield
    finally:
        _READING.reset(before)
