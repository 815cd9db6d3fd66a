"""What a layer reads of earlier ones besides the residual stream: a run that starts at the layer does not have it."""

from typing import Any

from torch import nn

from moe_lens.errors import InputError, UnsupportedModelError


def check_start(model: Any, layer: int, pos: int) -> None:
    """Nothing, where the residual stream entering a layer says all that the layers from there on read.

    Args:
        model: A `HookedMoE`.
        layer: Where a run of these layers alone would start.
        pos: Tokens of a row.

    Raises:
        InputError: Layers read the token ids, too, or what an earlier layer selected among so many tokens.
        UnsupportedModelError: See `check_reads`.
    """
    if layer and any(vars(part).get("hidden_size_per_layer_input") for part in model.blocks[layer].modules()):
        raise InputError(
            f"layer {layer} reads the token ids besides the residual stream, and start_at_layer gets the stream alone: "
            f"pass the ids, and the stream by a hook on blocks.{layer}.hook_resid_pre that returns it"
        )
    if layer:
        check_reads(model.blocks[layer], layer, pos)


def check_one_stream(family: Any) -> None:
    """Nothing, where layers pass on one residual stream.

    Args:
        family: What is particular to the model.

    Raises:
        UnsupportedModelError: They pass on several, or read what was before the newest.
    """
    layout = getattr(family, "layout", None)
    if layout is not None and layout.streams:
        raise UnsupportedModelError(
            f"layers of {family.model_type} read several streams, or earlier ones, not one residual stream: no run "
            "starts at a layer, and no sweep can; run the whole model, from ids or embeddings, with hooks"
        )


def check_reads(block: nn.Module, layer: int, pos: int) -> None:
    """Nothing, where a layer reads nothing that an earlier one computed but the residual stream.

    Args:
        block: The layer.
        layer: Its number.
        pos: Tokens of a row.

    Raises:
        InputError: It attends to what an earlier layer selected, and there are more tokens than are selected.
        UnsupportedModelError: It attends with keys and values of an earlier layer.
    """
    for part in block.modules():
        own = vars(part)
        if own.get("is_kv_shared_layer"):
            raise UnsupportedModelError(
                f"layer {layer} attends with keys and values of an earlier layer, which a run that starts in between "
                "does not compute: run the whole model, with hooks"
            )
        if own.get("skip_topk") and pos > (most := own["config"].index_topk):
            raise InputError(
                f"layer {layer} attends to the {most} tokens that an earlier layer has selected, and a run that starts "
                f"in between does not select: got {pos} tokens, expected at most {most}, or a run of the whole model, "
                "with hooks"
            )
