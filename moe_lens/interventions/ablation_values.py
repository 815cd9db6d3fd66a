"""Experts' outputs replaced: by nothing, by a mean, or by those at other tokens."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens import names
from moe_lens.errors import InputError
from moe_lens.interventions.expert_means import ExpertMeans
from moe_lens.interventions.intervention import Hook, computed, positions, real_tokens, this_pass
from moe_lens.protocols import HookedModel
from moe_lens.selection import Selection


@dataclass(frozen=True, eq=False)
class Replacement:
    """What stands in for the outputs of the experts that a selection means."""

    model: HookedModel
    selection: Selection
    how: Literal["zero", "mean", "resample"]
    means: ExpertMeans | None
    """For "mean", and for experts that have nothing to resample from."""
    seed: int

    def routed(self, layer: int) -> Hook:
        """For the routed experts of a layer; their weights stay."""

        def replaced(outputs: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            experts, which = computed(self.model, layer, self.selection)
            replace = self._by_mean if self.how == "mean" else self._by_others
            return replace(layer, outputs, experts, which)

        return names.mlp(names.EXPERT_OUT, layer), replaced

    def _by_mean(
        self,
        layer: int,
        outputs: Float[Tensor, "batch pos top_k d_model"],
        experts: Int[Tensor, "batch pos top_k"],
        which: Bool[Tensor, "batch pos top_k"],
    ) -> Float[Tensor, "batch pos top_k d_model"]:
        assert self.means is not None
        stand_in = self.means.of(layer).to(outputs)[experts[which]]
        unknown = stand_in.isnan().any(-1)
        if bool(unknown.any()):
            self.means.require(layer, int(experts[which][unknown][0]))
        return outputs.index_put(which.nonzero(as_tuple=True), stand_in)

    def _by_others(
        self,
        layer: int,
        outputs: Float[Tensor, "batch pos top_k d_model"],
        experts: Int[Tensor, "batch pos top_k"],
        which: Bool[Tensor, "batch pos top_k"],
    ) -> Float[Tensor, "batch pos top_k d_model"]:
        """Outputs of the same expert at other tokens of the batch; padding takes no part."""
        this_pass(self.model, experts, "how='resample'")
        rows = (experts >= 0) & real_tokens(self.model, experts)[..., None]
        donors, alone = derangement(experts[rows], self.seed, layer)
        old, meant = outputs[rows], which[rows]
        single = alone & meant
        if bool(single.any()) and self.means is None:
            raise InputError(
                f"expert {int(experts[rows][single][0])} of layer {layer} has one token in this batch: there is no "
                "other output to take. Pass a larger batch, or fallback='mean' with a reference"
            )
        new = outputs.index_put(rows.nonzero(as_tuple=True), torch.where(meant[:, None], old[donors], old))
        if not bool(single.any()):
            return new
        return self._by_mean(layer, new, experts, torch.zeros_like(rows).masked_scatter(rows, single))

    def shared(self, layer: int) -> Hook:
        """For the shared experts of a layer."""

        def replaced(outputs: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            where = positions(self.model, self.selection, outputs)
            if self.how == "zero":
                stand_in = torch.zeros_like(outputs)
            elif self.how == "mean":
                assert self.means is not None
                stand_in = self.means.shared_of(layer).to(outputs).expand_as(outputs)
            else:
                stand_in = self._shared_elsewhere(layer, outputs)
            return stand_in if where is None else torch.where(where[..., None], stand_in, outputs)

        return names.mlp(names.SHARED_OUT, layer), replaced

    def _shared_elsewhere(
        self, layer: int, outputs: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        this_pass(self.model, outputs, "how='resample'")
        real = real_tokens(self.model, outputs)
        group = torch.zeros(int(real.sum()), dtype=torch.long, device=real.device)
        donors, alone = derangement(group, self.seed, layer)
        stand_in = outputs[real][donors]
        if bool(alone.any()):
            if self.means is None:
                raise InputError(
                    f"the shared experts of layer {layer} have one token in this batch: there is no other output to "
                    "take. Pass a larger batch, or fallback='mean' with a reference"
                )
            stand_in = self.means.shared_of(layer).to(outputs).expand_as(stand_in)
        return outputs.index_put(real.nonzero(as_tuple=True), stand_in)


def derangement(
    groups: Int[Tensor, " rows"], seed: int, layer: int = 0
) -> tuple[Int[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """For every row another row of the same group: a random cycle through each group, and which rows are alone.

    No row of a group of two or more is given itself; each is given to exactly one.
    """
    generator = torch.Generator().manual_seed((seed * 1009 + layer) % 2**63)
    shuffled = torch.randperm(len(groups), generator=generator).to(groups.device)
    order = shuffled[groups[shuffled].argsort(stable=True)]
    _, inverse, counts = groups[order].unique_consecutive(return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    row = torch.arange(len(groups), device=groups.device)
    following = torch.where(row + 1 < (starts + counts)[inverse], row + 1, starts[inverse])
    donors = torch.empty_like(order)
    donors[order] = order[following]
    return donors, donors == row
