"""Running a model over batches: activations are handed on layer by layer, logits do not outlive their batch."""

import hashlib
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_lens.data import TokenBatch
from moe_lens.stats.observation import Hooks as Hooks
from moe_lens.stats.observation import each_layer as each_layer
from moe_lens.stats.observation import forward as forward
from moe_lens.stats.observation import input_device as input_device

LOSS_CHUNK = 2**20
"""Greatest number of logits that are copied to float32 at a time: about as many as a processor's cache holds."""


WHOLE = 2**28
"""Greatest number of logits of a batch that are there at once: half a GiB in 16 bits. Of more, the final norm and the
unembedding are computed a few rows at a time, which changes losses by rounding: less than 1e-5 nats in float32."""


def nothing() -> None:
    """Called after a batch by whoever does not watch the progress."""


def losses(model: Any, batch: TokenBatch, hooks: Hooks) -> Float[Tensor, "batch pos"]:
    """Nats of every token given those before it, with hooks in place; 0 at the first position: nothing predicts it."""
    tokens = batch.tokens if batch.packing is None else batch.packing.tokens
    if tokens.numel() * model.cfg.d_vocab <= WHOLE:
        logits = forward(model, batch, hooks)
        found = token_losses(logits, tokens.to(logits.device))
    else:
        resid = forward(model, batch, hooks, blocks_only=True)
        rows = max(1, LOSS_CHUNK // (model.cfg.d_vocab * max(1, tokens.shape[1])))
        parts = zip(resid.split(rows), tokens.split(rows), strict=True)
        found = torch.cat([_losses_of(model, part, ids) for part, ids in parts])
    found = batch.unpack(found.cpu())
    found[:, 0] = 0
    return found


@torch.no_grad()
def _losses_of(
    model: Any, resid: Float[Tensor, "rows columns d_model"], tokens: Int[Tensor, "rows columns"]
) -> Float[Tensor, "rows columns"]:
    logits = model.adapter.apply_output_logits_transform(model.unembed(model.ln_final(resid)))
    return token_losses(logits, tokens.to(logits.device))


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


def token_places(batch: TokenBatch) -> dict[str, Int[Tensor, "batch pos"]]:
    """Where each token stands: number of its passage ("document"), "position" in the passage, "place" in the window.

    What the tokenizer puts before a text has the position and place of the token that follows.
    """
    shape = batch.tokens.shape
    of = {name: torch.tensor([getattr(window, name) for window in batch.windows])[:, None] for name in _OF_WINDOWS}
    place = (torch.arange(shape[1]) - of["opening"]).clamp(min=0)
    return {"document": of["document"].expand(shape), "position": of["start"] + place, "place": place}


_OF_WINDOWS = ("document", "start", "opening")


def drawn_by_place(
    batch: TokenBatch, seed: object, before: int = 1, after: int = 1
) -> Float[Tensor, "before batch pos after"]:
    """Uniform random numbers in [0, 1) for every token, 0 at padding.

    They depend on the seed and on where the token stands in its text, not on what else is read at the same time.

    Args:
        batch: The tokens.
        seed: Of the draws.
        before: How many numbers a token has along the first axis.
        after: And along the last.
    """
    drawn = torch.zeros(before, *batch.tokens.shape, after)
    for row, window in enumerate(batch.windows):
        key = hashlib.sha256(f"{seed} {window.document} {window.start} {window.source}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        drawn[:, row, : len(window.ids)] = torch.rand(before, len(window.ids), after, generator=generator)
    return drawn
