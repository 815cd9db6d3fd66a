"""Sizes of a config that contradict one another, which transformers finds when the model is run, and not before."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from moe_lens.errors import CheckpointError, one_line

_DECIDING = ("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "rope_parameters")
"""Fields that attention's shapes come from, named where a model cannot be run."""


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


def check_runs(model: nn.Module, experts: Iterable[nn.Module], config: Any) -> None:
    """Nothing, where transformers' own forward takes a few tokens through a model on the meta device.

    Nothing either where that forward asks what values are, which the meta device does not have.

    Args:
        model: On the meta device; it is of no use afterwards.
        experts: Its modules that hold experts: they compute for the tokens that chose them, so they are passed over.
        config: Of the part that reads text.

    Raises:
        CheckpointError: the forward fails; says how, and the fields that decide.
    """
    for module in experts:
        module.forward = lambda hidden, *_, **__: hidden
    try:
        with torch.no_grad(), torch.device("meta"):
            model.eval()(torch.zeros(1, 8, dtype=torch.long))
    except Exception as error:  # whatever a family's forward makes of sizes that do not fit
        if re.search("meta tensor|register_meta", str(error)):  # what torch says of values that are asked for
            return
        said = f"{type(error).__name__}: {one_line(error)}"
        fields = ", ".join(f"{name} {getattr(config, name)}" for name in _DECIDING if hasattr(config, name))
        raise CheckpointError(f"a model of this config cannot be run: {said}. Its config says {fields}") from error


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
