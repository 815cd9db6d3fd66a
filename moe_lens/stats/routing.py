"""Which experts a domain's tokens are sent to (section 3 of "MoE Lens", arXiv 2603.05806)."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.errors import InputError
from moe_lens.stats.by_source import BySource
from moe_lens.stats.resampling import Interval, bootstrap, halves


@dataclass(frozen=True, eq=False)
class RoutingResult:
    """Counts of tokens and of assignments, by source."""

    layers: tuple[int, ...]
    top_k: int
    sources: tuple[str, ...]
    tokens: Int[Tensor, " source"]
    assignments: Int[Tensor, "source layer n_experts"]
    """Tokens whose selected set contains the expert."""

    @property
    def n_tokens(self) -> int:
        """Tokens counted, N_D in the paper."""
        return int(self.tokens.sum())

    @property
    def n_experts(self) -> int:
        """Routed experts in a layer."""
        return self.assignments.shape[-1]

    @property
    def baseline(self) -> float:
        """Specialisation of every expert under uniform routing: top_k / n_experts."""
        return self.top_k / self.n_experts

    @property
    def specialisation(self) -> Float[Tensor, "layer n_experts"]:
        """N_{E,D} / N_D: share of tokens whose selected set contains the expert, in [0, 1]; a layer sums to top_k."""
        return self.assignments.sum(0).double() / self.n_tokens

    def experts_covering(self, share: float = 0.5) -> Int[Tensor, " layer"]:
        """The smallest number of experts that together take at least `share` of a layer's assignments."""
        counts = self.assignments.sum(0).sort(-1, descending=True).values
        enough = counts.cumsum(-1) >= share * counts.sum(-1, keepdim=True) - 1e-9
        return enough.int().argmax(-1) + 1

    def interval(self, layer: int, expert: int) -> Interval | None:
        """95 % interval of an expert's specialisation, resampling sources; None when there are too few."""
        assigned = self.assignments[:, self.layers.index(layer), expert].double()
        return bootstrap(lambda times: (times @ assigned) / (times @ self.tokens.double()), len(self.sources))

    def picked_and_measured_apart(self, seed: int = 0) -> Float[Tensor, " layer"] | None:
        """Specialisation of the most specialised expert, picked on one half of the sources and measured on the other.

        The largest of many noisy shares is too large; this one is not. Mean of both directions; None for one source.
        """
        if len(self.sources) < 2:
            return None
        half = halves(self.sources, seed)
        member = torch.tensor([half[source] == 0 for source in self.sources])
        shares = [self.assignments[m].sum(0).double() / self.tokens[m].sum() for m in (member, ~member)]
        measured = [there.gather(-1, here.argmax(-1, keepdim=True))[:, 0] for here, there in (shares, shares[::-1])]
        return (measured[0] + measured[1]) / 2

    def most_specialised(self) -> pd.DataFrame:
        """Per layer: the most specialised expert, its share, interval, and its share if picked on other sources."""
        shares, experts = self.specialisation.max(-1)
        apart = self.picked_and_measured_apart()
        rows = []
        for i, layer in enumerate(self.layers):
            interval = self.interval(layer, int(experts[i]))
            rows.append(
                {
                    "layer": layer,
                    "expert": int(experts[i]),
                    "share": float(shares[i]),
                    "low": interval.low if interval else None,
                    "high": interval.high if interval else None,
                    "picked_apart": float(apart[i]) if apart is not None else None,
                    "tokens": self.n_tokens,
                    "sources": len(self.sources),
                }
            )
        return pd.DataFrame(rows)

    def to_frame(self) -> pd.DataFrame:
        """One row per layer and expert: tokens, assigned, share."""
        assigned = self.assignments.sum(0)
        index = pd.MultiIndex.from_product([self.layers, range(self.n_experts)], names=["layer", "expert"])
        frame = pd.DataFrame({"assigned": assigned.flatten().numpy()}, index=index).reset_index()
        return frame.assign(tokens=self.n_tokens, share=frame["assigned"] / self.n_tokens)


class RoutingStats:
    """Counts assignments per source, layer and expert; memory grows with the number of sources only."""

    def __init__(self, layers: Sequence[int], n_experts: int, top_k: int):
        self.layers, self.n_experts, self.top_k = tuple(layers), n_experts, top_k
        self._tokens, self._assignments = BySource(), BySource()

    def update(
        self,
        indices: Int[Tensor, "layer batch pos top_k"],
        counted: Bool[Tensor, "batch pos"],
        sources: Sequence[str],
    ) -> "RoutingStats":
        """Count a batch.

        Args:
            indices: The selected experts of every layer.
            counted: The tokens to count; padding and special tokens should be False.
            sources: Of each row.

        Raises:
            InputError: The layers or the number of active experts are not those announced, or an index is out of range.
        """
        layers, batch, _, top_k = indices.shape
        if (layers, top_k) != (len(self.layers), self.top_k):
            raise InputError(
                f"routing of {layers} layers and top-{top_k}; expected {len(self.layers)} and top-{self.top_k}"
            )
        chosen = indices[:, counted]
        if chosen.numel() and not (chosen.min() >= 0 and chosen.max() < self.n_experts):
            raise InputError(
                f"expert indices from {int(chosen.min())} to {int(chosen.max())}; there are {self.n_experts}"
            )
        row = counted.nonzero()[:, 0].to(chosen.device)
        cell = (torch.arange(layers, device=chosen.device)[:, None] * batch + row)[..., None] * self.n_experts + chosen
        counts = torch.bincount(cell.flatten(), minlength=layers * batch * self.n_experts)
        self._assignments.add(counts.view(layers, batch, self.n_experts).transpose(0, 1), sources)
        self._tokens.add(counted.sum(-1), sources)
        return self

    def merge(self, other: "RoutingStats") -> "RoutingStats":
        """Add the counts of another accumulator of the same model."""
        self._tokens.merge(other._tokens)
        self._assignments.merge(other._assignments)
        return self

    def result(self) -> RoutingResult:
        """The counts so far."""
        if not self._tokens.sources or not int(self._tokens.stacked().sum()):
            raise InputError("no tokens were counted; update with a batch that holds text first")
        tokens, assignments = self._tokens.stacked(), self._assignments.stacked()
        return RoutingResult(self.layers, self.top_k, self._tokens.sources, tokens, assignments)
