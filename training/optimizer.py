"""Muon for matrices, AdamW for the rest.

Muon (Keller Jordan, 2024): momentum, then the nearest orthogonal matrix by a quintic Newton–Schulz iteration. All
matrices of one size are orthogonalised in one batched product, so 64 experts cost what one large matrix costs.
"""

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of each matrix of `g` [n, rows, columns] towards 1 (bf16, about ±30 %)."""
    a, b, c = COEFFICIENTS
    x = g.to(torch.bfloat16)
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    wide = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return (wide if x.shape[-2] <= x.shape[-1] else wide.mT).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Parameters are matrices or stacks of matrices on the last two axes; decay is decoupled, as in AdamW."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                buffer = state.setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                update = orthogonalise(update.flatten(0, -3) if p.ndim > 2 else update[None]).view_as(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5)


def build(model: nn.Module, muon_lr: float, adam_lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Attention, MLP and expert matrices to Muon; embedding, unembedding, routers and norms to AdamW."""
    table = ("embed", "unembed")
    named = list(model.named_parameters())
    hidden = [p for n, p in named if p.ndim >= 2 and n not in table and "router" not in n]
    tables = [p for n, p in named if n in table or "router" in n]
    norms = [p for _, p in named if p.ndim < 2]
    groups = [{"params": tables, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=adam_lr, betas=(0.9, 0.95), eps=1e-10)
    optimizers = [Muon(hidden, lr=muon_lr, weight_decay=weight_decay), adam]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
