"""Interventions on which experts are selected: re-routing, recorded routing, steering."""

from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Annotated, Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from moe_lens import names
from moe_lens.argument_checks import ReadByItself
from moe_lens.errors import InputError, UnfitError, a_kind
from moe_lens.interventions.intervention import Hook, Intervention, Recipe, first_token, positions, this_pass
from moe_lens.model.cache.moe_cache import MoECache
from moe_lens.protocols import Hooked, HookedModel
from moe_lens.routing import Routing
from moe_lens.selection import Selection, Where, where_text

Replayed = Literal["both", "indices", "weights"]
Steer = int | float | Literal["on", "off"]
SteerRule = Literal["affinity", "steermoe"]

EPSILON = 0.01
"""By how much SteerMoE's own code (arXiv 2509.09660) passes the largest, or stays under the smallest, score."""


def holders(
    indices: Int[Tensor, "batch pos top_k"], slots: Bool[Tensor, "batch pos top_k"], n_experts: int
) -> Bool[Tensor, "batch pos n_experts"]:
    """Experts that are in some of a token's slots; slots without an expert hold −1."""
    where = indices.masked_fill(~slots | (indices < 0), n_experts)
    marked = torch.zeros(*indices.shape[:2], n_experts + 1, dtype=torch.bool, device=indices.device)
    return marked.scatter(-1, where, True)[..., :n_experts]


def reselect(
    layer: int,
    indices: Int[Tensor, "batch pos top_k"],
    scores: Float[Tensor, "batch pos n_experts"],
    wishes: Int[Tensor, "batch pos n_experts"],
) -> Int[Tensor, "batch pos top_k"]:
    """Experts with some of them forced in (1 in `wishes`) or out (−1), everything else as selected.

    A free slot goes to the expert with the largest score among those that the family allows; for an expert that is
    forced in, the selected one with the smallest score leaves. Who stays keeps the slot; ties go to the lowest id.
    Slots without an expert, of −1, stay without.

    Raises:
        UnfitError: a token has too few experts left, or slots for those that are forced in; the message names it.
    """
    top_k, present = indices.shape[-1], indices >= 0
    forced = (wishes > 0).sum(-1)
    if (many := forced > present.sum(-1)).any():
        came, has = int(forced[many][0]), int(present.sum(-1)[many][0])
        raise UnfitError(f"layer {layer}, token {first_token(many)}: {came} experts are forced in; it has {has}")
    wanted = torch.arange(top_k, device=indices.device) < present.sum(-1, keepdim=True)
    selected = holders(indices, present, wishes.shape[-1])
    worth = selected.to(torch.int8)
    worth = torch.where(scores.isneginf() & ~selected, -1, worth)
    worth = torch.where(wishes > 0, 2, worth)
    worth = torch.where(wishes < 0, -1, worth)
    by_score = scores.sort(dim=-1, descending=True, stable=True).indices
    by_worth = worth.gather(-1, by_score).sort(dim=-1, descending=True, stable=True).indices
    picked = by_score.gather(-1, by_worth)[..., :top_k]
    short = (wanted & (worth.gather(-1, picked) < 0)).any(-1)
    if short.any():
        least = int(wanted[short][0].sum())
        raise UnfitError(
            f"layer {layer}, token {first_token(short)}: fewer than {least} experts are left to select from (experts "
            "that are forbidden, or in groups that the router leaves out, do not count); forbid fewer"
        )
    stays = torch.zeros_like(selected).scatter(-1, picked, wanted).gather(-1, indices.clamp(min=0)) & present
    comes = wanted & ~selected.gather(-1, picked)
    incoming = picked.gather(-1, comes.to(torch.int8).argsort(dim=-1, descending=True, stable=True))
    leaves = present & ~stays
    turn = (leaves.long().cumsum(-1) - 1).clamp(min=0)
    return torch.where(leaves, incoming.gather(-1, turn), indices)


def _wish(
    model: HookedModel, layer: int, wish: Callable[[Tensor], tuple[Bool[Tensor, "batch pos n_experts"], int]]
) -> Hook:
    """A hook that adds a wish to those of the pass and selects again; a later wish outweighs an earlier one."""

    def choose(indices: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        choice = model.selection_state(layer)
        which, value = wish(indices)
        choice.wishes[which] = value
        _check_there(layer, choice.logits, choice.wishes > 0)
        return reselect(layer, indices, choice.scores, choice.wishes)

    return names.mlp(names.EXPERT_INDICES, layer), choose


def _check_there(
    layer: int, logits: Float[Tensor, "batch pos n_experts"], forced: Bool[Tensor, "batch pos n_experts"]
) -> None:
    """Refuse to force experts in that have no affinity, as those that are pruned inside the preview of a plan.

    Raises:
        UnfitError: names one.
    """
    if (gone := logits.isneginf() & forced).any():
        raise UnfitError(f"layer {layer}: expert {int(gone.nonzero()[0, -1])} is forced in, and has no affinity")


def forbid(model: HookedModel, selection: Selection, layer: int) -> Hook:
    """Leaves the selected experts of a layer out of the selection; affinities stay what they are."""

    def out(indices: Tensor) -> tuple[Tensor, int]:
        where = positions(model, selection, indices)
        if selection.by_layer is not None:
            which = torch.zeros(*indices.shape[:2], model.n_experts, dtype=torch.bool, device=indices.device)
            which[..., list(selection.by_layer[layer])] = True
            return which if where is None else which & where[..., None], -1
        return holders(indices, selection.slots(layer, indices, where), model.n_experts), -1

    return _wish(model, layer, out)


def force_routing(
    model: Hooked, routing: Routing | MoECache, *, layers: Iterable[int] | None = None, what: Replayed = "both"
) -> Intervention:
    """Replay recorded routing, slot by slot, on texts of the same lengths.

    It separates the effect of which experts are used from that of what they read. With `what="indices"` the recorded
    experts are used, with their own affinity for the new input and the family's normalisation; with `"weights"` the
    new input's own experts are used, and each rank gets its recorded weight. The n-th token of a text gets what was
    recorded of the n-th one, whichever side padding is on; padding itself, and in generation tokens after the recorded
    ones, are routed freely.

    Args:
        model: the model.
        routing: what `model.routing` returned, or a cache that holds indices and weights.
        layers: layers to replay; all recorded ones if not given.
        what: `"both"`, `"indices"` or `"weights"`.

    Raises:
        InputError: layers that were not recorded, or another number of experts; when it runs, texts of other lengths.
    """
    if what not in get_args(Replayed):
        raise InputError(f"what is {what!r}; expected one of {get_args(Replayed)}")
    if isinstance(routing, MoECache):
        held = [at for at in model.moe_layers if names.mlp(names.EXPERT_INDICES, at) in routing]
        if not held:
            wanted = f"{names.EXPERT_INDICES} and {names.ROUTING_WEIGHTS}"
            raise InputError(f"the cache holds routing of no layer; cache {wanted}, or pass what model.routing returns")
        routing = Routing.stack([routing.routing(at) for at in (held if layers is None else tuple(layers))])
    if not isinstance(routing, Routing):
        raise InputError(f"routing is {a_kind(routing)}; expected what model.routing returns, or a cache")
    if (routing.n_experts, routing.top_k) != (model.n_experts, model.top_k):
        came = f"{routing.top_k} of {routing.n_experts} experts"
        raise InputError(f"the routing chooses {came}; the model chooses {model.top_k} of {model.n_experts}")
    selection = Selection(layers=routing.layers if layers is None else layers).check(model)
    chosen = selection.layers_of(model)
    hooks: list[Hook] = []
    for layer in chosen:
        recorded = routing.layer(layer)
        if what != "weights":
            hooks.append((names.mlp(names.EXPERT_INDICES, layer), _replay(model, recorded.indices, recorded.mask)))
        if what != "indices":
            hooks.append((names.mlp(names.ROUTING_WEIGHTS, layer), _replay(model, recorded.weights, recorded.mask)))
    recipe = Recipe(force_routing, {"routing": routing, "layers": chosen, "what": what})
    return Intervention(model, f"force_routing, layers {list(chosen)}, {what}", tuple(hooks), recipe)


def _replay(
    model: HookedModel, recorded: Shaped[Tensor, "batch pos top_k"], mask: Bool[Tensor, "batch pos"] | None
) -> Callable[..., Tensor]:
    real = torch.ones(recorded.shape[:2], dtype=torch.bool) if mask is None else mask.cpu()
    column, lengths = (~real).int().argsort(dim=1, stable=True), real.sum(-1)
    """Of each text, the recorded columns with padding last; and how many tokens were recorded."""

    def replayed(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        step = this_pass(model, value, "recorded routing")
        now = torch.ones(value.shape[:2], dtype=torch.bool) if step.real is None else step.real.cpu()
        prompt = now if step.columns is None else now[:, : step.columns.shape[1]]  # without a cache, with new tokens
        _check_record(recorded, lengths, value, prompt, step.offset)
        place = step.places().cpu().expand(now.shape)
        known = now & (place < lengths[:, None])
        at = column.gather(1, place.clamp(0, recorded.shape[1] - 1)).to(recorded.device)
        found = recorded.gather(1, at[..., None].expand(*at.shape, recorded.shape[-1]))
        return torch.where(known[..., None].to(value.device), found.to(value), value)

    return replayed


def _check_record(recorded: Tensor, lengths: Tensor, value: Tensor, real: Tensor, start: int) -> None:
    """Refuse a record of other texts, or of another number of experts, than those of a pass.

    Raises:
        InputError: it is one; says what came and what was recorded.
    """
    if recorded.shape[-1] != value.shape[-1]:
        raise InputError(f"the recorded routing has {recorded.shape[-1]} experts a token; this pass {value.shape[-1]}")
    came, (batch, pos) = tuple(recorded.shape[:2]), real.shape
    if len(recorded) == batch and (start or torch.equal(lengths, real.sum(-1))):
        return
    if came != (batch, start + pos):
        raise InputError(f"the recorded routing has {came} [batch, pos]; the input has {(batch, start + pos)}")
    text = int((lengths != real.sum(-1)).nonzero()[0])
    raise InputError(
        f"of text {text}, {int(lengths[text])} tokens were recorded, and {int(real[text].sum())} of this input are no "
        "padding; expected the same number. Ids without attention_mask are all tokens"
    )


def steer_experts(
    model: Hooked,
    steering: Annotated[Mapping[int, Mapping[int, Steer]], ReadByItself()],
    *,
    rule: SteerRule = "affinity",
    where: Where | None = None,
) -> Intervention:
    """Steer experts into the selection or out of it: `model.steer_experts({3: {17: "on", 4: -2.0}})`.

    A number is added to the expert's router logit, before anything that the family does with logits. `"on"` and
    `"off"` force the expert into the selection and out of it. With `rule="affinity"` affinities do not change: a
    forced expert keeps its own, with the family's normalisation. With `rule="steermoe"` its log-softmax score becomes
    the largest + 0.01, or the smallest − 0.01, and the family selects and weights by these scores (arXiv 2509.09660);
    where a family then adds a selection bias or restricts groups, it may still select otherwise.

    Args:
        model: the model.
        steering: `{layer: {expert: value}}`, where the value is a number, `"on"` or `"off"`.
        rule: how "on" and "off" act: `"affinity"` or `"steermoe"`, see above.
        where: tokens to steer at; see `ablate`.

    Raises:
        InputError: no such layer or expert, another value, a `rule` without "on" or "off" to apply it to, more experts
            "on" than are active, or too few experts left.
    """
    if rule not in get_args(SteerRule):
        raise InputError(f"rule is {rule!r}; expected one of {get_args(SteerRule)}")
    if not isinstance(steering, Mapping) or not all(isinstance(of_layer, Mapping) for of_layer in steering.values()):
        raise InputError(f"steering is {steering!r}; expected {{layer: {{expert: a number, 'on' or 'off'}}}}")
    values = {at: dict(of_layer) for at, of_layer in steering.items()}
    if rule != "affinity" and not any(value in ("on", "off") for of in values.values() for value in of.values()):
        raise InputError(f"rule={rule!r} is about 'on' and 'off', and only numbers are given: leave it out")
    selection = Selection(experts={at: list(of_layer) for at, of_layer in values.items()}, where=where).check(model)
    hooks: list[Hook] = []
    largest = torch.finfo(getattr(model.cfg, "dtype", None) or torch.float32).max / 2
    for layer, of_layer in sorted(steering.items()):
        added, on, off = {}, [], []
        for expert, value in of_layer.items():
            if value in ("on", "off"):
                (on if value == "on" else off).append(expert)
            elif isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= largest:
                added[expert] = float(value)
            else:
                raise InputError(
                    f"expert {expert} of layer {layer}: got {value!r}; expected a number, 'on' or 'off'; numbers of "
                    f"at most {largest:.3g} in size, so that a router logit stays finite"
                )
        if len(on) > model.top_k:
            raise InputError(f"layer {layer}: {len(on)} experts are on; a token has {model.top_k}")
        if len(off) > model.n_experts - model.top_k:
            left = model.n_experts - len(off)
            raise InputError(f"layer {layer}: {left} experts are not off; a token needs {model.top_k}")
        scores = rule == "steermoe" and bool(on or off)
        if added or scores:
            pushed = (on, off) if scores else ([], [])
            hooks.append((names.mlp(names.ROUTER_LOGITS, layer), _logits(model, selection, layer, added, *pushed)))
        if not scores:
            hooks += [
                _wish(model, layer, _everywhere(model, selection, experts, value))
                for experts, value in ((on, 1), (off, -1))
                if experts
            ]
    tokens = "" if selection.where is None else f" {where_text(selection.where)}"
    recipe = Recipe(steer_experts, {"steering": values, "rule": rule, "where": where})
    return Intervention(model, f"steer_experts {values}{tokens}, {rule}", tuple(hooks), recipe)


def _everywhere(
    model: HookedModel, selection: Selection, experts: list[int], value: int
) -> Callable[[Tensor], tuple[Tensor, int]]:
    def wish(indices: Tensor) -> tuple[Tensor, int]:
        where = positions(model, selection, indices)
        which = torch.zeros(*indices.shape[:2], model.n_experts, dtype=torch.bool, device=indices.device)
        which[..., experts] = True
        return which if where is None else which & where[..., None], value

    return wish


def _logits(
    model: HookedModel, selection: Selection, layer: int, added: dict[int, float], on: list[int], off: list[int]
) -> Callable[..., Tensor]:
    def pushed(logits: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        old, gone = logits.log_softmax(-1) if on or off else logits, logits.isneginf()
        high, low = old.amax(-1, keepdim=True), old.masked_fill(gone, torch.inf).amin(-1, keepdim=True)
        new, forced = old.clone(), torch.zeros_like(gone)
        for expert, value in added.items():
            new[..., expert] += value
        new[..., on] = high + EPSILON
        new[..., off] = low - EPSILON
        forced[..., on] = True
        where = positions(model, selection, logits)
        _check_there(layer, logits, forced if where is None else forced & where[..., None])
        new = new.masked_fill(gone, -torch.inf)
        return new if where is None else torch.where(where[..., None], new, logits)

    return pushed
