"""DeepSeekMoE in plain PyTorch, written for training speed; `export.py` turns it into the original checkpoint format.

Same equations as arXiv 2401.06066. Two devices exist in training alone and leave the exported architecture unchanged:
the routed sum is multiplied by `routed_gain` (folded into `down_proj` on export; without it the routed experts of so
small a model stay nearly idle), and an expert-level balance loss over the whole batch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, in the words of the original config."""

    vocab_size: int = 4096
    hidden_size: int = 128
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    intermediate_size: int = 352
    moe_intermediate_size: int = 64
    n_routed_experts: int = 64
    n_shared_experts: int = 2
    num_experts_per_tok: int = 6
    first_k_dense_replace: int = 1
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    routed_gain: float = 16.0


def matrix(*size: int, gain: float = 1.0) -> nn.Parameter:
    """Normal with variance gain² / fan-in; the last axis is the input."""
    return nn.Parameter(torch.randn(size) * gain * size[-1] ** -0.5)


class RMSNorm(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
        self.eps = shape.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        d = shape.hidden_size
        self.heads = shape.num_attention_heads
        self.qkv = matrix(3, d, d)
        self.out = matrix(d, d, gain=0.1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, p, d = x.shape
        q, k, v = F.linear(x, self.qkv.view(3 * d, d)).view(b, p, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return F.linear(y.transpose(1, 2).reshape(b, p, d), self.out)


def rotary(shape: Shape) -> tuple[Tensor, Tensor]:
    """Cos and sin of the rotary angles, [max positions, head width]."""
    half = shape.hidden_size // shape.num_attention_heads // 2
    frequency = shape.rope_theta ** (-torch.arange(half) / half)
    angle = torch.arange(shape.max_position_embeddings)[:, None] * torch.cat([frequency, frequency])
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos[: x.shape[-2]].to(x.dtype) + torch.cat([-b, a], -1) * sin[: x.shape[-2]].to(x.dtype)


class MLP(nn.Module):
    def __init__(self, shape: Shape, width: int):
        super().__init__()
        self.gate_up = matrix(2, width, shape.hidden_size)
        self.down = matrix(shape.hidden_size, width, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.gate_up.flatten(0, 1)).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.down)


class MoE(nn.Module):
    """Top-k of a softmax over all experts, not renormalised, plus shared experts fused into one MLP."""

    def __init__(self, shape: Shape):
        super().__init__()
        d, m, e = shape.hidden_size, shape.moe_intermediate_size, shape.n_routed_experts
        self.k, self.gain = shape.num_experts_per_tok, shape.routed_gain
        self.router = nn.Parameter(torch.randn(e, d) * 0.05)
        self.gate_up = matrix(e, 2, m, d)
        self.down = matrix(e, d, m, gain=0.1)
        self.shared = MLP(shape, shape.n_shared_experts * m)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, p, d = x.shape
        flat = x.reshape(-1, d)
        with torch.autocast(x.device.type, enabled=False):
            probs = F.linear(flat.float(), self.router).softmax(-1)
        weights, indices = probs.topk(self.k, sorted=False)
        e = probs.shape[1]
        slots, order = indices.flatten().sort(stable=True)
        counts = torch.bincount(slots, minlength=e)
        # Every expert's rows are padded to a multiple of 32: CPU kernels are compiled per shape, and shapes then recur.
        padded = (counts + 31) // 32 * 32
        starts = padded.cumsum(0) - padded
        ends = (starts + padded).to(torch.int32)
        size = slots.numel() + 32 * e
        ends[-1] = size
        place = torch.empty_like(order)
        place[order] = torch.arange(slots.numel(), device=x.device) + (starts - counts.cumsum(0) + counts)[slots]
        half = torch.bfloat16
        rows = torch.zeros(size, d, dtype=half, device=x.device)
        rows = rows.index_copy(0, place, flat.to(half)[:, None].expand(-1, self.k, -1).reshape(-1, d))
        g, u = F.grouped_mm(rows, self.gate_up.to(half).flatten(1, 2).transpose(1, 2), offs=ends).chunk(2, -1)
        out = F.grouped_mm(F.silu(g) * u, self.down.to(half).transpose(1, 2), offs=ends)
        out = out.index_select(0, place).view(-1, self.k, d)
        routed = ((weights * self.gain).to(half)[:, None] @ out)[:, 0].float()
        # E · Σ_i f_i P_i (arXiv 2401.06066, eq. 12–14), over the batch: domains may differ, the mixture is balanced.
        balance = e * (counts / counts.sum()).detach() @ probs.mean(0)
        return routed.view(b, p, d) + self.shared(x).float(), balance


class Block(nn.Module):
    def __init__(self, shape: Shape, layer: int):
        super().__init__()
        self.norm1, self.attention, self.norm2 = RMSNorm(shape), Attention(shape), RMSNorm(shape)
        dense = layer < shape.first_k_dense_replace
        self.mlp = MLP(shape, shape.intermediate_size) if dense else MoE(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.norm1(x), cos, sin)
        y = self.mlp(self.norm2(x))
        y, balance = y if isinstance(y, tuple) else (y, x.new_zeros(()))
        return x + y, balance


class UnembedLoss(torch.autograd.Function):
    """Next-token loss of each row (nats), with the gradient of their mean; logits exist for one chunk of rows only."""

    @staticmethod
    def forward(ctx, x: Tensor, unembed: Tensor, targets: Tensor, chunk: int = 256) -> Tensor:
        half = unembed.to(torch.bfloat16)
        x = x.to(torch.bfloat16)
        loss = torch.empty(len(x), device=x.device)
        grad_x = torch.empty_like(x)
        grad_unembed = torch.zeros_like(unembed, dtype=torch.float32)
        for rows in torch.arange(len(x), device=x.device).split(chunk):
            part, target = x[rows], targets[rows]
            logits = F.linear(part, half).float()
            log_norm = logits.logsumexp(-1, keepdim=True)
            loss[rows] = (log_norm - logits.gather(1, target[:, None]))[:, 0]
            grad = logits.sub_(log_norm).exp_()
            grad.scatter_add_(1, target[:, None], torch.full_like(log_norm, -1.0))
            grad = grad.div_(len(x)).to(torch.bfloat16)
            grad_x[rows] = grad @ half
            grad_unembed += (grad.T @ part).float()
        ctx.save_for_backward(grad_x, grad_unembed)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_x, grad_unembed = ctx.saved_tensors
        return grad_x * grad_loss.sum(), grad_unembed * grad_loss.sum(), None


class DeepSeekMoE(nn.Module):
    """Tokens → next-token loss per position (nats) and the mean balance loss of the MoE layers."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embed = nn.Parameter(torch.randn(shape.vocab_size, shape.hidden_size) * 0.5)
        self.blocks = nn.ModuleList(Block(shape, i) for i in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape)
        self.unembed = matrix(shape.vocab_size, shape.hidden_size, gain=0.5)
        for name, value in zip(("cos", "sin"), rotary(shape), strict=True):
            self.register_buffer(name, value, persistent=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            x = F.embedding(tokens[:, :-1], self.embed)
            balances = []
            for block in self.blocks:
                x, balance = block(x, self.cos, self.sin)
                balances.append(balance)
            x = self.norm(x)
        loss = UnembedLoss.apply(x.flatten(0, 1), self.unembed, tokens[:, 1:].flatten())
        moe = max(1, self.shape.num_hidden_layers - self.shape.first_k_dense_replace)
        return loss.view(tokens.shape[0], -1), torch.stack(balances).sum() / moe
