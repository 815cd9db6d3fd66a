"""A plan applied to the model it is for, so that quality is measured before anything is written."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from moe_lens import names
from moe_lens.errors import UnsupportedModelError
from moe_lens.interventions.intervention import Hook, Intervention
from moe_lens.interventions.rerouting import reselect
from moe_lens.interventions.selection_bias import no_bias, selection_bias
from moe_lens.model.cache.identity import identity
from moe_lens.model.families.expert_groups import check_groups
from moe_lens.pruning.checkpoint_formats import normalizes
from moe_lens.pruning.weight_matching import Planned, averaged, members, views
from moe_lens.routing import affinity


@contextmanager
def preview(plan: Planned, model: Any) -> Generator[Intervention]:
    """The model as it would be: pruned experts cannot be chosen, and affinities are those of a router without them.

    No weights are copied, but for merged experts: those that others are averaged into are kept aside meanwhile.

    Args:
        plan: What stays.
        model: The `HookedMoE` that the plan is for.

    Raises:
        InputError: the plan is for another model.
        UnfitError: a router that chooses from groups of experts would not find enough in them, or never choose some.
        UnsupportedModelError: a smaller `top_k` in a family of which it is not known whether it normalises weights, or
            pruned experts in a layer that chooses by the token's id.
    """
    _fits(plan, model)
    hooks: list[Hook] = []
    out = ~_kept(plan, model)
    for row, layer in zip(out, plan.layers, strict=True):
        if row.any():
            hooks += _without(model, layer, row.nonzero()[:, 0])
        if plan.active(layer) < model.top_k:
            hooks += _fewer(model, layer, plan.active(layer))
    gone = dict(zip(plan.layers, out, strict=True))
    with no_bias(model, gone), _merged(plan, model), Intervention(model, f"preview of {plan}", tuple(hooks)) as found:
        yield found


def hides_alone(plan: Planned, model: Any) -> bool:
    """Whether `preview` does nothing but take affinities away, so that several plans can share a pass."""
    if plan.merged or any(plan.active(layer) < model.top_k for layer in plan.layers):
        return False
    return not model.family.bias  # without affinity experts might come for their bias


def side_by_side(plans: Sequence[Planned | None], model: Any) -> list[Hook]:
    """Hooks with which the rows of a batch are read as each plan previews them: as many rows for each, in their order.

    Args:
        plans: What stays, of plans that `hides_alone`; None for the whole model.
        model: The `HookedMoE` that they are for.

    Raises:
        InputError: a plan is for another model.
        UnfitError: see `preview`.
    """
    gone = {layer: torch.zeros(len(plans), model.n_experts, dtype=torch.bool) for layer in model.moe_layers}
    for number, plan in enumerate(plans):
        if plan is not None:
            _fits(plan, model)
            for layer in plan.layers:
                gone[layer][number, list(plan.pruned(layer))] = True
    return [(names.mlp(names.ROUTER_LOGITS, layer), _without_each(of)) for layer, of in gone.items() if of.any()]


def _fits(plan: Planned, model: Any) -> None:
    """The plan must be for the model, and leave its router what it needs."""
    plan.check(identity(model))
    check_groups(model, _kept(plan, model), torch.tensor([plan.active(layer) for layer in plan.layers]))


def _kept(plan: Planned, model: Any) -> Bool[Tensor, "layer n_experts"]:
    kept = torch.zeros(len(plan.layers), model.n_experts, dtype=torch.bool)
    for row, experts in zip(kept, plan.kept, strict=True):
        row[list(experts)] = True
    return kept


def _without_each(gone: Bool[Tensor, "plan n_experts"]) -> Any:
    def masked(logits: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        by_plan = logits.unflatten(0, (len(gone), -1))
        return by_plan.masked_fill(gone.to(logits.device)[:, None, None], -torch.inf).flatten(0, 1)

    return masked


def _without(model: Any, layer: int, gone: Tensor) -> list[Hook]:
    """Hooks that give pruned experts no affinity: what is left is what a router without their rows computes.

    Where a family keeps a bias for the choice elsewhere than DeepSeek-V3, they are forbidden besides: without affinity
    they might come for their bias.
    """
    if model.family.select == "token" and names.mlp(names.N_ACTIVE, layer) not in model.hook_dict:
        raise UnsupportedModelError(
            f"layer {layer} of this {model.family.model_type} chooses experts by the token's id, from a table that has "
            "no others for those that are pruned; keep all of its experts"
        )

    def masked(logits: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return logits.index_fill(-1, gone.to(logits.device), -torch.inf)

    def choose(indices: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        choice = model.selection_state(layer)
        choice.wishes[..., gone.to(indices.device)] = -1
        if not torch.isin(indices, gone.to(indices.device)).any():
            return indices
        return reselect(layer, indices, choice.scores, choice.wishes)

    hooks: list[Hook] = [(names.mlp(names.ROUTER_LOGITS, layer), masked)]
    elsewhere = model.family.bias and selection_bias(model, layer) is None  # where `no_bias` does not see to it
    return [*hooks, (names.mlp(names.EXPERT_INDICES, layer), choose)] if elsewhere else hooks


def _fewer(model: Any, layer: int, top_k: int) -> list[Hook]:
    """Hooks with which the router chooses `top_k` experts, by the family's own rule, and weighs them as it would."""

    def count(counts: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return torch.full_like(counts, top_k)

    def as_they_are(weights: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        experts = model.experts_in_slots(layer)
        affinities = affinity(model.selection_state(layer).logits, model.family.score)
        return affinities.gather(-1, experts.clamp(min=0)).masked_fill(experts < 0, 0).to(weights)

    before, after = (normalizes(model.original_model.config, k) for k in (model.top_k, top_k))
    undone = [(names.mlp(names.ROUTING_WEIGHTS, layer), as_they_are)] if before and not after else []
    return [(names.mlp(names.N_ACTIVE, layer), count), *undone]


@contextmanager
def _merged(plan: Planned, model: Any) -> Generator[None]:
    """Merged experts in the place of those that lead their groups."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for at, layer in enumerate(plan.layers if plan.merged else ()):
            for kept in plan.kept[at]:
                group = members(plan, layer, kept)
                if len(group) == 1:
                    continue
                assert plan.shares is not None
                # Only leaders are overwritten, and a leader is in no group but its own.
                new = averaged([views(model, layer, expert) for expert in group], plan.shares[at, list(group)])
                for name, parameter in views(model, layer, kept).items():
                    before.append((parameter, parameter.detach().clone()))
                    parameter.data.copy_(new[name])
        yield
    finally:
        for parameter, value in before:
            parameter.data.copy_(value)
