"""Ablation: an expert's contribution removed, replaced, or re-routed; and only the top experts kept."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens import names
from moe_lens.errors import InputError
from moe_lens.interventions.intervention import Hook, Intervention, computed, first_token, positions
from moe_lens.interventions.means import ExpertMeans
from moe_lens.interventions.selecting import forbid
from moe_lens.model.cache import MoECache
from moe_lens.protocols import HookedModel
from moe_lens.selection import Experts, Selection, Where

How = Literal["zero", "mean", "resample", "reroute"]
By = Literal["weight", "random", "last"]
Fallback = Literal["error", "mean"]
Reference = ExpertMeans | MoECache | Path | str | Sequence[str | Tensor] | Tensor
"""Means, a cache, the file of saved means, a text, texts, or tokens."""
Chooser = Callable[[], Bool[Tensor, "batch pos top_k"]]


def ablate(
    model: HookedModel,
    experts: Experts | Selection | None = None,
    *,
    ranks: Iterable[int] | None = None,
    layers: Iterable[int] | None = None,
    shared: bool = False,
    how: How = "zero",
    where: Where | None = None,
    reference: Reference | None = None,
    renormalize: bool = False,
    seed: int = 0,
    fallback: Fallback = "error",
) -> Intervention:
    """Take experts out, one way or another; see `HookedMoE.ablate`."""
    if isinstance(experts, Selection):
        if any(value is not None for value in (ranks, layers, where)) or shared:
            raise InputError("got a Selection and ranks, layers, shared or where; the Selection says them all")
        selection = experts.check(model)
    else:
        selection = Selection(experts=experts, ranks=ranks, layers=layers, shared=shared, where=where).check(model)
    if how not in get_args(How):
        raise InputError(f"how is {how!r}; expected one of {get_args(How)}")
    if fallback not in get_args(Fallback):
        raise InputError(f"fallback is {fallback!r}; expected one of {get_args(Fallback)}")
    if renormalize and (how != "zero" or not selection.routed):
        raise InputError(
            f"renormalize=True with how={how!r} and {'routed' if selection.routed else 'shared'} experts: weights are "
            "rescaled where routed experts are removed, how='zero'; otherwise every weight is still in use"
        )
    means = None
    if how == "mean" or (how == "resample" and fallback == "mean"):
        if reference is None:
            raise InputError(f"how={how!r} replaces by means: pass reference=, a cache, texts or ExpertMeans")
        means = means_for(model, reference, selection)
    elif reference is not None:
        raise InputError(f"how={how!r} uses no reference; leave it out, or say how='mean' or fallback='mean'")
    hooks: list[Hook] = []
    for layer in selection.layers_of(model):
        if selection.routed:
            hooks += _routed(model, selection, layer, how, means, renormalize, seed)
        if selection.shared and model.has_shared(layer):
            hooks.append((names.mlp(names.SHARED_OUT, layer), _shared(model, selection, layer, how, means, seed)))
    return Intervention(model, f"ablate {_describe(selection)}, {how}", tuple(hooks))


def _describe(selection: Selection) -> str:
    parts = []
    if selection.by_layer is not None:
        parts.append(f"experts { {at: list(of_layer) for at, of_layer in selection.by_layer.items()} }")
    elif selection.routed:
        parts.append("all ranks" if selection.ranks is None else f"ranks {list(selection.ranks)}")
    parts += ["shared"] if selection.shared else []
    parts += [] if selection.layers is None else [f"of layers {list(selection.layers)}"]
    return " + ".join(parts)


def means_for(model: HookedModel, reference: Reference, selection: Selection) -> ExpertMeans:
    """The reference's means, checked for every expert that is named; raises `InputError` where one is missing."""
    if isinstance(reference, Path):
        means = ExpertMeans.load(reference)
    elif isinstance(reference, MoECache):
        means = ExpertMeans.of_cache(reference)
    elif isinstance(reference, ExpertMeans):
        means = reference
    else:
        means = ExpertMeans.measure(model, reference, layers=selection.layers_of(model))
    sizes = model.n_experts, model.cfg.d_model
    if tuple(means.experts.shape[1:]) != sizes:
        came = tuple(means.experts.shape[1:])
        raise InputError(f"the reference has means of {came} (n_experts, d_model); the model has {sizes}")
    for layer in selection.layers_of(model):
        if selection.shared and model.has_shared(layer):
            means.shared_of(layer)
        for expert in (selection.by_layer or {}).get(layer, ()):
            check_mean(means, layer, expert)
        means.of(layer)
    return means


def check_mean(means: ExpertMeans, layer: int, expert: int) -> None:
    """Raise `InputError` if an expert has no mean."""
    if bool(means.of(layer)[expert].isnan().any()):
        raise InputError(
            f"expert {expert} of layer {layer} has no mean: no token of the reference was routed to it. Take a larger "
            "reference, or reference.filled(), where such experts have their layer's mean"
        )


# --- routed experts ---


def _routed(
    model: HookedModel,
    selection: Selection,
    layer: int,
    how: How,
    means: ExpertMeans | None,
    renormalize: bool,
    seed: int,
) -> list[Hook]:
    if how == "zero":
        return _leave_out(model, layer, lambda: computed(model, layer, selection)[1], renormalize)
    if how == "reroute":
        if (forbidden := len((selection.by_layer or {}).get(layer, ()))) > model.n_experts - model.top_k:
            left = model.n_experts - forbidden
            raise InputError(f"layer {layer}: {left} experts would be left; a token needs {model.top_k}")
        return [forbid(model, selection, layer)]
    replace = _by_mean if how == "mean" else _by_others

    def replaced(outputs: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        experts, which = computed(model, layer, selection)
        return replace(model, layer, outputs, experts, which, means, seed)

    return [(names.mlp(names.EXPERT_OUT, layer), replaced)]


def _leave_out(model: HookedModel, layer: int, chosen: Chooser, renormalize: bool) -> list[Hook]:
    """Hooks which take slots out: their weight is 0, and they are not computed."""

    def weigh(weights: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        out = chosen()
        kept = weights.masked_fill(out, 0)
        if not renormalize:
            return kept
        whole, rest = weights.sum(-1, keepdim=True), kept.sum(-1, keepdim=True)
        lost = (out.any(-1) & (rest.squeeze(-1) == 0)) & _real(model, out)
        if lost.any():
            raise InputError(
                f"renormalize=True is undefined in layer {layer} at {first_token(lost)}: no weight is left to rescale"
            )
        return kept * torch.where(out.any(-1, keepdim=True), whole / rest.masked_fill(rest == 0, 1), 1)

    def keep(kept: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return kept & ~chosen()

    return [(names.mlp(names.ROUTING_WEIGHTS, layer), weigh), (names.mlp(names.EXPERT_KEPT, layer), keep)]


def _real(model: HookedModel, like: Tensor) -> Bool[Tensor, "batch pos"]:
    """Tokens that are not padding."""
    step = model.step()
    if step is None or step.real is None or step.real.shape != like.shape[:2]:
        return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
    return step.real.to(like.device)


def _by_mean(
    model: HookedModel,  # noqa: ARG001
    layer: int,
    outputs: Float[Tensor, "batch pos top_k d_model"],
    experts: Int[Tensor, "batch pos top_k"],
    which: Bool[Tensor, "batch pos top_k"],
    means: ExpertMeans | None,
    seed: int,  # noqa: ARG001
) -> Tensor:
    assert means is not None
    stand_in = means.of(layer).to(outputs)[experts[which]]
    if bool(stand_in.isnan().any()):
        check_mean(means, layer, int(experts[which][stand_in.isnan().any(-1)][0]))
    return outputs.index_put(which.nonzero(as_tuple=True), stand_in)


def _by_others(
    model: HookedModel,
    layer: int,
    outputs: Float[Tensor, "batch pos top_k d_model"],
    experts: Int[Tensor, "batch pos top_k"],
    which: Bool[Tensor, "batch pos top_k"],
    means: ExpertMeans | None,
    seed: int,
) -> Tensor:
    """Outputs of the same expert at other tokens of the batch; padding takes no part."""
    rows = (experts >= 0) & _real(model, experts)[..., None]
    donors, alone = derangement(experts[rows], seed, layer)
    new = outputs[rows]
    wanted = which[rows]
    if bool((alone & wanted).any()):
        if means is None:
            expert = int(experts[rows][alone & wanted][0])
            raise InputError(
                f"expert {expert} of layer {layer} has one token in this batch: there is no other output to take. Pass "
                "a larger batch, or fallback='mean' with a reference"
            )
        replaced = outputs.index_put(rows.nonzero(as_tuple=True), torch.where(wanted[:, None], new[donors], new))
        return _by_mean(model, layer, replaced, experts, _where(rows, alone & wanted), means, seed)
    return outputs.index_put(rows.nonzero(as_tuple=True), torch.where(wanted[:, None], new[donors], new))


def _where(rows: Tensor, which: Tensor) -> Tensor:
    found = torch.zeros_like(rows)
    found[rows] = which
    return found


def derangement(
    groups: Int[Tensor, " rows"], seed: int, layer: int = 0
) -> tuple[Int[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """For every row another row of the same group: a random cycle through each group, and which rows are alone.

    No row of a group of two or more is given itself; each is given to exactly one.
    """
    generator = torch.Generator().manual_seed(seed * 1009 + layer)
    shuffled = torch.randperm(len(groups), generator=generator).to(groups.device)
    order = shuffled[groups[shuffled].argsort(stable=True)]
    ordered = groups[order]
    _, inverse, counts = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    row = torch.arange(len(groups), device=groups.device)
    following = torch.where(row + 1 < (starts + counts)[inverse], row + 1, starts[inverse])
    donors = torch.empty_like(order)
    donors[order] = order[following]
    return donors, donors == row


# --- shared experts ---


def _shared(
    model: HookedModel, selection: Selection, layer: int, how: How, means: ExpertMeans | None, seed: int
) -> Callable[..., Tensor]:
    if how == "reroute":
        raise InputError("how='reroute' is about routed experts: shared ones are not selected. Leave shared out")

    def replaced(outputs: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        which = positions(model, selection, outputs)
        which = torch.ones(outputs.shape[:2], dtype=torch.bool, device=outputs.device) if which is None else which
        if how == "zero":
            return outputs.masked_fill(which[..., None], 0)
        if how == "mean":
            assert means is not None
            return torch.where(which[..., None], means.shared_of(layer).to(outputs), outputs)
        real = _real(model, outputs)
        donors, alone = derangement(torch.zeros(int(real.sum()), dtype=torch.long, device=real.device), seed, layer)
        stand_in = outputs[real][donors]
        if bool(alone.any()):
            if means is None:
                raise InputError(f"the shared experts of layer {layer} have one token in this batch: none to take")
            stand_in = means.shared_of(layer).to(outputs).expand_as(stand_in)
        new = outputs.index_put(real.nonzero(as_tuple=True), stand_in)
        return torch.where(which[..., None], new, outputs)

    return replaced


# --- the top experts alone ---


def keep_top(
    model: HookedModel,
    k: int,
    *,
    by: By = "weight",
    layers: Iterable[int] | None = None,
    renormalize: bool = False,
    seed: int = 0,
) -> Intervention:
    """Leave every token k of its experts; see `HookedMoE.keep_top`."""
    if by not in get_args(By):
        raise InputError(f"by is {by!r}; expected one of {get_args(By)}")
    if not isinstance(k, int) or isinstance(k, bool) or not 0 <= k <= model.top_k:
        raise InputError(f"k is {k!r}; the model has {model.top_k} active experts: expected 0 to {model.top_k}")
    if k == 0 and renormalize:
        raise InputError("renormalize=True with k=0: there is no weight left to rescale")
    selection = Selection(layers=layers).check(model)
    hooks: list[Hook] = []
    for layer in selection.layers_of(model) if k < model.top_k else ():
        hooks += _leave_out(model, layer, _others(model, layer, k, by, seed), renormalize)
    return Intervention(model, f"keep_top {k} by {by}", tuple(hooks))


def _others(model: HookedModel, layer: int, k: int, by: By, seed: int) -> Chooser:
    """The slots that are not kept."""

    def others() -> Bool[Tensor, "batch pos top_k"]:
        experts = model.experts_in_slots(layer)
        if by == "random":
            step = model.step()
            offset = 0 if step is None else step.offset
            generator = torch.Generator().manual_seed((seed * 1009 + layer) * 1_000_003 + offset)
            place = torch.rand(experts.shape, generator=generator).argsort(-1).to(experts.device)
            return place >= k
        rank = torch.arange(experts.shape[-1], device=experts.device).expand(experts.shape)
        return rank >= k if by == "weight" else rank < experts.shape[-1] - k

    return others
