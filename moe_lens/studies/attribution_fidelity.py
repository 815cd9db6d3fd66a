"""The study `attribution-fidelity`: do cheap attributions of the loss to experts predict knock-outs?"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.data import TokenBatch
from moe_lens.errors import InputError
from moe_lens.interventions import Loss, expert_attribution
from moe_lens.interventions.attribution import Method
from moe_lens.interventions.attribution_gradients import Slots
from moe_lens.interventions.attribution_knockout import Knockouts
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.stats import Result
from moe_lens.studies.attribution_effects import MEASURES, EffectResult, EffectStats, pooled
from moe_lens.studies.forward_passes import input_device, predicted
from moe_lens.studies.frames import by_domain
from moe_lens.studies.study import Gathered, Study


@dataclass(frozen=True)
class AttributionFidelity(Study):
    """Direct, gradient and integrated attribution, frequency and norm against exact knock-outs of every expert."""

    steps: int = 8
    """Of integrated gradients."""

    name: ClassVar[str] = "attribution-fidelity"
    passes: ClassVar[tuple[str, ...]] = ("effects",)

    def check(self, model: Any) -> None:  # noqa: ARG002
        """Refuse a number of steps that is none."""
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}; expected at least 1")

    def begin(self, model: Any, name: str) -> Gathered:  # noqa: ARG002
        """Empty sums."""
        return {"effects": EffectStats(model.moe_layers, model.n_experts)}

    def step(self, model: Any, name: str, batch: TokenBatch, into: Gathered, prepared: Any) -> None:  # noqa: ARG002
        """Attribute a batch's loss to all experts, and take each of them out."""
        if predicted(batch).any():
            into["effects"].update(*effects(model, batch, self.steps), batch.sources)

    def results(self, earlier: Mapping[str, Gathered]) -> dict[str, Result]:
        """The sums by source."""
        return {"effects": earlier["effects"]["effects"].result()}

    def tables(
        self,
        model: Mapping[str, Any],  # noqa: ARG002
        results: Mapping[str, Mapping[str, Result]],
    ) -> dict[str, pd.DataFrame]:
        """`experts`, `fidelity`, `rerouting`; with more than one domain, fidelity of all together, too (`all`)."""
        of = {domain: _effects(found["effects"]) for domain, found in results.items()}
        together = {**of, "all": pooled(list(of.values()))} if len(of) > 1 and "all" not in of else of
        return {
            "experts": by_domain({domain: result.to_frame() for domain, result in of.items()}),
            "fidelity": by_domain({domain: result.fidelity() for domain, result in together.items()}),
            "rerouting": by_domain({domain: result.rerouting() for domain, result in of.items()}),
        }


def effects(
    model: Any, batch: TokenBatch, steps: int
) -> tuple[Float[Tensor, "batch measure layer n_experts"], Tensor, Tensor]:
    """All of `MEASURES` for each text of a batch, how many tokens chose each expert, and how many were predicted.

    Measures of the loss are sums over the text's tokens, in nats that the expert saves.
    """
    device = input_device(model)
    tokens, mask = batch.tokens.to(device), batch.mask.to(device)
    metric, attention_mask = Loss(tokens, mask, batch.counted), mask.long()
    reads = metric.reads(*tokens.shape).cpu()
    found: dict[str, Tensor] = {}
    methods: tuple[Method, ...] = ("direct", "gradient", "integrated")
    for method in methods:
        taken = steps if method == "integrated" else None
        with warnings.catch_warnings(action="ignore"):  # how far each falls short is what is measured here
            attribution = expert_attribution(
                model, tokens, metric, method=method, routing="frozen", steps=taken, attention_mask=attention_mask
            )
        found[method] = -attribution.values.sum(-1) * reads.sum()
    hooks = Slots.hooks(model.moe_layers, weights=False)
    run = CleanRun.of(model, tokens, keep=hooks, attention_mask=attention_mask)
    slots = Slots.of(run.cache, model.moe_layers, None)
    chosen = mask[None, :, :, None] & slots.computed.to(mask.device)
    parts = slots.contributions.values()
    norms = torch.stack([torch.linalg.vector_norm(part, dim=-1, dtype=torch.float64).cpu() for part in parts])
    norm, count = slots.by_unit(norms, chosen, "expert", model.n_experts)
    found["norm"], found["frequency"] = norm.sum(-1), count.sum(-1)
    knockouts = Knockouts(model, run, slots, chosen, "expert")
    found["knockout"] = -knockouts.by_item(metric, "free")
    found["knockout_frozen"] = -knockouts.by_item(metric, "frozen")
    found["direct_knockout"] = -knockouts.by_item(metric, "free", direct=True)
    stacked = torch.stack([found[name].double() for name in MEASURES]).movedim(-1, 0)
    return stacked, count.sum(-1).movedim(-1, 0), reads.sum(-1)


def _effects(result: Result) -> EffectResult:
    assert isinstance(result, EffectResult)
    return result
