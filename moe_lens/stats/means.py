"""Mean activations of a domain: what "replaced by its mean" and "centred" refer to."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.errors import InputError


@dataclass(frozen=True, eq=False)
class Means:
    """Means over the counted tokens, per layer."""

    layers: tuple[int, ...]
    resid: Float[Tensor, "layer d_model"]
    """Of the residual stream between attention and experts, u."""
    weighted: Float[Tensor, "layer top_k d_model"]
    """Of the weighted contribution of each rank, g E(x)."""
    experts: Float[Tensor, "layer n_experts d_model"]
    """Of each expert's output E(x) over the tokens that were routed to it; the layer's mean where there were none."""
    n_tokens: int
    unseen: int
    """How many experts, over all layers, no token was routed to."""


class ActivationMeans:
    """Accumulates means of u, of the ranks' contributions and of every expert's output; memory does not grow."""

    def __init__(self, layers: Sequence[int], n_experts: int, top_k: int, d_model: int):
        self.layers = tuple(layers)
        n_layers = len(self.layers)
        self._tokens = torch.zeros(n_layers, dtype=torch.long)
        self._resid = torch.zeros(n_layers, d_model, dtype=torch.float64)
        self._weighted = torch.zeros(n_layers, top_k, d_model, dtype=torch.float64)
        self._routed = torch.zeros(n_layers, n_experts, dtype=torch.long)
        self._experts = torch.zeros(n_layers, n_experts, d_model, dtype=torch.float64)

    def update(
        self,
        layer: int,
        resid: Float[Tensor, "batch pos d_model"],
        outputs: Float[Tensor, "batch pos top_k d_model"],
        weights: Float[Tensor, "batch pos top_k"],
        indices: Int[Tensor, "batch pos top_k"],
        counted: Bool[Tensor, "batch pos"],
    ) -> "ActivationMeans":
        """Count one layer of a batch.

        Args:
            layer: Which layer.
            resid: The residual stream that the experts' outputs are added to.
            outputs: E(x) of the selected experts, by rank.
            weights: Their routing weights.
            indices: Which experts they are.
            counted: The tokens to count.
        """
        i = self.layers.index(layer)
        out, chosen = outputs[counted].double().cpu(), indices[counted].long().cpu()
        self._tokens[i] += len(out)
        self._resid[i] += resid[counted].double().cpu().sum(0)
        self._weighted[i] += (out * weights[counted].double().cpu()[..., None]).sum(0)
        self._routed[i] += torch.bincount(chosen.flatten(), minlength=self._routed.shape[1])
        self._experts[i].index_add_(0, chosen.flatten(), out.flatten(0, 1))
        return self

    def merge(self, other: "ActivationMeans") -> "ActivationMeans":
        """Add the sums of another accumulator of the same model."""
        for mine, theirs in (
            (self._tokens, other._tokens),
            (self._resid, other._resid),
            (self._weighted, other._weighted),
            (self._routed, other._routed),
            (self._experts, other._experts),
        ):
            mine += theirs
        return self

    def result(self) -> Means:
        """The means so far."""
        if not int(self._tokens.min()):
            raise InputError("no tokens were counted; update every layer with a batch that holds text first")
        n = self._tokens[:, None]
        layer_mean = self._experts.sum(1) / self._routed.sum(1, keepdim=True)
        seen = (self._routed > 0)[..., None]
        experts = torch.where(seen, self._experts / self._routed.clamp(min=1)[..., None], layer_mean[:, None])
        return Means(
            self.layers,
            (self._resid / n).float(),
            (self._weighted / n[..., None]).float(),
            experts.float(),
            int(self._tokens[0]),
            int((self._routed == 0).sum()),
        )
