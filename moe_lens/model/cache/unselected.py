"""Experts that a token did not select, as a control: which ones, and what they would have added."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.checked import Natural, Positive
from moe_lens.errors import InputError
from moe_lens.partial_sum import PartialSum


def drawn_numbers(
    indices: Int[Tensor, "*tokens top_k"],
    layer: Natural,
    seed: Natural,
    below: Positive,
    draws: Float[Tensor, "*tokens"] | None = None,
) -> Int[Tensor, "*tokens"]:
    """A number from 0 to below `below` for every token, on the CPU: all draw, whichever are read.

    Args:
        indices: Of the experts that each token selected, of all tokens of a run.
        layer: The layer.
        seed: Of the draws.
        below: Of how many numbers.
        draws: Uniform random numbers in [0, 1) to take them from, instead of the seed.

    Raises:
        InputError: Tokens have different numbers of experts.
    """
    if (indices < 0).any():
        raise InputError(f"tokens of layer {layer} have different numbers of experts: there is no random one for all")
    if draws is not None:
        return (draws.cpu() * below).long().clamp(max=below - 1)
    generator = torch.Generator().manual_seed((seed * 100_003 + layer) % 2**63)
    return torch.randint(below, indices.shape[:-1], generator=generator)


def unselected_experts(
    indices: Int[Tensor, "*tokens top_k"],
    layer: Natural,
    seed: Natural,
    n_experts: Natural,
    draws: Float[Tensor, "*tokens"] | None = None,
    logits: Float[Tensor, "*tokens n_experts"] | None = None,
) -> Int[Tensor, "*tokens"]:
    """For each token, an expert that it did not select; each of them is equally likely.

    Args:
        indices: Of the experts that each token selected, of all tokens of a run.
        layer: The layer.
        seed: Of the draws.
        n_experts: Of the layer.
        draws: Uniform random numbers in [0, 1) to take them from, instead of the seed.
        logits: Of the router. Experts that it is forbidden (−∞), as in the preview of a plan, are not drawn.

    Raises:
        InputError: All experts are always active, but for forbidden ones, or tokens have different numbers of them.
    """
    free = n_experts - indices.shape[-1]
    forbidden = torch.zeros(0) if logits is None else logits.isneginf()
    if not free or (forbidden.any() and int(forbidden.sum(-1).max()) >= free):
        allowed = n_experts - (int(forbidden.sum(-1).max()) if forbidden.any() else 0)
        raise InputError(f"all {allowed} experts are always active: none is left unselected to draw")
    if forbidden.any():
        left = ~forbidden.scatter(-1, indices.clamp(min=0), True)
        numbers = drawn_numbers(indices, layer, seed, 2**24, draws).to(left.device) / 2**24
        return (left.cumsum(-1) > (numbers * left.sum(-1)).long()[..., None]).long().argmax(-1)
    expert = drawn_numbers(indices, layer, seed, free, draws).to(indices.device)
    for selected in indices.sort(-1).values.unbind(-1):  # the n-th of those that are left
        expert = expert + (expert >= selected).long()
    return expert


def unselected_term(
    model: Any,
    layer: Natural,
    which: PartialSum,
    x: Float[Tensor, "*tokens d_model"],
    expert: Int[Tensor, "*tokens"],
    weights: Float[Tensor, "*tokens top_k"],
) -> Float[Tensor, "*tokens d_model"]:
    """What unselected experts would add to a sum, with the weight of rank 0 where the sum is weighted.

    Args:
        model: A `HookedMoE`.
        layer: The layer.
        which: The sum.
        x: What the layer's experts read, as in `mlp.hook_in`.
        expert: The expert of each token.
        weights: The routing weights of those that were selected.
    """
    weight = weights[..., :1]
    if getattr(model.family, "weighs_input", False):
        return model.expert_outputs(layer, x * weight.to(x), expert[..., None]).squeeze(-2).to(x)
    out = model.expert_outputs(layer, x, expert[..., None]).squeeze(-2).to(x)
    return out * weight.to(out) if which.weighted else out
