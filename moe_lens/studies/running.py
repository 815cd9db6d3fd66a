"""Running a model over batches: activations are handed on layer by layer, logits do not outlive their batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_lens import names
from moe_lens.data import TokenBatch

Hooks = list[tuple[str, Callable[..., Tensor | None]]]

LOSS_CHUNK = 2**24
"""Greatest number of logits that are copied to float32 at a time."""


def nothing() -> None:
    """Called after a batch by whoever does not watch the progress."""


def each_layer(model: Any, wanted: Sequence[str], consume: Callable[[int, dict[str, Tensor]], None]) -> Hooks:
    """Hooks that gather some activations of a MoE layer and hand them on when they are complete.

    No more than one layer is held at a time, which is what makes it cheaper than a cache.

    Args:
        model: A `HookedMoE`.
        wanted: Names of hooks of a MoE layer, or of the block.
        consume: Called with the layer and its activations by name.
    """
    held: dict[int, dict[str, Tensor]] = {}

    def keep(layer: int, name: str, value: Tensor) -> None:
        parts = held.setdefault(layer, {})
        parts[name] = value.detach()
        if len(parts) == len(wanted):
            consume(layer, held.pop(layer))

    in_block = {hook.name for hook in names.RESIDUAL_HOOKS}

    def hook(layer: int, name: str) -> tuple[str, Callable[..., None]]:
        full = names.block(name, layer) if name in in_block else names.mlp(name, layer)
        return full, lambda value, hook: keep(layer, name, value)  # noqa: ARG005  # TransformerLens passes hook by name

    return [hook(layer, name) for layer in model.moe_layers for name in wanted]


def input_device(model: Any) -> torch.device:
    """Where the model wants its tokens."""
    return model.original_model.get_input_embeddings().weight.device


@torch.no_grad()
def losses(model: Any, batch: TokenBatch, hooks: Hooks) -> Float[Tensor, "batch pos"]:
    """Nats of every token given those before it, with hooks in place; 0 at the first position: nothing predicts it."""
    tokens, mask = batch.tokens.to(input_device(model)), batch.mask.long().to(input_device(model))
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits", attention_mask=mask)
    return token_losses(logits, tokens.to(logits.device)).cpu()


def token_losses(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """Cross-entropy in nats of each token under the logits of the position before it, in float32; 0 at position 0."""
    found = torch.zeros(tokens.shape, device=logits.device)
    rows = max(1, LOSS_CHUNK // (logits.shape[-1] * max(1, logits.shape[1])))
    for i in range(0, len(tokens), rows):
        before, after = logits[i : i + rows, :-1].float(), tokens[i : i + rows, 1:]
        found[i : i + rows, 1:] = cross_entropy(before.flatten(0, 1), after.flatten(), reduction="none").view_as(after)
    return found


def predicted(batch: TokenBatch) -> Bool[Tensor, "batch pos"]:
    """The counted tokens that something stands before."""
    mask = batch.counted.clone()
    mask[:, 0] = False
    return mask
