"""Mean activations of a domain: what "replaced by its mean" and "centred" refer to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.checked import Natural, Positive
from moe_lens.errors import InputError
from moe_lens.interventions.expert_means import ExpertMeans
from moe_lens.stats.accumulator import Accumulator, Result
from moe_lens.stats.observation import computed_slots
from moe_lens.stats.sums import Total


@dataclass(frozen=True, eq=False)
class Means(Result):
    """Means over the counted tokens, per layer."""

    layers: tuple[Natural, ...]
    resid: Float[Tensor, "layer d_model"]
    """Of the residual stream between attention and experts, u."""
    weighted: Float[Tensor, "layer top_k d_model"]
    """Of the weighted contribution of each rank, g E(x)."""
    experts: Float[Tensor, "layer n_experts d_model"]
    """Of each expert's output E(x) over the tokens at which it was computed; the layer's mean where there were none."""
    counts: Int[Tensor, "layer n_experts"]
    """At how many tokens each expert was computed."""
    n_tokens: Natural

    @property
    def unseen(self) -> int:
        """How many experts, over all layers, were computed at no token."""
        return int((self.counts == 0).sum())

    @property
    def per_expert(self) -> ExpertMeans:
        """The experts' means, as `model.ablate(how="mean")` takes them."""
        return ExpertMeans(self.layers, self.experts, self.counts)

    def to_frame(self) -> pd.DataFrame:
        """One row per layer: the norms of the means."""
        norms = {"resid": self.resid.norm(dim=-1), "weighted": self.weighted.sum(1).norm(dim=-1)}
        return pd.DataFrame({"layer": self.layers, **{name: value.numpy() for name, value in norms.items()}})


class ActivationMeans(Accumulator[Means]):
    """Accumulates means of u, of the ranks' contributions and of every expert's output; memory does not grow."""

    def __init__(self, layers: Sequence[int], n_experts: Positive, top_k: Positive, d_model: Positive):
        self.layers, self.n_experts, self.top_k = tuple(layers), n_experts, top_k
        self._sums = {name: [Total() for _ in self.layers] for name in _SUMS}
        super().__init__(
            {"layers": self.layers, "n_experts": n_experts, "top_k": top_k, "d_model": d_model},
            {
                f"{name}.{layer}": part
                for name, parts in self._sums.items()
                for layer, part in zip(self.layers, parts, strict=True)
            },
        )

    def update(
        self,
        layer: Natural,
        resid: Float[Tensor, "batch pos d_model"],
        outputs: Float[Tensor, "batch pos top_k d_model"],
        weights: Float[Tensor, "batch pos top_k"],
        indices: Int[Tensor, "batch pos top_k"],
        counted: Bool[Tensor, "batch pos"],
    ) -> Self:
        """Count one layer of a batch.

        Args:
            layer: Which layer.
            resid: The residual stream that the experts' outputs are added to.
            outputs: E(x) of the selected experts, by rank.
            weights: What these are multiplied by, as `output_factors` makes it of routing weights.
            indices: Which experts they are; −1 in slots that were left out, which add nothing.
            counted: The tokens to count.

        Raises:
            InputError: another number of ranks than announced, or ids that no expert has.
        """
        if indices.shape[-1] != self.top_k:
            raise InputError(f"{indices.shape[-1]} experts for each token; expected {self.top_k}, as announced")
        if not bool(counted.any()):
            return self
        i = self.layers.index(layer)
        indices, counted = indices.long().cpu(), counted.cpu()
        slots = computed_slots(indices, counted, self.n_experts)
        every = outputs.cpu().masked_fill(~slots[..., None], 0)
        out, chosen = every[counted].double(), indices[slots]
        by_expert = torch.zeros(self.n_experts, out.shape[-1], dtype=torch.float64)
        added = {
            "tokens": torch.tensor(len(out)),
            "resid": resid.cpu()[counted].double().sum(0),
            "weighted": (out * weights.cpu()[counted].double()[..., None]).sum(0),
            "routed": torch.bincount(chosen, minlength=self.n_experts),
            "experts": by_expert.index_add_(0, chosen, every[slots].double()),
        }
        for name, value in added.items():
            self._sums[name][i].add(value)
        return self

    def result(self) -> Means:
        """The means so far."""
        if not all(part.seen for part in self._sums["tokens"]):
            raise InputError("no tokens were counted; update every layer with a batch that holds text first")
        tokens, resid, weighted, routed, sums = (
            torch.stack([part.value for part in self._sums[name]]) for name in _SUMS
        )
        return Means(
            self.layers,
            (resid / tokens[:, None]).float(),
            (weighted / tokens[:, None, None]).float(),
            ExpertMeans.of_sums(self.layers, sums, routed).filled().experts,
            routed,
            int(tokens[0]),
        )

    @property
    def seen(self) -> bool:
        """Whether any token was counted."""
        return all(part.seen for part in self._sums["tokens"])


_SUMS = ("tokens", "resid", "weighted", "routed", "experts")
