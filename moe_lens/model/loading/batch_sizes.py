"""How much is computed at once: decided here, for studies, lenses and interventions.

Where parameters are read from disk in every pass, or unpacked from 4 or 8 bits, a pass costs that whatever its batch,
until computing takes longer: with two cores from about 1,000 tokens on. At `FEW_PASSES_TOKENS` it is a tenth of the
whole, and activations of one layer are about a GiB of a model of 16 billion parameters. Memory that does not suffice
for so many makes batches smaller when it runs out.
"""

from typing import Any

import torch

from moe_lens.model.loading.dispatch import places
from moe_lens.model.loading.quantising import packed_in

TOKENS = {"cpu": 2**11, "cuda": 2**16}
"""Tokens of a batch of variants at most, by kind of device; fewer if memory does not suffice.

On a CPU more would be slower: the C library hands large temporary tensors back to the system, which clears every page
of them again for the next product.
"""
FEW_PASSES_TOKENS = 2**13
"""The same where parameters are read from disk, or unpacked, in every pass."""
BATCH_TOKENS = 2**11
"""Tokens of a batch of texts, of which activations of all layers, or all logits, are kept: up to 1 MB a token."""
ROWS = 64
"""Rows of logits at least that are made at once: a product of fewer takes as long, to read the unembedding."""


def wants_few_passes(model: Any) -> bool:
    """Whether a pass of a `HookedMoE` costs much whatever its tokens: parameters are on disk, or packed."""
    return "disk" in places(model.original_model) or bool(packed_in(model.original_model))


def tokens_at_once(model: Any, device: torch.device) -> int:
    """How many tokens, of all variants together, to run in one pass that computes on a device."""
    usual = TOKENS.get(device.type, TOKENS["cuda"])
    return max(usual, FEW_PASSES_TOKENS) if wants_few_passes(model) else usual


def batch_tokens(model: Any, *, kept: bool) -> int:
    """How many tokens of texts to read at once, if nobody says.

    Args:
        model: A `HookedMoE`.
        kept: Whether activations of all layers, or logits, are kept of each.
    """
    return BATCH_TOKENS if kept or not wants_few_passes(model) else FEW_PASSES_TOKENS


def rows_at_once(logits: int, d_vocab: int) -> int:
    """How many rows of logits to make at once, where about so many logits are wanted at a time."""
    return max(ROWS, logits // d_vocab)
