"""A plan applied to the model it is for, so that quality is measured before anything is written."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from moe_lens import names
from moe_lens.errors import UnsupportedModelError
from moe_lens.interventions.ablation import _leave_out as leave_out
from moe_lens.interventions.intervention import Hook, Intervention
from moe_lens.interventions.rerouting import reselect
from moe_lens.model.cache.hook_cache import identity
from moe_lens.pruning.checkpoint_formats import normalizes
from moe_lens.pruning.weight_matching import Planned, averaged, members, views

_BIAS = "e_score_correction_bias"
"""What routers like DeepSeek-V3's, which choose among groups, add to the affinities for the choice alone."""


@contextmanager
def preview(plan: Planned, model: Any) -> Generator[Intervention]:
    """The model as it would be: pruned experts cannot be chosen, and affinities are those of a router without them.

    No weights are copied, but for merged experts: those that others are averaged into are kept aside meanwhile.

    Args:
        plan: What stays.
        model: The `HookedMoE` that the plan is for.

    Raises:
        InputError: the plan is for another model.
        UnsupportedModelError: a smaller `top_k` in a family of which it is not known whether it normalises weights, or
            pruned experts in a layer that chooses by the token's id.
    """
    plan.check(identity(model))
    hooks: list[Hook] = []
    for layer in plan.layers:
        gone = torch.tensor(plan.pruned(layer), dtype=torch.long)
        if len(gone):
            hooks += _without(model, layer, gone)
        if plan.active(layer) < model.top_k:
            hooks += _fewer(model, layer, plan.active(layer))
    with _biases(plan, model), _merged(plan, model), Intervention(model, f"preview of {plan}", tuple(hooks)) as found:
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
    """
    gone = {layer: torch.zeros(len(plans), model.n_experts, dtype=torch.bool) for layer in model.moe_layers}
    for number, plan in enumerate(plans):
        if plan is not None:
            plan.check(identity(model))
            for layer in plan.layers:
                gone[layer][number, list(plan.pruned(layer))] = True
    return [(names.mlp(names.ROUTER_LOGITS, layer), _without_each(of)) for layer, of in gone.items() if of.any()]


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
    elsewhere = model.family.bias and _bias(model, layer) is None  # where `_biases` does not see to it
    return [*hooks, (names.mlp(names.EXPERT_INDICES, layer), choose)] if elsewhere else hooks


def _fewer(model: Any, layer: int, top_k: int) -> list[Hook]:
    """Hooks that leave the `top_k` experts which the router would choose first."""
    chosen: list[Bool[Tensor, "batch pos top_k"]] = []

    def note(indices: Tensor, hook: Any) -> None:  # noqa: ARG001
        scores = model.selection_state(layer).scores.gather(-1, indices)
        first = scores.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
        chosen[:] = [torch.ones_like(indices, dtype=torch.bool).scatter(-1, first, False)]

    others = leave_out(model, layer, lambda: chosen[0], normalizes(model.original_model.config))
    return [(names.mlp(names.EXPERT_INDICES, layer), note), *others]


def _bias(model: Any, layer: int) -> Tensor | None:
    return getattr(getattr(model._moe(layer), model.family.router), _BIAS, None)


@contextmanager
def _biases(plan: Planned, model: Any) -> Generator[None]:
    """A bias of −∞ for pruned experts, which without affinity might still be chosen, or a group of theirs, for it."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for layer in plan.layers:
            bias = _bias(model, layer)
            if bias is not None:
                before.append((bias, bias.detach().clone()))
                bias.data[list(plan.pruned(layer))] = -torch.inf
        yield
    finally:
        for bias, value in before:
            bias.data.copy_(value)


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
