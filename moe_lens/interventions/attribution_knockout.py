"""Exact knock-out of every expert, rank or single slot: one variant of the clean run each, made by the cheap sweep."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens import names
from moe_lens.interventions.attribution_gradients import Slots
from moe_lens.interventions.attribution_result import Unit
from moe_lens.interventions.clean_run import CleanRun, Variant
from moe_lens.interventions.metrics import Metric, TokenMetric, evaluate
from moe_lens.interventions.sweep import RoutingMode, sweep, token_sweep


@dataclass(frozen=True, eq=False)
class Knockout:
    """An expert or rank of a layer whose contribution is taken out, everywhere or at one position."""

    layer: int
    unit: int
    at: tuple[int, int] | None
    """(item, position), or None for all of them."""
    place: tuple[int, ...]
    """Of its value in the result."""


@dataclass(frozen=True, eq=False)
class Knockouts:
    """All knock-outs of a run."""

    model: Any
    run: CleanRun
    slots: Slots
    chosen: Bool[Tensor, "layer batch pos top_k"]
    """The slots that may be taken out."""
    unit: Unit
    """Whether experts or ranks are taken out."""

    @property
    def n_units(self) -> int:
        """Experts or ranks of a layer."""
        return self.model.n_experts if self.unit == "expert" else self.chosen.shape[-1]

    def all(self, per_position: bool) -> Iterator[Knockout]:
        """Those that change anything: for each expert or rank, or for each of its positions."""
        for row, (layer, indices) in enumerate(self.slots.indices.items()):
            where = self.chosen[row].nonzero()
            units = (indices[tuple(where.T)] if self.unit == "expert" else where[:, 2]).tolist()
            for unit in sorted(set(units)) if not per_position else ():
                yield Knockout(layer, unit, None, (row, unit))
            for unit, (batch, pos, _) in zip(units, where.tolist(), strict=True) if per_position else ():
                yield Knockout(layer, unit, (batch, pos), (row, unit, batch, pos))

    def mask(self, knockout: Knockout) -> Bool[Tensor, "batch pos top_k"]:
        """The slots that are taken out."""
        row = knockout.place[0]
        indices = self.slots.indices[knockout.layer]
        units = indices if self.unit == "expert" else torch.arange(self.chosen.shape[-1], device=indices.device)
        mask = self.chosen[row] & (units == knockout.unit)
        if knockout.at is None:
            return mask
        alone = torch.zeros_like(mask)
        alone[knockout.at] = mask[knockout.at]
        return alone

    def variant(self, knockout: Knockout, *, direct: bool) -> Variant:
        """The run without what is taken out.

        Args:
            knockout: what is taken out.
            direct: take it out of the stream that leaves the last block, which no layer reads, not of its own layer.
        """
        parts, taken = self.slots.contributions[knockout.layer], self.mask(knockout)
        batch, pos, slot = taken.nonzero().unbind(-1)  # one slot of a token at most

        def delta(items: Int[Tensor, " items"]) -> Float[Tensor, "items pos d_model"]:
            whole = parts.new_zeros(self.run.batch, self.run.pos, parts.shape[-1])
            whole[batch, pos] = -parts[batch, pos, slot]
            return whole[items]

        changed = taken.any(-1)
        if not direct:
            return self.run.adding(knockout.layer, names.EXPERT_WEIGHTED, delta, changed)
        last = self.model.cfg.n_layers
        return Variant(last, lambda items: self.run.stream(last, items) + delta(items), changed=changed)

    def measure(
        self, metric: Metric, routing: RoutingMode, per_position: bool, *, direct: bool
    ) -> tuple[Float[Tensor, "layer unit *where"], Int[Tensor, "layer unit *where"]]:
        """Metric of the run minus that without each; and how many slots each takes out. On the CPU.

        Args:
            metric: the metric.
            routing: whether layers behind choose again.
            per_position: whether each position is taken out by itself.
            direct: whether what is taken out is missing from the last stream only.
        """
        found = list(self.all(per_position))
        variants = [self.variant(knockout, direct=direct) for knockout in found]
        clean = evaluate(metric, self.run.logits).double().cpu()
        where = (self.run.batch, self.run.pos) if per_position else ()
        values = torch.zeros(len(self.chosen), self.n_units, *where, dtype=torch.float64)
        for knockout, without in zip(
            found, sweep(self.model, self.run, variants, metric, routing=routing), strict=True
        ):
            values[knockout.place] = clean - without
        _, count = self.slots.by_unit(torch.zeros(self.chosen.shape), self.chosen, self.unit, self.model.n_experts)
        return values, count if per_position else count.flatten(2).sum(-1)

    def by_item(
        self, metric: TokenMetric, routing: RoutingMode, *, direct: bool = False
    ) -> Float[Tensor, "layer unit batch"]:
        """Sum over what the metric reads of each item: its value in the run minus that without each expert or rank."""
        found = list(self.all(per_position=False))
        variants = [self.variant(knockout, direct=direct) for knockout in found]
        without = token_sweep(self.model, self.run, variants, metric, routing=routing)
        batch, pos = metric.reads(self.run.batch, self.run.pos).nonzero().to(self.run.logits.device).unbind(-1)
        clean = metric.values(self.run.logits[batch, pos], batch, pos).double().cpu()
        values = torch.zeros(len(self.chosen), self.n_units, self.run.batch, dtype=torch.float64)
        for knockout, difference in zip(found, clean - without, strict=True):
            values[knockout.place].index_add_(0, batch.cpu(), difference)
        return values
