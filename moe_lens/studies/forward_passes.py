"""Running a model over batches: activations are handed on layer by layer, logits do not outlive their batch."""

import hashlib
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_lens.data import TokenBatch
from moe_lens.stats.observation import COMPUTED as COMPUTED
from moe_lens.stats.observation import Hooks as Hooks
from moe_lens.stats.observation import each_layer as each_layer
from moe_lens.stats.observation import forward as forward
from moe_lens.stats.observation import input_device as input_device
from moe_lens.stats.observation import read_logits as read_logits


def nothing() -> None:
    """Called after a batch by whoever does not watch the progress."""


def losses(model: Any, batch: TokenBatch, hooks: Hooks) -> Float[Tensor, "batch pos"]:
    """Nats of every token given those before it, with hooks in place; 0 at the first position: nothing predicts it."""
    tokens = batch.tokens if batch.packing is None else batch.packing.tokens
    following = tokens.roll(-1, 1)
    following[:, -1] = -1
    following = following.flatten()
    found = read_logits(model, batch, hooks, lambda logits, at: token_losses(logits, following[at.cpu()])).roll(1, 1)
    found = batch.unpack(found.cpu())
    found[:, 0] = 0
    return found


def token_losses(logits: Float[Tensor, "rows d_vocab"], following: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Cross-entropy in nats of each row's following token, in float32; 0 where it is −1, for none."""
    return cross_entropy(logits.float(), following.to(logits.device), reduction="none", ignore_index=-1)


def predicted(batch: TokenBatch) -> Bool[Tensor, "batch pos"]:
    """The counted tokens that something stands before."""
    mask = batch.counted.clone()
    mask[:, 0] = False
    return mask


def token_places(batch: TokenBatch) -> dict[str, Int[Tensor, "batch pos"]]:
    """Where each token stands: number of its passage ("document"), "position" in the passage, "place" in the window.

    What the tokenizer puts before a text has the position and place of the token that follows; where the text itself
    begins with it, it has a position of its own.
    """
    shape = batch.tokens.shape
    of = {name: torch.tensor([getattr(window, name) for window in batch.windows])[:, None] for name in _OF_WINDOWS}
    after = torch.arange(shape[1]) - of["opening"]
    place = after.clamp(min=0)
    position = of["start"] + torch.where(of["written"], after, place)
    return {"document": of["document"].expand(shape), "position": position, "place": place}


_OF_WINDOWS = ("document", "start", "opening", "written")


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
