"""Attributions made of gradients: direct, gradient × activation, integrated.

All three are inner products. A slot adds c = g E(x) − baseline to the residual stream, and is attributed Γ · c, where Γ
is a gradient of the metric with respect to the stream at that layer and position: through the frozen final norm alone
(direct), through all that follows (gradient), or that averaged over the way from the baseline to the run (integrated).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens import names
from moe_lens.errors import InputError
from moe_lens.interventions.attribution_result import Unit
from moe_lens.interventions.clean_run import CleanRun, check_even_slots, check_whole_runs
from moe_lens.interventions.expert_means import ExpertMeans
from moe_lens.interventions.metrics import KLDivergence, Metric, TokenMetric, among, differentiable, evaluate, finite
from moe_lens.model.cache.moe_cache import MoECache
from moe_lens.model.random_numbers import nothing_drawn
from moe_lens.routing import output_factors


@dataclass(frozen=True, eq=False)
class Slots:
    """What the chosen experts of a run add to the residual stream."""

    indices: Mapping[int, Int[Tensor, "batch pos top_k"]]
    """Which experts they are, by layer."""
    contributions: Mapping[int, Float[Tensor, "batch pos top_k d_model"]]
    """g E(x) − baseline, by layer."""
    kept: Mapping[int, Bool[Tensor, "batch pos top_k"]]
    """Whose expert was computed, and not left out by an intervention, by layer."""

    @property
    def computed(self) -> Bool[Tensor, "layer batch pos top_k"]:
        """`kept` of all layers, on the CPU."""
        return torch.stack([kept.cpu() for kept in self.kept.values()])

    @staticmethod
    def hooks(layers: Sequence[int], weights: bool) -> list[str]:
        """What a cache must hold; routing weights if there is a baseline that they multiply."""
        wanted = [names.EXPERT_INDICES, names.EXPERT_KEPT, names.EXPERT_WEIGHTED]
        wanted += [names.ROUTING_WEIGHTS] if weights else []
        return [names.mlp(name, layer) for layer in layers for name in wanted]

    @classmethod
    def of(cls, cache: MoECache, layers: Sequence[int], means: ExpertMeans | None) -> "Slots":
        """Take them from a cache.

        Args:
            cache: of the run.
            layers: which layers.
            means: outputs that stand at the baseline for each expert's own; none for a baseline of zero.

        Raises:
            InputError: tokens have different numbers of experts.
        """
        indices = {layer: cache[names.mlp(names.EXPERT_INDICES, layer)] for layer in layers}
        check_even_slots(indices.values(), "attribution")
        parts = {layer: cache[names.mlp(names.EXPERT_WEIGHTED, layer)] for layer in layers}
        for layer in layers if means is not None else ():
            assert means is not None
            weights = output_factors(cache[names.mlp(names.ROUTING_WEIGHTS, layer)], cache.model.family)
            stand_in = means.of(layer).nan_to_num().to(weights)[indices[layer]]
            parts[layer] = parts[layer] - (weights[..., None] * stand_in).to(parts[layer])
        return cls(indices, parts, {layer: cache[names.mlp(names.EXPERT_KEPT, layer)] for layer in layers})

    def products(self, gradients: Mapping[int, Tensor]) -> Float[Tensor, "layer batch pos top_k"]:
        """Γ · c of every slot, on the CPU, in float32 at least."""
        found = []
        for layer, parts in self.contributions.items():
            wide = torch.promote_types(parts.dtype, torch.float32)
            value = einsum(gradients[layer].to(wide), parts.to(wide), "b p d, b p k d -> b p k")
            found.append(value.cpu())
        return torch.stack(found)

    def removed(self, layer: int, chosen: Bool[Tensor, "batch pos top_k"]) -> Float[Tensor, "batch pos d_model"]:
        """The sum of a layer's contributions over the chosen slots."""
        parts = self.contributions[layer]
        return einsum(parts, chosen.to(parts), "b p k d, b p k -> b p d")

    def by_unit(
        self,
        values: Float[Tensor, "layer batch pos top_k"],
        chosen: Bool[Tensor, "layer batch pos top_k"],
        unit: Unit,
        n_experts: int,
    ) -> tuple[Float[Tensor, "layer unit batch pos"], Int[Tensor, "layer unit batch pos"]]:
        """Values of the chosen slots, and how many slots there are, by expert or rank; on the CPU."""
        values, count = (values * chosen.to(values)).movedim(-1, 1), chosen.long().cpu().movedim(-1, 1)
        if unit == "rank":
            return values.contiguous(), count.contiguous()
        experts = torch.stack(list(self.indices.values())).cpu().movedim(-1, 1)
        shape = (len(values), n_experts, *values.shape[2:])
        return values.new_zeros(shape).scatter(1, experts, values), count.new_zeros(shape).scatter(1, experts, count)


def run_with_gradients(
    model: Any, input: Any, metric: Metric, layers: Sequence[int], means: ExpertMeans | None, **kwargs: Any
) -> tuple[float, MoECache, Slots, dict[int, Tensor]]:
    """One forward and one backward pass: the metric, the cache, its slots, and Γ of every layer.

    The gradient is taken at `hook_routed_out`, to which each slot is added: it is that of every slot.

    Raises:
        InputError: the metric is not a finite scalar or has no gradient, or dropout or jitter is on.
    """
    check_whole_runs(kwargs)
    nodes: dict[int, Tensor] = {}

    def branch(layer: int) -> Any:
        def attach(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            # Where no parameter requires a gradient, the first layer's output is the root of the graph.
            nodes[layer] = value if value.requires_grad else value.detach().requires_grad_()
            return nodes[layer].view_as(value)

        return attach

    hooks = [(names.mlp(names.ROUTED_OUT, layer), branch(layer)) for layer in layers]
    wanted = Slots.hooks(layers, means is not None)
    with torch.enable_grad(), nothing_drawn(model), model.hooks(fwd_hooks=hooks):
        logits, cache = model.run_with_cache(input, names_filter=wanted, use_cache=False, **kwargs)
        value = evaluate(among(metric, cache.mask), logits)
        found = torch.autograd.grad(_sloping(value, metric), [nodes[layer] for layer in layers])
    return value.item(), cache, Slots.of(cache, layers, means), dict(zip(layers, found, strict=True))


def direct_gradient(model: Any, run: CleanRun, metric: Metric) -> Float[Tensor, "batch pos d_model"]:
    """Γ of all layers at once: d metric / d (stream leaving the last block), the final norm's scale frozen.

    Raises:
        InputError: the metric is not a finite scalar or has no gradient.
    """
    resid = run.resid[-1].detach().requires_grad_()
    freeze = (names.FINAL_SCALE, lambda scale, hook: scale.detach())  # noqa: ARG005
    with torch.enable_grad(), model.hooks(fwd_hooks=[freeze]):
        return torch.autograd.grad(_sloping(_read(run, resid, metric), metric), resid)[0]


def integrated_gradient(
    model: Any, run: CleanRun, metric: Metric, layer: int, removed: Tensor, *, steps: int, frozen: bool
) -> tuple[Float[Tensor, "batch pos d_model"], float]:
    """Mean of Γ on the straight way from the layer's baseline to the run; and the metric at the baseline.

    The mean over α in [0, 1] of Γ where (1 − α) · removed is subtracted from the experts' sum, by Gauss–Legendre
    quadrature (integrated gradients: Sundararajan et al. 2017, arXiv 1703.01365).

    Args:
        model: a `HookedMoE`.
        run: the clean run.
        metric: the metric.
        layer: the layer whose experts are attributed.
        removed: [batch, pos, d_model], the sum of their contributions.
        steps: how many points on the way.
        frozen: whether the layers behind keep the run's experts.

    Raises:
        InputError: the metric is not a finite scalar or has no gradient.
    """
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    kept = {at: run.indices(at) for at in model.moe_layers if at > layer and frozen}
    freeze = [
        (names.mlp(names.EXPERT_INDICES, at), lambda value, hook, chosen=chosen: chosen)  # noqa: ARG005
        for at, chosen in kept.items()
    ]
    items = torch.arange(run.batch, device=run.logits.device)
    everywhere = torch.ones(run.batch, run.pos, dtype=torch.bool, device=run.logits.device)

    def at(alpha: float) -> tuple[Tensor, Tensor]:
        added = ((alpha - 1) * removed).requires_grad_(torch.is_grad_enabled())
        start = run.adding(layer, names.EXPERT_WEIGHTED, lambda items: added, everywhere)  # noqa: ARG005
        resid = run.resid[start.layer] if start.resid is None else start.resid(items)
        with model.hooks(fwd_hooks=list(start.hooks)):
            for block in range(start.layer, model.cfg.n_layers):
                resid = run.replay.block(block, resid, items)
            return added, _read(run, resid, metric)

    mean = torch.zeros_like(removed, dtype=torch.promote_types(removed.dtype, torch.float32))
    with model.hooks(fwd_hooks=freeze):
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            with torch.enable_grad():
                point, value = at((node + 1) / 2)
                mean += weight / 2 * torch.autograd.grad(differentiable(value, metric), point)[0].to(mean)
        with torch.no_grad():
            return mean, at(0.0)[1].item()


def _read(run: CleanRun, resid: Float[Tensor, "batch pos d_model"], metric: Metric) -> Float[Tensor, ""]:
    """The metric of a residual stream leaving the last block; logits are made only where it is read."""
    if isinstance(metric, TokenMetric):
        batch, pos = metric.reads(run.batch, run.pos).nonzero().to(resid.device).unbind(-1)
        value = metric.values(run.replay.logits(resid[batch, pos]), batch, pos).mean()
    else:
        value = metric(run.replay.logits(resid.flatten(0, 1)).unflatten(0, resid.shape[:2]))
    return finite(value, metric)


def _sloping(value: Float[Tensor, ""], metric: Metric) -> Float[Tensor, ""]:
    """The value, if its slope at the run says anything."""
    if isinstance(metric, KLDivergence) and value.item() < 1e-5:
        raise InputError(
            "KLDivergence from the run itself has no slope there, so gradients say nothing; expected another metric, "
            'or method="integrated" or "knockout"'
        )
    return differentiable(value, metric)
