"""What all lenses share: from a point of the residual stream to logits, and from a cache to what is read there."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens import names
from moe_lens.errors import InputError
from moe_lens.lenses.result import LensResult
from moe_lens.partial_sum import PartialSum

CHUNK = 2**24
"""Greatest number of logits held at a time: 64 MB in float32."""


class Lens(ABC):
    """Reads points of the residual stream as next-token distributions, through the model's final norm and unembedding.

    A lens says how a point is translated into the basis that the final norm reads; everything else is common.

    Args:
        model: A `HookedMoE`.
    """

    def __init__(self, model: Any):
        self.model = model

    @abstractmethod
    def translate(self, resid: Float[Tensor, "*axes d_model"], layer: int) -> Float[Tensor, "*axes d_model"]:
        """A point of the stream at a layer, in the basis of the stream that leaves the last one."""

    def logits(self, resid: Float[Tensor, "*axes d_model"], layer: int) -> Float[Tensor, "*axes d_vocab"]:
        """FinalNorm(translate(resid)) W_U; differentiable."""
        return self.model.unembed(self.model.ln_final(self.translate(resid, layer)))

    def hooks(self, layers: Collection[int] | None = None) -> list[str]:
        """The names that a cache must hold so that `decode` can read any sum of these layers."""
        wanted = []
        for layer in range(self.model.cfg.n_layers) if layers is None else layers:
            wanted += [names.block(names.RESID_PRE, layer), names.block(names.RESID_MID, layer)]
            if layer not in self.model.moe_layers:
                wanted.append(names.block(names.BLOCK_MLP_OUT, layer))
                continue
            parts = [names.EXPERT_INDICES, names.ROUTING_WEIGHTS, names.EXPERT_OUT, names.EXPERT_WEIGHTED]
            parts += [names.SHARED_OUT] if self.model.n_shared_experts else []
            wanted += [names.mlp(name, layer) for name in parts]
        return wanted

    @torch.no_grad()
    def decode(
        self,
        cache: Any,
        sums: PartialSum | Sequence[PartialSum],
        *,
        layers: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        top: int = 5,
    ) -> LensResult:
        """Read partial sums of a cache.

        Args:
            cache: A `MoECache` of this model that holds `hooks(layers)`, with a batch axis.
            sums: What to read in every layer: one sum or several.
            layers: Which layers; all if not given.
            positions: Which positions of the cache, from 0; all if not given.
            top: How many of the most likely tokens to keep.

        Raises:
            HookError: The cache lacks an activation; the message says which.
            InputError: A position that the cache does not have, or no sum.
        """
        sums = [sums] if isinstance(sums, PartialSum) else sums
        layers = tuple(range(self.model.cfg.n_layers) if layers is None else layers)
        dense = tuple(layer for layer in layers if layer not in self.model.moe_layers)
        if not sums or not layers or not cache.has_batch_dim:
            raise InputError("a lens needs at least one sum, one layer, and a cache with a batch axis")
        batch, length = cache[names.block(names.RESID_MID, layers[0])].shape[:2]
        positions = tuple(range(length) if positions is None else positions)
        if not all(0 <= position < length for position in positions):
            raise InputError(f"positions are {list(positions)}; the cache holds 0 to {length - 1}")
        at = list(positions)
        cells = len(layers), len(sums), batch, len(at)
        tokens = torch.full((*cells, top), -1)
        found, probs = torch.full((*cells, top), torch.nan), torch.full((*cells, top), torch.nan)
        experts = torch.full((len(layers), batch, len(at), self.model.top_k), -1)
        weights = torch.full(experts.shape, torch.nan)
        for i, layer in enumerate(layers):
            if layer not in dense:
                routing = cache.routing(layer)
                experts[i], weights[i] = routing.indices[:, at], routing.weights[:, at]
            for j, which in enumerate(sums):
                if layer in dense and which.restricted:
                    continue
                rows = cache.partial_sum(layer, which).values[:, at].flatten(0, 1)
                read = [self._top(part, layer, top) for part in rows.split(max(1, CHUNK // self.model.cfg.d_vocab))]
                for target, values in zip((tokens, found, probs), zip(*read, strict=True), strict=True):
                    target[i, j] = torch.cat(values).view(batch, len(at), top)
        return LensResult(layers, tuple(sums), positions, dense, tokens, found, probs, experts, weights)

    def _top(self, resid: Float[Tensor, "rows d_model"], layer: int, top: int) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.logits(resid, layer).float()
        best = logits.topk(top)
        probs = (best.values - logits.logsumexp(-1, keepdim=True)).exp()
        return best.indices.cpu(), best.values.cpu(), probs.cpu()
