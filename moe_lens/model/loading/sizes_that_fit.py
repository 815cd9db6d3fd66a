"""Sizes of a config that contradict one another, which transformers finds when the model is run, and not before."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from moe_lens.errors import CheckpointError


def check_attention(layers: Sequence[nn.Module], model: nn.Module) -> None:
    """Nothing, where queries, keys, values and rotary angles of every attention fit one another.

    Args:
        layers: Of the decoder. They may be on the meta device: only shapes are looked at.
        model: Which they are of.

    Raises:
        CheckpointError: they do not; names the layer and the sizes.
    """
    rotary = {2 * buffer.numel() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    for at, layer in enumerate(layers):
        for module in layer.modules():
            for wrong in _misfits(module, rotary):
                raise CheckpointError(f"a model of this config cannot be run: in layer {at} {wrong}")


def _misfits(attention: Any, rotary: set[int]) -> Iterator[str]:
    queries, keys = (_width(attention, f"{part}_proj") for part in "qk")
    groups, head = (getattr(attention, name, None) for name in ("num_key_value_groups", "head_dim"))
    if queries and keys and isinstance(groups, int) and queries % max(1, keys * groups):
        fit = "is the number of heads a multiple of that of key-value heads?"
        yield f"keys of width {keys}, {groups} times each, do not fit queries of width {queries}: {fit}"
    if queries and keys and isinstance(head, int) and rotary and min(rotary) > head:
        yield f"heads are of width {head}, and rotary angles are for {min(rotary)}"
    if getattr(attention, "v_head_dim", None) == 0:
        yield "values are of width 0 (v_head_dim)"


def _width(attention: Any, name: str) -> int | None:
    found = getattr(getattr(attention, name, None), "out_features", None)
    return found if isinstance(found, int) else None
