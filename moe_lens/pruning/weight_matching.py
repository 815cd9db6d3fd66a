"""Experts averaged, their neurons first put in the same order; and which experts a plan averages."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Matrices = Mapping[str, Float[Tensor, "neurons d_model"]]
"""The matrices of one expert, all with neurons as rows."""


@runtime_checkable
class Planned(Protocol):
    """What previewing and averaging read of a `Plan`."""

    @property
    def model(self) -> Mapping[str, Any]:
        """What tells the model from others."""
        ...

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have experts."""
        ...

    @property
    def kept(self) -> tuple[tuple[int, ...], ...]:
        """By layer: the experts that stay."""
        ...

    @property
    def merged(self) -> Mapping[tuple[int, int], int] | None:
        """(layer, pruned expert) → the kept expert that it is averaged into."""
        ...

    @property
    def shares(self) -> Float[Tensor, "layer n_experts"] | None:
        """How often each expert was chosen."""
        ...

    def active(self, layer: int) -> int:
        """Experts of a layer that a token uses."""
        ...

    def pruned(self, layer: int) -> tuple[int, ...]:
        """The experts of a layer that go."""
        ...

    def check(self, model: Mapping[str, Any]) -> None:
        """Hold the plan against a model's identity."""
        ...


def members(plan: Planned, layer: int, kept: int) -> tuple[int, ...]:
    """A kept expert and those that are averaged into it, the leader first."""
    into = plan.merged or {}
    return kept, *(expert for expert in plan.pruned(layer) if into.get((layer, expert)) == kept)


def matching(leader: Matrices, other: Matrices) -> Int[Tensor, " neurons"]:
    """The neuron of `other` that stands for each neuron of `leader`: the permutation with the greatest inner product.

    Over all matrices together; permuting an expert's neurons does not change what it computes.
    """
    from scipy.optimize import linear_sum_assignment

    alignment = sum((leader[name].double() @ other[name].double().T for name in leader), start=torch.zeros(()))
    return torch.from_numpy(linear_sum_assignment(alignment.cpu().numpy(), maximize=True)[1])


@torch.no_grad()
def averaged(experts: Sequence[Matrices], shares: Float[Tensor, " experts"]) -> dict[str, Tensor]:
    """The weighted mean of experts whose neurons are first put in the order of the first one's.

    Experts that were never chosen count as little as can be; if none was, all count the same.
    """
    shares = shares.double()
    shares = torch.ones_like(shares) if not shares.any() else shares
    total = {name: value.double() * shares[0].item() for name, value in experts[0].items()}
    for expert, share in zip(experts[1:], shares[1:].tolist(), strict=True):
        order = matching(experts[0], expert)
        for name, value in expert.items():
            total[name] += value.double()[order.to(value.device)] * share
    return {name: (value / shares.sum().item()).to(experts[0][name].dtype) for name, value in total.items()}


def views(model: Any, layer: int, expert: int) -> dict[str, Float[Tensor, "neurons d_model"]]:
    """One expert's parameters in memory, neurons as rows; writing to them edits the model."""
    first = {"W_in": model.W_in[layer, expert].T}
    if model._experts(layer).has_gate:
        first["W_gate"] = model.W_gate[layer, expert].T
    return {**first, "W_out": model.W_out[layer, expert]}
