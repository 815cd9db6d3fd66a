"""Scores of experts' importance, as pruning methods define them; and how large experts' contributions are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens import names
from moe_lens.checked import AnyModel, Natural, Positive
from moe_lens.errors import InputError
from moe_lens.ids import Ids, ids
from moe_lens.protocols import require_stream_width
from moe_lens.routing import output_factors
from moe_lens.stats.accumulator import Accumulator, Result
from moe_lens.stats.observation import COMPUTED, Hooks, computed_slots, each_layer
from moe_lens.stats.sums import Maximum, Total

SCORES = {
    "frequency": "N_E / N: share of tokens routed to the expert",
    "summed_weight": "Σ g: sum of its routing weights",
    "ean": "Σ ‖E(x)‖₂: expert activation norm, summed over its tokens (EAN; arXiv 2504.05586, 2510.13999)",
    "weighted_ean": "Σ g ‖E(x)‖₂: the same, weighted by the router",
    "reap": "(Σ g ‖E(x)‖₂) / N_E: mean over its tokens, Equation 9 of REAP (arXiv 2510.13999); 0 if it has none",
    "mean_norm": "(Σ ‖E(x)‖₂) / N_E: mean norm of its output",
    "relative_norm": "mean over its tokens of g ‖E(x)‖₂ / ‖u‖₂: its contribution beside the residual stream",
    "max_activation": "greatest |component of E(x)| over tokens: what super experts are found by (arXiv 2507.23279)",
}
"""Scores of an expert, and what each is. Sums are over the N_E counted tokens at which it was computed, of N in all.

In a family that weighs what experts read (Llama 4), E(g x) stands for both E(x) and g E(x)."""


@dataclass(frozen=True, eq=False)
class ImportanceResult(Result):
    """Sums over the tokens at which each expert was computed."""

    layers: tuple[Natural, ...]
    n_tokens: Natural
    routed: Int[Tensor, "layer n_experts"]
    sums: Float[Tensor, "layer 4 n_experts"]
    """Of g, ‖E(x)‖, g ‖E(x)‖ and g ‖E(x)‖ / ‖u‖; the last are NaN where the model has no hook of u."""
    greatest: Float[Tensor, "layer n_experts"]
    """Greatest absolute component of E(x); 0 where no token was routed to the expert."""

    def score(self, name: str) -> Float[Tensor, "layer n_experts"]:
        """One of `SCORES`.

        Raises:
            InputError: there is no such score, or not in this model.
        """
        scores = self._scores()
        if name not in scores:
            raise InputError(f"there is no score {name!r}; expected one of {list(scores)}")
        if scores[name].isnan().any():
            raise InputError(f"the model has no {names.RESID_MID}, beside which {name!r} holds what experts add")
        return scores[name]

    def _scores(self) -> dict[str, Float[Tensor, "layer n_experts"]]:
        weight, norm, weighted, relative = self.sums.unbind(1)
        n = self.routed.clamp(min=1)
        scores = {
            "frequency": self.routed.double() / self.n_tokens,
            "summed_weight": weight,
            "ean": norm,
            "weighted_ean": weighted,
            "reap": weighted / n,
            "mean_norm": norm / n,
            "relative_norm": relative / n,
            "max_activation": self.greatest,
        }
        assert scores.keys() == SCORES.keys()
        return scores

    def super_experts(self, layers: Sequence[int] | None = None) -> Bool[Tensor, "layer n_experts"]:
        """Experts whose greatest activation is above the 99.5th percentile of all and above a tenth of the greatest.

        The rule of "Unveiling Super Experts" (arXiv 2507.23279), which has a third condition: the layer is one of those
        in which massive activations of the residual stream are formed. Pass these as `layers`.

        Args:
            layers: Where super experts are looked for; everywhere if not given. Percentile and maximum are of all.

        Raises:
            InputError: layers of which there are no scores.
        """
        chosen = self.layers if layers is None else ids("layers", layers)
        if isinstance(chosen, Ids):
            chosen.check("layers", self.layers[-1] + 1)
        if missing := [layer for layer in chosen if layer not in self.layers]:
            raise InputError(f"layers: got {missing[0]}; there are scores of layers {list(self.layers)}")
        limit = torch.maximum(self.greatest.quantile(0.995), self.greatest.max() / 10)
        among = torch.tensor([layer in chosen for layer in self.layers])
        return (self.greatest > limit) & among[:, None]

    def to_frame(self) -> pd.DataFrame:
        """A row per layer and expert: routed (tokens), every one of `SCORES`, super_expert, tokens."""
        index = pd.MultiIndex.from_product([self.layers, range(self.routed.shape[1])], names=["layer", "expert"])
        columns = {"routed": self.routed, **self._scores()}
        columns["super_expert"] = self.super_experts()
        frame = pd.DataFrame({name: table.flatten().numpy() for name, table in columns.items()}, index=index)
        return frame.reset_index().assign(tokens=self.n_tokens)


class ImportanceStats(Accumulator[ImportanceResult]):
    """Sums what importance scores are made of, while a model runs: no activation outlives its layer.

    ```python
    importance = ImportanceStats(model.moe_layers, model.n_experts)
    model.run_with_hooks(tokens, fwd_hooks=importance.hooks(model, counted))
    ```
    """

    def __init__(self, layers: Sequence[int], n_experts: Positive):
        self.layers, self.n_experts = tuple(layers), n_experts
        self._tokens = [Total() for _ in self.layers]
        self._routed, self._sums = [Total() for _ in self.layers], [Total() for _ in self.layers]
        self._greatest = [Maximum([n_experts]) for _ in self.layers]
        kinds = {"tokens": self._tokens, "routed": self._routed, "sums": self._sums, "greatest": self._greatest}
        super().__init__(
            {"layers": self.layers, "n_experts": n_experts},
            {
                f"{name}.{layer}": part
                for name, of in kinds.items()
                for layer, part in zip(self.layers, of, strict=True)
            },
        )

    def update(
        self,
        layer: Natural,
        resid: Float[Tensor, "batch pos d_model"] | None,
        outputs: Float[Tensor, "batch pos top_k d_model"],
        weights: Float[Tensor, "batch pos top_k"],
        indices: Int[Tensor, "batch pos top_k"],
        counted: Bool[Tensor, "batch pos"],
        factors: Float[Tensor, "batch pos top_k"] | None = None,
    ) -> Self:
        """Count one layer of a batch.

        Args:
            layer: Which layer.
            resid: The residual stream between attention and experts, u; None where there is no hook of it.
            outputs: E(x) of the selected experts, by rank.
            weights: Their routing weights.
            indices: Which experts they are; −1 in slots that were left out, which are not counted.
            counted: The tokens to count.
            factors: What outputs are multiplied by, where that is not their routing weights; see `output_factors`.

        Raises:
            InputError: activations that are not finite, or ids that no expert has.
        """
        i, at = self.layers.index(layer), counted.to(outputs.device)
        if not bool(at.any()):
            return self
        indices = indices.to(at.device)
        slots = computed_slots(indices, at, self.n_experts)
        out, chosen = outputs[slots].float(), indices[slots]
        norm = out.norm(dim=-1)
        weight = weights.to(at.device)[slots].float()
        added = norm * (weight if factors is None else factors.to(at.device)[slots].float())
        size = torch.full_like(norm, torch.nan)
        if resid is not None:
            size = resid.to(at.device).float().norm(dim=-1, keepdim=True).expand(slots.shape)[slots]
        if not bool(norm.isfinite().all() and (resid is None or size.isfinite().all())):
            raise InputError(f"layer {layer}: activations are not finite")
        values = torch.stack([weight, norm, added, added / size]).double()
        self._tokens[i].add(at.sum())
        self._routed[i].add(torch.bincount(chosen, minlength=self.n_experts))
        sums = values.new_zeros(4, self.n_experts).index_add_(1, chosen, values)
        if resid is None:
            sums[3] = torch.nan  # of experts without tokens, too
        self._sums[i].add(sums)
        greatest = out.abs().amax(-1).double()
        found = torch.full((self.n_experts,), -torch.inf, dtype=torch.float64, device=out.device)
        self._greatest[i].add(found.scatter_reduce_(0, chosen, greatest, "amax"))
        return self

    def hooks(self, model: AnyModel, counted: Bool[Tensor, "batch pos"]) -> Hooks:
        """Hooks for one forward pass that count its tokens; not for experts that an intervention leaves out there.

        Args:
            model: A `HookedMoE`.
            counted: The tokens of the pass to count.
        """
        require_stream_width(model, "how large they are beside the residual stream")
        wanted = [names.EXPERT_OUT, names.ROUTING_WEIGHTS, COMPUTED]
        if all(names.block(names.RESID_MID, layer) in model.hook_dict for layer in self.layers):
            wanted.append(names.RESID_MID)

        def consume(layer: int, of: dict[str, Tensor]) -> None:
            outputs, weights, indices = (of[name] for name in wanted[:3])
            factors = output_factors(weights, model.family)
            self.update(layer, of.get(names.RESID_MID), outputs, weights, indices, counted, factors)

        return each_layer(model, wanted, consume)

    def result(self) -> ImportanceResult:
        """The sums so far."""
        if not all(part.seen for part in self._tokens):
            raise InputError("no tokens were counted; update every layer with a batch that holds text first")
        return ImportanceResult(
            layers=self.layers,
            n_tokens=int(self._tokens[0].value),
            routed=torch.stack([part.value for part in self._routed]),
            sums=torch.stack([part.value for part in self._sums]),
            greatest=torch.stack([part.value for part in self._greatest]).clamp(min=0),
        )
