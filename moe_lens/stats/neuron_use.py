"""How much experts use each of their neurons."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.checked import Natural, Positive
from moe_lens.errors import InputError
from moe_lens.stats.accumulator import Accumulator, Result
from moe_lens.stats.observation import computed_slots
from moe_lens.stats.sums import Total


@dataclass(frozen=True, eq=False)
class NeuronResult(Result):
    """Sums over the tokens at which each expert was computed."""

    layers: tuple[Natural, ...]
    routed: Int[Tensor, "layer n_experts"]
    sums: Float[Tensor, "layer n_experts d_expert"]
    """Of activations."""
    sizes: Float[Tensor, "layer n_experts d_expert"]
    """Of absolute activations."""

    def to_frame(self) -> pd.DataFrame:
        """A row per layer, expert and neuron: activation and size, means over the expert's tokens (NaN without)."""
        axes = [self.layers, *(range(n) for n in self.sums.shape[1:])]
        index = pd.MultiIndex.from_product(axes, names=["layer", "expert", "neuron"])
        n = self.routed.double()[..., None]
        columns = {"activation": self.sums / n, "size": self.sizes / n}
        frame = pd.DataFrame({name: value.flatten().numpy() for name, value in columns.items()}, index=index)
        return frame.reset_index()


class NeuronStats(Accumulator[NeuronResult]):
    """Sums activations of experts' neurons; memory does not grow."""

    def __init__(self, layers: Sequence[int], n_experts: Positive):
        self.layers, self.n_experts = tuple(layers), n_experts
        self._sums = {name: [Total() for _ in self.layers] for name in ("routed", "sums", "sizes")}
        parts = {f"{name}.{layer}": of[i] for name, of in self._sums.items() for i, layer in enumerate(self.layers)}
        super().__init__({"layers": self.layers, "n_experts": n_experts}, parts)

    def update(
        self,
        layer: Natural,
        activations: Float[Tensor, "batch pos top_k d_expert"],
        indices: Int[Tensor, "batch pos top_k"],
        counted: Bool[Tensor, "batch pos"],
    ) -> Self:
        """Count one layer of a batch.

        Args:
            layer: Which layer.
            activations: What the chosen experts' down projections read, by rank.
            indices: Which experts they are; −1 in slots that were left out, which are not counted.
            counted: The tokens to count.

        Raises:
            InputError: ids that no expert has.
        """
        i, at = self.layers.index(layer), counted.to(activations.device)
        if not bool(at.any()):
            return self
        indices = indices.to(at.device)
        slots = computed_slots(indices, at, self.n_experts)
        values, chosen = activations[slots].double(), indices[slots]
        empty = values.new_zeros(self.n_experts, values.shape[-1])
        self._sums["routed"][i].add(torch.bincount(chosen, minlength=self.n_experts))
        self._sums["sums"][i].add(empty.index_add(0, chosen, values))
        self._sums["sizes"][i].add(empty.index_add(0, chosen, values.abs()))
        return self

    def result(self) -> NeuronResult:
        """The sums so far."""
        if not all(part.seen for part in self._sums["routed"]):
            raise InputError("no tokens were counted; update every layer with a batch that holds text first")
        routed, sums, sizes = (torch.stack([part.value for part in of]) for of in self._sums.values())
        return NeuronResult(self.layers, routed, sums, sizes)
