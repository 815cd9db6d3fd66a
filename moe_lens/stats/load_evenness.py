"""How unevenly a layer's experts are used: functions of how often each was, over the last axis."""

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor


def gini(load: Real[Tensor, "*batch n_experts"]) -> Float[Tensor, "*batch"]:
    """Gini coefficient Σ_ij |x_i − x_j| / (2 n Σ x), in [0, 1 − 1/n]: 0 if all experts are used alike."""
    x = load.double().sort(-1).values
    n = x.shape[-1]
    place = torch.arange(1, n + 1, dtype=x.dtype)
    return (2 * (x * place).sum(-1) / x.sum(-1) - (n + 1)) / n


def entropy(load: Real[Tensor, "*batch n_experts"]) -> Float[Tensor, "*batch"]:
    """Entropy of the load's distribution over experts, in nats, in [0, ln n]: ln n if all experts are used alike."""
    p = load.double() / load.double().sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1)


def imbalance(load: Real[Tensor, "*batch n_experts"]) -> Float[Tensor, "*batch"]:
    """Greatest load over mean load, in [1, n]; one more than MaxVio of arXiv 2408.15664."""
    x = load.double()
    return x.amax(-1) / x.mean(-1)


def experts_covering(load: Real[Tensor, "*batch n_experts"], share: float) -> Int[Tensor, "*batch"]:
    """The smallest number of experts that together take at least `share` of the load."""
    x = load.double().sort(-1, descending=True).values
    enough = x.cumsum(-1) >= share * x.sum(-1, keepdim=True) - 1e-9
    return enough.int().argmax(-1) + 1


def experts_covering_in_part(load: Real[Tensor, "*batch n_experts"], share: float) -> Float[Tensor, "*batch"]:
    """How many experts take `share` of the load, the least used of them counted by what it is needed for, in (0, n].

    Unlike `experts_covering`, which is this rounded up, it changes with the load without jumps: its error can be told.
    """
    x = load.double().sort(-1, descending=True).values
    rest = share * x.sum(-1, keepdim=True) - x.cumsum(-1)
    at = (rest <= 1e-9).int().argmax(-1, keepdim=True)
    return (at + 1 + (rest / x).gather(-1, at)).squeeze(-1)
