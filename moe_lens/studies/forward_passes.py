"""Running a model over batches: activations are handed on layer by layer, logits do not outlive their batch."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_lens import names
from moe_lens.data import TokenBatch
from moe_lens.errors import InputError
from moe_lens.routing import LayerRouting, Routing
from moe_lens.stats import RoutedBatch
from moe_lens.stats.observation import Hooks as Hooks
from moe_lens.stats.observation import each_layer as each_layer
from moe_lens.stats.observation import routing_hooks

LOSS_CHUNK = 2**24
"""Greatest number of logits that are copied to float32 at a time."""


def nothing() -> None:
    """Called after a batch by whoever does not watch the progress."""


def input_device(model: Any) -> torch.device:
    """Where the model wants its tokens."""
    return model.original_model.get_input_embeddings().weight.device


@torch.no_grad()
def forward(model: Any, batch: TokenBatch, hooks: Hooks) -> Float[Tensor, "rows columns d_vocab"]:
    """Logits for what the model reads of a batch (`batch.unpack` brings them into its rows), with hooks in place.

    Raises:
        InputError: They hold NaN; the message names the layer where that begins.
    """
    device = input_device(model)
    how: dict[str, Any] = {"use_cache": False}
    if batch.packing is None:
        tokens, how["attention_mask"] = batch.tokens, batch.mask.long().to(device)
    else:
        # Positions that start again mark windows that must not see one another, if there is no mask and no cache.
        tokens, how["position_ids"] = batch.packing.tokens, batch.packing.positions.to(device)
    logits = model.run_with_hooks(tokens.to(device), fwd_hooks=hooks, return_type="logits", **how)
    if logits.sum(-1).isnan().any() and (bad := batch.unpack(logits.isnan().any(-1)).cpu() & batch.mask).any():
        row = int(bad.any(-1).nonzero()[0, 0])
        raise InputError(
            f"the logits hold NaN in a text of source {batch.sources[row]!r}; {_first_not_finite(model, tokens, how)}. "
            "A parameter may be broken, or the dtype too narrow"
        )
    return logits


def _first_not_finite(model: Any, tokens: Int[Tensor, "rows columns"], how: dict[str, Any]) -> str:
    found: list[str] = []

    def look(value: Tensor, hook: Any) -> None:
        if not value.isfinite().all():
            found.append(str(hook.name))

    points = [names.block(name, layer) for layer in range(model.cfg.n_layers) for name in _STREAM]
    model.run_with_hooks(tokens.to(input_device(model)), fwd_hooks=[(name, look) for name in points], **how)
    if not found:
        return "the residual stream of every layer is finite, so it is the final norm or the unembedding"
    return f"the first values that are not finite are at {found[0]} (layer {found[0].split('.')[1]})"


_STREAM = (names.RESID_PRE, names.RESID_MID, names.RESID_POST)


def losses(model: Any, batch: TokenBatch, hooks: Hooks) -> Float[Tensor, "batch pos"]:
    """Nats of every token given those before it, with hooks in place; 0 at the first position: nothing predicts it."""
    logits = forward(model, batch, hooks)
    tokens = batch.tokens if batch.packing is None else batch.packing.tokens
    found = batch.unpack(token_losses(logits, tokens.to(logits.device)).cpu())
    found[:, 0] = 0
    return found


@torch.no_grad()
def observed(model: Any, batch: TokenBatch, *, predicted: bool = False) -> RoutedBatch:
    """Run a model over a batch and note its routing, by row of the batch.

    Args:
        model: A `HookedMoE`.
        batch: What to read.
        predicted: Whether to note the most likely next token, too.
    """
    layers: dict[int, LayerRouting] = {}
    logits = forward(model, batch, routing_hooks(model, layers))
    if batch.packing is not None:
        for layer, routing in layers.items():
            rows = {name: batch.unpack(getattr(routing, name)) for name in ("indices", "weights", "logits", "probs")}
            layers[layer] = replace(routing, **rows)
    return RoutedBatch(
        routing=replace(Routing.stack([layers[layer] for layer in model.moe_layers]), mask=batch.mask),
        tokens=batch.tokens,
        counted=batch.counted,
        sources=batch.sources,
        predicted=batch.unpack(logits.argmax(-1)) if predicted else None,
    )


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
