"""Any number of experts for a token: fewer or more than the model was trained with, all, or as its router says."""

from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens import names
from moe_lens.checked import Positive
from moe_lens.errors import InputError
from moe_lens.interventions.intervention import Hook, Intervention, Recipe
from moe_lens.protocols import Hooked, HookedModel
from moe_lens.routing import affinity
from moe_lens.selection import Selection

Counts = Int[Tensor, "batch pos"]


def use_experts(
    model: Hooked,
    k: Positive | None = None,
    *,
    mass: float | None = None,
    threshold: float | None = None,
    entropy: float | None = None,
    least: Positive = 1,
    most: Positive | None = None,
    layers: Iterable[int] | None = None,
) -> Intervention:
    """Give every token another number of experts: `with model.use_experts(2): logits = model(tokens)`.

    The family's own rule selects the k best experts and weights them. Where it normalises weights, it does so over
    these k, so that they have the sum that the model was trained with; where it does not, fewer experts add less, and
    more experts add more. One expert's weight is normalised, too, unlike in a DeepSeekMoE whose config says one expert.
    (`keep_top` is different: it drops experts after weights were computed.) The axis of slots of all hooks is then k
    long; `model.top_k` does not change.

    Without k, the number differs between tokens and depends on the experts' shares: affinities divided by their sum
    over all experts. The axis of slots is as long as the largest number in a layer; slots that a token does not use are
    not computed, and have weight 0.

    Args:
        model: the model.
        k: number of experts of every token, 1 to all.
        mass: the fewest experts, in the order of selection, whose shares sum to at least this: top-p routing
            (arXiv 2403.07652); above 0 and at most 1.
        threshold: as many experts as have a share of at least this, above 0 and at most 1, in the order of selection:
            where a bias or groups decide the choice, they need not be those.
        entropy: this number times exp(entropy of the shares in nats), rounded; exp(entropy) is the effective number of
            experts; above 0.
        least: no token has fewer; for mass, threshold and entropy.
        most: no token has more; all experts that its router lets it choose from, if not given.
        layers: layers in which the number changes; all layers with experts if not given.

    Raises:
        InputError: none or several of k, mass, threshold and entropy, one out of range, no such layer, or a layer that
            cannot use another number of experts (PhiMoE, which selects one after the other; Inkling, which weights them
            together with shared ones; in DeepSeek-V4, layers that select by the token's id).
        HookError: when it runs: more experts than a token may choose from in a family that restricts it to groups, or
            experts are forced in or out where tokens have different numbers of them.
    """
    given = {"k": k, "mass": mass, "threshold": threshold, "entropy": entropy}
    rules = {name: value for name, value in given.items() if value is not None}
    if len(rules) != 1:
        raise InputError(f"got {', '.join(rules) or 'nothing'}; expected one of k, mass, threshold and entropy")
    ((rule, value),) = rules.items()
    highest = model.n_experts if most is None else most
    for name, number in {"k": k, "least": least, "most": highest}.items():
        if number is not None and not _whole(number, model.n_experts):
            raise InputError(f"{name} is {number!r}; expected a whole number from 1 to {model.n_experts}")
    if least > highest:
        raise InputError(f"least is {least} and most is {highest}; expected no more than that")
    if rule == "k" and (least != 1 or most is not None):
        raise InputError("least and most are about numbers that differ between tokens; leave them out with k")
    if rule != "k":
        _check_share(rule, value)
    selection = Selection(layers=layers).check(model)
    hooks: list[Hook] = []
    for layer in selection.layers_of(model):
        _check_layer(model, layer)
        count = _same(int(value)) if rule == "k" else _by_router(model, layer, RULES[rule], value, (least, highest))
        hooks.append((names.mlp(names.N_ACTIVE, layer), count))
    bounds = {"least": least, "most": most}
    said = "" if rule == "k" else f", {least} to {highest}"
    where = "" if layers is None else f" of {selection}"
    recipe = Recipe(use_experts, {**given, **bounds, "layers": selection.layers})
    return Intervention(model, f"use_experts {rule} {value}{said}{where}", tuple(hooks), recipe)


def _whole(number: Any, highest: int) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool) and 1 <= int(number) <= highest


def _check_share(rule: str, value: Any) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 < float(value) <= (float("inf") if rule == "entropy" else 1):
        raise InputError(
            f"{rule} is {value!r}; expected a number above 0{'' if rule == 'entropy' else ' and at most 1'}"
        )


def _check_layer(model: Any, layer: int) -> None:
    if names.mlp(names.N_ACTIVE, layer) in model.hook_dict:
        return
    able = [at for at in model.moe_layers if names.mlp(names.N_ACTIVE, at) in model.hook_dict]
    whys = {
        "sparsemixer": "chooses one expert after the other, with a weight for each that depends on those left",
        "token": "chooses experts by the token's id, from a table",
        "topk": "weighs routed experts together with the shared ones",
    }
    raise InputError(
        f"layer {layer} of this {model.family.model_type} {whys[model.family.select]}: it cannot use another number of "
        "experts. " + (f"Name other layers: layers={able}" if able else "keep_top leaves some of them out")
    )


def _same(k: int) -> Callable[..., Tensor]:
    def count(counts: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return torch.full_like(counts, k)

    return count


def _by_router(
    model: HookedModel, layer: int, rule: Callable[..., Counts], value: float, bounds: tuple[int, int]
) -> Callable[..., Tensor]:
    def count(counts: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        state = model.selection_state(layer)
        shares = affinity(state.logits, model.family.score).double()
        shares = shares / shares.sum(-1, keepdim=True)
        allowed = (state.scores > -torch.inf).sum(-1)
        wanted = rule(shares, state.scores, value).clamp(*bounds)
        return wanted.minimum(allowed)[..., None].to(counts)

    return count


def by_mass(
    shares: Float[Tensor, "batch pos n_experts"], scores: Float[Tensor, "batch pos n_experts"], mass: float
) -> Counts:
    """The fewest experts, largest scores first, whose shares sum to `mass` at least."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return (shares.gather(-1, order).cumsum(-1) < mass).sum(-1) + 1


def by_threshold(
    shares: Float[Tensor, "batch pos n_experts"],
    scores: Float[Tensor, "batch pos n_experts"],  # noqa: ARG001
    threshold: float,
) -> Counts:
    """The number of experts with a share of `threshold` at least."""
    return (shares >= threshold).sum(-1)


def by_entropy(
    shares: Float[Tensor, "batch pos n_experts"],
    scores: Float[Tensor, "batch pos n_experts"],  # noqa: ARG001
    times: float,
) -> Counts:
    """exp(entropy in nats) × `times`, rounded."""
    wanted = (torch.special.entr(shares).sum(-1).exp() * times).round()
    return wanted.clamp(max=shares.shape[-1]).long()  # no whole number is large enough for some multiples


RULES: dict[str, Callable[..., Counts]] = {"mass": by_mass, "threshold": by_threshold, "entropy": by_entropy}
"""Numbers of experts, of shares and scores."""
