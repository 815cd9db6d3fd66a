"""A plan from scores: which experts stay, by a budget for each layer or for all, some protected, with fewer active."""

from collections.abc import Mapping, Sized
from fractions import Fraction
from typing import Literal, cast

import torch

from moe_lens.checked import Positive
from moe_lens.errors import InputError
from moe_lens.ids import Ids
from moe_lens.pruning.plans import Plan
from moe_lens.pruning.scores import Scores
from moe_lens.selection import Experts, Selection

Budget = Literal["layer", "global"]


def plan(
    scores: Scores,
    keep: float | int | Literal["selected"] | None = None,
    *,
    budget: Budget | None = None,
    domain: str | None = None,
    protect: Selection | Experts = (),
    top_k: Positive | Mapping[int, Positive] | None = None,
) -> Plan:
    """Choose the experts to keep: those with the largest scores.

    Ties go to the lower expert id.

    Args:
        scores: What `score` returned.
        keep: The share of experts to keep, in (0, 1); or their number in each layer; `"selected"`: all with a score
            above 0, whatever their number; None: all (to reduce `top_k` alone).
        budget: Of a share or a number: `"layer"`, the same number in every layer, if not given; or `"global"`, the best
            of all layers together, with scores divided by the sum of their layer's positive ones, and at least `top_k`
            in each.
        domain: Keep what this domain needs (a specialist); all domains, each counting the same, if not given.
        protect: Experts that stay whatever their score, such as super experts: `[(layer, expert), …]`, one such pair,
            `{layer: [expert, …]}`, or a `Selection` of experts or of layers.
        top_k: Experts active per token in the smaller model, or in some of its layers `{layer: number}`; as before if
            not given. Layers that differ can be previewed; no family's config has words for them.

    Raises:
        InputError: too few experts for every token, more than there are, a domain or expert that does not exist, or a
            budget where `keep` says what stays in each layer.
    """
    if budget is not None and (keep is None or keep == "selected"):
        raise InputError(f"budget={budget!r} has no effect with keep={keep!r}; give a share or a number, or no budget")
    values = scores.of(domain)
    n_layers, n_experts = values.shape
    by_layer = _by_layer(scores, top_k)
    active = max(by_layer.values())
    ranked = values.clone()
    protected = _protected(protect, scores)
    for layer, expert in protected:
        ranked[scores.layers.index(layer), expert] = torch.inf
    stay = torch.zeros_like(values, dtype=torch.bool)
    if keep == "selected":
        stay = ranked > 0
    else:
        count = _count(keep, n_experts)
        if count < active:
            raise InputError(f"keep={keep} leaves {count} experts a layer, and every token needs {active}")
        stay.scatter_(
            -1, ranked.argsort(dim=-1, descending=True, stable=True)[:, : active if budget == "global" else count], True
        )
        if budget == "global":
            relative = ranked / values.clamp(min=0).sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
            lowest = torch.finfo(values.dtype).min  # what stays comes after all others, however low they are
            rest = relative.clamp(min=lowest).masked_fill(stay, -torch.inf).flatten()
            more = count * n_layers - int(stay.sum())
            stay.view(-1)[rest.argsort(dim=-1, descending=True, stable=True)[:more]] = True
    lost = [(layer, e) for layer, e in protected if not stay[scores.layers.index(layer), e]]
    if lost:
        raise InputError(
            f"{len(lost)} protected experts do not fit into keep={keep}, such as {lost[0]} (layer, expert)"
        )
    method = scores.method if domain is None else f"{scores.method} on {domain}"
    return Plan(
        model=scores.model,
        layers=scores.layers,
        kept=tuple(tuple(row.nonzero()[:, 0].tolist()) for row in stay),
        top_k=active,
        values=values,
        method=method,
        fewer={layer: number for layer, number in by_layer.items() if number < active},
        protected=tuple(protected),
    )


def _protected(given: Selection | Experts, scores: Scores) -> list[tuple[int, int]]:
    """(layer, expert) of those that are to stay.

    Raises:
        InputError: there is no such expert, or the selection is of something else.
    """
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(one, int) for one in given):
        given = [cast(tuple[int, int], given)]
    n_experts = scores.values.shape[-1]
    if isinstance(given, Sized) and not len(given):
        return []
    chosen = given if isinstance(given, Selection) else Selection(experts=given)
    told = chosen.by_layer is not None or chosen.layers is not None
    if not told or chosen.ranks is not None or chosen.shared or chosen.where is not None:
        raise InputError(f"protect is the selection {chosen}; expected one of experts or layers, and of nothing else")
    by_layer = chosen.by_layer
    if by_layer is None:
        by_layer = {layer: Ids(range(n_experts)) for layer in chosen.layers or ()}
    found = []
    for layer, experts in by_layer.items():
        if layer not in scores.layers:
            raise InputError(f"protect names layer {layer}; the layers with experts are {list(scores.layers)}")
        experts.check(f"protect: experts of layer {layer}", n_experts)
        found += [(layer, expert) for expert in experts]
    return found


def _by_layer(scores: Scores, top_k: int | Mapping[int, int] | None) -> dict[int, int]:
    """Experts active in each layer."""
    given = (
        top_k if isinstance(top_k, Mapping) else dict.fromkeys(scores.layers, scores.top_k if top_k is None else top_k)
    )
    for layer, number in given.items():
        if layer not in scores.layers:
            raise InputError(f"top_k names layer {layer}; the layers with experts are {list(scores.layers)}")
        if not 1 <= number <= scores.top_k:
            raise InputError(f"top_k is {number}; expected 1 to {scores.top_k}, the model's own")
    return {layer: given.get(layer, scores.top_k) for layer in scores.layers}


def _count(keep: float | int | str | None, n_experts: int) -> int:
    """Experts of a layer that stay."""
    if keep is None:
        return n_experts
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise InputError(f"keep is {keep!r}; expected a share in (0, 1), a whole number, 'selected' or None")
    if isinstance(keep, int):
        if not 1 <= keep <= n_experts:
            raise InputError(f"keep is {keep}; expected 1 to {n_experts} experts a layer")
        return keep
    if not 0 < keep <= 1:
        raise InputError(f"keep is {keep}; expected a share of the experts, above 0 and at most 1")
    return round(Fraction(keep).limit_denominator(10**6) * n_experts)
