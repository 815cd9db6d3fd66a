"""Attribution: how much of a metric each expert accounts for."""

import warnings
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from moe_lens.checked import AnyModel, Positive
from moe_lens.errors import InputError, UnsupportedModelError
from moe_lens.interventions.attribution_gradients import (
    Slots,
    direct_gradient,
    integrated_gradient,
    run_with_gradients,
)
from moe_lens.interventions.attribution_knockout import Knockouts
from moe_lens.interventions.attribution_result import ExpertAttribution, Unit
from moe_lens.interventions.clean_run import CleanRun
from moe_lens.interventions.expert_means import ExpertMeans, Reference, means_for
from moe_lens.interventions.metrics import Metric, among, describe, evaluate
from moe_lens.interventions.sweep import RoutingMode
from moe_lens.model.cache.moe_cache import MoECache
from moe_lens.selection import Selection, Step

Method = Literal["direct", "gradient", "integrated", "knockout", "direct_knockout"]


def expert_attribution(
    model: AnyModel,
    input: Any,
    metric: Metric,
    *,
    method: Method = "gradient",
    routing: RoutingMode = "free",
    unit: Unit = "expert",
    baseline: Literal["zero", "mean"] = "zero",
    reference: Reference | None = None,
    selection: Selection | None = None,
    per_position: bool | None = None,
    steps: Positive | None = None,
    **kwargs: Any,
) -> ExpertAttribution:
    """Attribute a metric to every expert (or rank) of every layer: metric(run) − metric(run without it).

    A slot's contribution to the residual stream is g E(x). "Without it" the contribution is 0, or g times the expert's
    mean output; the layer's selection and weights do not change.

    Methods, with c the contribution minus its baseline:

    - `"direct"`: ∂metric/∂logits · (c ⊙ gain / scale) W_U: what c adds directly to the logits, with the final norm's
      scale frozen. Exact for metrics that are linear in the logits (`Logit`, `LogitDifference`), where it sums, with
      all other components of the stream and the embedding, to the metric; a first-order estimate for others, and where
      a family bounds its logits: then it is `cache.logit_attrs` times the slope of the bound.
    - `"gradient"`: ∂metric/∂c · c, one forward and one backward pass for all experts of all layers.
    - `"integrated"`: the mean gradient while all selected contributions of a layer grow together from their baselines,
      times c, by `steps` points of Gauss–Legendre quadrature for each layer (arXiv 1703.01365). With frozen routing the
      values of a layer sum to `difference`, the metric's change when they are all at their baselines; far from it where
      a norm follows the experts' sum (FlexOlmo, Gemma 4), whose changes are all close to the baselines. A warning
      says so.
    - `"knockout"`: exact; a run without each expert. Values need not sum to anything: experts interact.
    - `"direct_knockout"`: exact removal from the last residual stream only, where no later layer reads it; the norm's
      scale changes accordingly. `"direct"` approximates it.

    Selection is discrete: with `"free"` routing a change in one layer can make later layers select other experts.
    `"frozen"` keeps the run's experts in all later layers; their weights still follow what the routers read, by the
    family's own rule. Infinitesimal changes re-route nothing, so the two agree for `"direct"`, `"gradient"` and
    `"direct_knockout"`. `free.rerouting(frozen)` is their difference.

    Args:
        model: a `HookedMoE`.
        input: what `forward` takes: a text, texts, tokens, …
        metric: from logits [batch, pos, d_vocab] to a scalar; see `moe_lens.interventions.metrics`.
        method: one of the above.
        routing: whether later layers select experts again.
        unit: a value per expert, or per rank by routing weight.
        baseline: what contributions are compared with.
        reference: what means are taken over, for `baseline="mean"`; as for `model.ablate(…, how="mean")`.
        selection: layers, experts or ranks, and positions to attribute; everything if not given. Values and counts of
            experts or ranks that are left out are 0.
        per_position: a value for each position, instead of one for all positions (removed together). If not given,
            false for knock-outs, since true needs a run for each expert and position; true otherwise.
        steps: quadrature points of `"integrated"`; 16 if not given.
        kwargs: of `forward`: `attention_mask`, `prepend_bos`, `padding_side`.

    Raises:
        InputError: an unknown method or layer; a metric that is not a finite scalar, or has no gradient where one is
            needed; `baseline="mean"` without reference.
        UnsupportedModelError: a direct method, and a family in which experts do not add to the stream as they are.
    """
    for name, value, known in (("method", method, Method), ("routing", routing, RoutingMode), ("unit", unit, Unit)):
        if value not in get_args(known):
            raise InputError(f"{name} is {value!r}; expected one of {', '.join(map(repr, get_args(known)))}")
    if steps is not None and method != "integrated":
        raise InputError(f"steps={steps} with method={method!r}: only method='integrated' takes steps; leave it out")
    if torch.is_inference_mode_enabled() and method in ("direct", "gradient", "integrated"):
        raise InputError(f"method={method!r} needs gradients, which torch.inference_mode() forbids: leave it out")
    selection = (selection or Selection()).check(model)
    if selection.shared:
        raise InputError("the selection means shared experts; attributed are routed ones: leave shared out")
    layers = selection.layers_of(model)
    means, difference, held = _means(model, baseline, reference, selection), None, list[int]()
    about: dict[str, Any] = {"method": method, "routing": routing, "baseline": baseline, "unit": unit, "layers": layers}
    about["metric"] = describe(metric)
    if method == "gradient":
        clean, cache, slots, gradients = run_with_gradients(model, input, metric, layers, means, **kwargs)
        chosen = _chosen(selection, slots, cache, means)
    else:
        run = CleanRun.of(model, input, keep=Slots.hooks(layers, means is not None), **kwargs)
        metric = among(metric, run.cache.mask)
        clean, slots = evaluate(metric, run.logits).item(), Slots.of(run.cache, layers, means)
        chosen = _chosen(selection, slots, run.cache, means)
        if method in ("direct", "direct_knockout") and not run.direct.issuperset(layers):
            raise UnsupportedModelError(
                f"what the experts of layers {sorted(set(layers) - run.direct)} add is normed or scaled before it "
                f"reaches the residual stream: there is no direct path that {method!r} could follow"
            )
        if method in ("knockout", "direct_knockout"):
            knockouts = Knockouts(model, run, slots, chosen, unit)
            values, count = knockouts.measure(metric, routing, bool(per_position), direct=method == "direct_knockout")
            return ExpertAttribution(**about, clean=clean, values=values, count=count)
        if method == "direct":
            gradients = dict.fromkeys(layers, direct_gradient(model, run, metric))
        else:
            gradients, starts = {}, []
            for layer, which in zip(layers, chosen, strict=True):
                gradients[layer], start = integrated_gradient(
                    model,
                    run,
                    metric,
                    layer,
                    slots.removed(layer, which),
                    steps=steps or 16,
                    frozen=routing == "frozen",
                )
                starts.append(start)
            held = [layer for layer in layers if routing == "frozen" or layer not in run.direct]
            difference = clean - torch.tensor(starts, dtype=torch.float64)
    values, count = slots.by_unit(slots.products(gradients), chosen, unit, model.n_experts)
    if difference is not None:
        _warn_if_incomplete(dict(zip(layers, values.flatten(1).sum(-1).tolist(), strict=True)), difference, held)
    if per_position is False:
        values, count = values.flatten(2).sum(-1), count.flatten(2).sum(-1)
    return ExpertAttribution(**about, clean=clean, values=values, count=count, difference=difference)


def _warn_if_incomplete(sums: dict[int, float], difference: Tensor, held: list[int]) -> None:
    """Say it where integrated gradients do not sum to what they should, by a tenth of the greatest difference."""
    owed = dict(zip(sums, difference.tolist(), strict=True))
    bound = 0.1 * max(map(abs, owed.values()))
    off = [layer for layer in held if abs(sums[layer] - owed[layer]) > bound]
    if off:
        warnings.warn(
            f"integrated gradients of layers {off} sum to {', '.join(f'{sums[layer]:.3g}' for layer in off)}, and the "
            f"metric changes by {', '.join(f'{owed[layer]:.3g}' for layer in off)} (`difference`): take more steps; "
            "where a norm follows the experts' sum, or routing jumps on the way (PhiMoE, JetMoE), "
            'these do not help, and method="knockout" does',
            stacklevel=4,
        )


def _means(model: Any, baseline: str, reference: Reference | None, selection: Selection) -> ExpertMeans | None:
    """Mean outputs of experts, if they are the baseline."""
    if baseline not in ("zero", "mean") or (baseline == "mean") != (reference is not None):
        raise InputError(
            f"baseline is {baseline!r} and reference {type(reference).__name__}; "
            'expected "zero" without a reference, or "mean" with one'
        )
    return None if reference is None else means_for(model, reference, selection)


def _chosen(
    selection: Selection, slots: Slots, cache: MoECache, means: ExpertMeans | None
) -> Bool[Tensor, "layer batch pos top_k"]:
    """The slots that are attributed: those selected, and none at padding or left out."""
    batch, pos, _ = next(iter(slots.indices.values())).shape
    positions = selection.positions(Step(batch, pos, cache.tokens, cache.mask))
    chosen = {
        layer: selection.slots(layer, indices, positions) & slots.kept[layer]
        for layer, indices in slots.indices.items()
    }
    if means is not None:
        for layer, which in chosen.items():
            for expert in slots.indices[layer][which].unique().tolist():
                means.require(layer, expert)
    return torch.stack(list(chosen.values()))
