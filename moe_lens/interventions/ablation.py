"""Ablation: an expert's contribution removed, replaced, or re-routed; and only the top experts kept."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from moe_lens import names
from moe_lens.checked import Natural, Seed
from moe_lens.errors import InputError
from moe_lens.interventions.ablation_values import Replacement
from moe_lens.interventions.expert_means import Reference, means_for
from moe_lens.interventions.intervention import (
    Hook,
    Intervention,
    Recipe,
    computed,
    first_token,
    real_tokens,
    this_pass,
)
from moe_lens.interventions.rerouting import forbid
from moe_lens.protocols import Hooked, HookedModel
from moe_lens.selection import Experts, Selection, Where

How = Literal["zero", "mean", "resample", "reroute"]
By = Literal["weight", "random", "last"]
Fallback = Literal["error", "mean"]
Chooser = Callable[[Tensor], Bool[Tensor, "batch pos top_k"]]
"""The slots to take out, of routing weights [batch, pos, top_k] as outer interventions left them."""


def ablate(
    model: Hooked,
    experts: Experts | Selection | None = None,
    *,
    ranks: Iterable[int] | None = None,
    layers: Iterable[int] | None = None,
    shared: bool = False,
    how: How = "zero",
    where: Where | None = None,
    reference: Reference | None = None,
    renormalize: bool = False,
    seed: Seed | None = None,
    fallback: Fallback | None = None,
) -> Intervention:
    """Ablate experts: `with model.ablate({3: [17, 4]}): logits = model(tokens)`.

    Ways to ablate:

    - `"zero"`: the expert is not computed and adds nothing; the other experts' weights stay.
    - `"mean"`: the expert's output is replaced by its mean output over a reference; its routing weight stays.
    - `"resample"`: the expert's output is replaced by its output at another token of the batch: a random cycle
      through the expert's tokens, so that none keeps its own and each output is used once.
    - `"reroute"`: the expert cannot be selected; the next expert by the family's own rule takes the slot, with its
      own affinity and the family's normalisation. Affinities do not change.

    Args:
        model: the model.
        experts: `{layer: [expert, …]}` or `[(layer, expert), …]`, or a `Selection`; all if neither experts nor
            ranks are given.
        ranks: instead of experts, ranks by routing weight; 0 is the largest weight.
        layers: layers of `ranks`, of `shared`, or of all experts; all layers with experts if not given.
        shared: ablate the shared experts too; only these, if neither experts nor ranks are given.
        how: one of the above.
        where: absolute positions (padding not counted, the key-value cache's tokens counted), negative positions from
            the end of each forward pass, a mask [batch, pos], or a function of token ids; all tokens if not given.
        reference: for `"mean"`: a cache, a text, texts or tokens, `ExpertMeans`, or a file of saved `ExpertMeans`: a
            `Path`, or a `str` that names a file or ends in `.safetensors`.
        renormalize: for `"zero"`: multiply the remaining routed weights by (sum of all) / (sum of the remaining).
        seed: random seed of `"resample"`; 0 if not given.
        fallback: for `"resample"`, what to do for an expert with a single token: raise an error (`"error"`, the
            default), or use its mean over the reference (`"mean"`).

    Raises:
        InputError: layers, experts or ranks that the model does not have, or arguments that contradict one another;
            while it is active: a mask of another shape, an expert that no token of the reference selected, nothing to
            resample from, nothing left to rescale, too few experts left to select from.
    """
    if isinstance(experts, Selection):
        if any(value is not None for value in (ranks, layers, where)) or shared:
            raise InputError("got a Selection and ranks, layers, shared or where; the Selection says them all")
        selection = experts.check(model)
    else:
        selection = Selection(experts=experts, ranks=ranks, layers=layers, shared=shared, where=where).check(model)
    if how not in get_args(How):
        raise InputError(f"how is {how!r}; expected one of {get_args(How)}")
    if fallback not in (None, *get_args(Fallback)):
        raise InputError(f"fallback is {fallback!r}; expected one of {get_args(Fallback)}")
    for name, value in (("seed", seed), ("fallback", fallback)):
        if value is not None and how != "resample":
            raise InputError(f"{name}={value!r} with how={how!r}: only how='resample' draws tokens; leave it out")
    if renormalize and (how != "zero" or not selection.routed):
        raise InputError(
            f"renormalize=True with how={how!r} and {'routed' if selection.routed else 'shared'} experts: weights are "
            "rescaled where routed experts are removed, how='zero'; otherwise every weight is still in use"
        )
    if how == "reroute" and selection.shared:
        raise InputError("how='reroute' is about routed experts: shared ones are not selected. Leave shared out")
    means = None
    if how == "mean" or (how == "resample" and fallback == "mean"):
        if reference is None:
            raise InputError(f"how={how!r} replaces by means: pass reference=, a cache, texts or ExpertMeans")
        means = means_for(model, reference, selection)
    elif reference is not None:
        raise InputError(f"how={how!r} uses no reference; leave it out, or say how='mean' or fallback='mean'")
    replacement = Replacement(model, selection, "zero" if how == "reroute" else how, means, seed or 0)
    hooks: list[Hook] = []
    for layer in selection.layers_of(model):
        if selection.routed and how == "zero":
            hooks += _leave_out(model, layer, partial(_meant, model, selection, layer), renormalize)
        elif selection.routed:
            hooks.append(_reroute(model, selection, layer) if how == "reroute" else replacement.routed(layer))
        if selection.shared and model.has_shared(layer):
            hooks.append(replacement.shared(layer))
    options = [how] + ["renormalised"] * renormalize + [f"seed {seed or 0}"] * (how == "resample")
    about = {"how": how, "reference": means, "renormalize": renormalize, "seed": seed, "fallback": fallback}
    recipe = Recipe(ablate, {"experts": selection, **about})
    return Intervention(model, f"ablate {selection}, {', '.join(options)}", tuple(hooks), recipe)


def _meant(
    model: HookedModel,
    selection: Selection,
    layer: int,
    weights: Tensor,  # noqa: ARG001
) -> Bool[Tensor, "batch pos top_k"]:
    return computed(model, layer, selection)[1]


def _reroute(model: HookedModel, selection: Selection, layer: int) -> Hook:
    left = model.n_experts - len((selection.by_layer or {}).get(layer, ()))
    if left < model.top_k:
        raise InputError(f"layer {layer}: {left} experts would be left; a token needs {model.top_k}")
    return forbid(model, selection, layer)


def _leave_out(model: HookedModel, layer: int, chosen: Chooser, renormalize: bool) -> list[Hook]:
    """Hooks which take slots out: their weight is 0, and they are not computed."""
    out = torch.zeros(0, dtype=torch.bool)

    def weigh(weights: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        nonlocal out
        out = chosen(weights)
        kept = weights.masked_fill(out, 0)
        if not renormalize:
            return kept
        whole, rest = weights.sum(-1, keepdim=True), kept.sum(-1, keepdim=True)
        lost = (out.any(-1) & (rest.squeeze(-1) == 0)) & real_tokens(model, out)
        if lost.any():
            raise InputError(
                f"renormalize=True is undefined in layer {layer} at {first_token(lost)}: no weight is left to rescale"
            )
        return kept * torch.where(out.any(-1, keepdim=True), whole / rest.masked_fill(rest == 0, 1), 1)

    def keep(kept: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return kept & ~out

    return [(names.mlp(names.ROUTING_WEIGHTS, layer), weigh), (names.mlp(names.EXPERT_KEPT, layer), keep)]


# --- the top experts alone ---


def keep_top(
    model: Hooked,
    k: Natural,
    *,
    by: By = "weight",
    layers: Iterable[int] | None = None,
    renormalize: bool = False,
    seed: Seed | None = None,
) -> Intervention:
    """Keep k of every token's active experts; the others are not computed. Shared experts stay.

    The axis of slots keeps its length: hooks show zeros in slots that are not kept.

    Args:
        model: the model.
        k: number of experts to keep, 0 to `top_k`.
        by: which to keep: those with the largest weights (`"weight"`), with the smallest (`"last"`), or random ones,
            drawn for every token (`"random"`): by its row and position, so with or without a key-value cache the same.
        layers: layers in which experts are dropped; all layers with experts if not given.
        renormalize: multiply the kept weights by (sum of all) / (sum of the kept).
        seed: random seed of `"random"`; 0 if not given.

    Raises:
        InputError: k out of range, k = 0 with `renormalize`, a seed where nothing is drawn, no such layer or a dense
            one.
    """
    if by not in get_args(By):
        raise InputError(f"by is {by!r}; expected one of {get_args(By)}")
    if k > model.top_k:
        raise InputError(f"k is {k!r}; the model has {model.top_k} active experts: expected 0 to {model.top_k}")
    if seed is not None and by != "random":
        raise InputError(f"seed={seed} with by={by!r}: only by='random' draws; leave it out")
    if k == 0 and renormalize:
        raise InputError("renormalize=True with k=0: there is no weight left to rescale")
    selection = Selection(layers=layers).check(model)
    hooks: list[Hook] = []
    for layer in selection.layers_of(model):
        hooks += _leave_out(model, layer, _others(model, layer, k, by, seed or 0), renormalize)
    options = [f"by {by}"] + ["renormalised"] * renormalize + [f"seed {seed or 0}"] * (by == "random")
    where = "" if layers is None else f" of {selection}"
    recipe = Recipe(keep_top, {"k": k, "by": by, "layers": selection.layers, "renormalize": renormalize, "seed": seed})
    return Intervention(model, f"keep_top {k}{where}, {', '.join(options)}", tuple(hooks), recipe)


def _others(model: HookedModel, layer: int, k: int, by: By, seed: int) -> Chooser:
    """The slots that are not kept."""

    def others(weights: Tensor) -> Bool[Tensor, "batch pos top_k"]:
        experts = model.experts_in_slots(layer)
        # not the slots' own order: an outer intervention may have changed the weights, or the experts
        order = weights.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        if by == "random":
            offset = this_pass(model, experts, "by='random'").offset
            generator = torch.Generator().manual_seed((seed * 1009 + layer) % 2**63)
            batch, pos, slots = experts.shape
            # position by position from the first one on, so that a pass that continues a cache draws what is due there
            drawn = torch.rand((offset + pos, batch, slots), generator=generator)[offset:].transpose(0, 1)
            order = drawn.argsort(-1).to(experts.device)
        elif by == "last":
            order = -order
        empty = (experts < 0) | (weights == 0)  # behind a token's number of experts, or ablated: nothing to keep
        return order.masked_fill(empty, order.shape[-1]).argsort(-1).argsort(-1) >= k

    return others
