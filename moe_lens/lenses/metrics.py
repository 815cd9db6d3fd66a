"""What rows of logits say, beside the model's final prediction and the layer's ensemble of experts."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 2**16
"""Logits that are looked at together on a processor: what is computed of them stays in its cache. They pass memory ten
times otherwise, which takes as long as the matrix product that made them, and memory of some MB is asked for anew."""
ROWS = 16
"""Rows at least that are looked at together: of a large vocabulary no cache holds ten tables of even one row, and to
set every thread to work for one row takes longer than the work, beside other programs many times as long."""


class Distribution(NamedTuple):
    """Next-token distributions that others are compared with."""

    log_probs: Float[Tensor, "rows d_vocab"]
    best: Int[Tensor, " rows"]
    """The most likely token."""

    @classmethod
    def of(cls, logits: Float[Tensor, "rows d_vocab"]) -> "Distribution":
        """The softmax of logits."""
        return cls(logits.log_softmax(-1), logits.argmax(-1))

    def of_rows(self, rows: Int[Tensor, " some"]) -> "Distribution":
        """Some of the rows; all of them without a copy."""
        return self if len(rows) == len(self.best) else Distribution(self.log_probs[rows], self.best[rows])


def read(
    logits: Float[Tensor, "rows d_vocab"],
    *,
    final: Distribution,
    ensemble: Distribution,
    layer_best: Int[Tensor, " rows"],
    targets: Int[Tensor, " rows"],
    top: int,
) -> dict[str, Tensor]:
    """The fields of a `LensResult` that follow from the logits of some rows, [rows, …], on the CPU.

    Args:
        logits: What the lens reads, in float32 at least.
        final: The model's own prediction.
        ensemble: The lens on all routed experts + residual.
        layer_best: The most likely token of the lens on the whole layer.
        targets: Tokens to find; −1 for none.
        top: How many of the most likely tokens to keep.
    """
    size = len(logits) if logits.is_cuda else max(ROWS, BLOCK // logits.shape[-1])
    parts = []
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        one, other = (Distribution(known.log_probs[rows], known.best[rows]) for known in (final, ensemble))
        parts.append(_read_block(logits[rows], one, other, layer_best[rows], targets[rows], top))
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _read_block(
    logits: Tensor, final: Distribution, ensemble: Distribution, layer_best: Tensor, targets: Tensor, top: int
) -> dict[str, Tensor]:
    best = logits.topk(top) if top > 1 else logits.max(-1, keepdim=True)  # which is quicker
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    target = targets.clamp(min=0)[:, None]
    # Comparison into floating point, whose sum is vectorised and exact: vocabularies are far smaller than 2^24.
    above = torch.gt(logits, logits.gather(-1, target), out=torch.empty_like(logits)).sum(-1).long()
    absent = targets < 0
    # Differences first: the divergence of two nearly equal distributions is lost in the difference of two sums.
    kl_final = torch.linalg.vecdot(final.log_probs.exp(), final.log_probs - log_probs)
    kl_ensemble = torch.linalg.vecdot(ensemble.log_probs.exp(), ensemble.log_probs - log_probs)
    return {
        "top_tokens": best.indices,
        "top_logits": best.values,
        "top_probs": probs.gather(-1, best.indices),
        "entropy": -torch.linalg.vecdot(probs, log_probs),
        "cross_entropy": -log_probs.gather(-1, target).squeeze(-1).masked_fill(absent, torch.nan),
        "target_rank": above.masked_fill(absent, -1),
        "kl_final": kl_final.clamp(min=0),  # Gibbs' inequality; rounding can leave −1e−8
        "kl_ensemble": kl_ensemble.clamp(min=0),
        "agrees_final": _is_best(logits, final.best, best.values),
        "agrees_ensemble": _is_best(logits, ensemble.best, best.values),
        "agrees_layer": _is_best(logits, layer_best, best.values),
    }


def _is_best(logits: Tensor, token: Tensor, best: Tensor) -> Tensor:
    """1 where a token has the greatest logit, alone or with others."""
    return (logits.gather(-1, token[:, None]) >= best[:, :1]).squeeze(-1).to(logits.dtype)
