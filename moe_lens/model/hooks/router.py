"""Editable routing: the model's own selection code runs, and hooks stand at its boundaries.

No family's selection is re-implemented. While the router runs, the product that makes its logits passes through
`hook_router_logits`, and the family's code selects from what the hook returned. To force indices, the router runs once
more with its logits given and its choice answered by the forced indices: the family's own code then computes their
weights.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from moe_lens import names
from moe_lens.errors import HookError, InputError
from moe_lens.model.hooks.layer_hooks import LayerHooks
from moe_lens.model.hooks.router_modes import Count, EditLogits, ForceIndices, Rule, Selecting


@torch.no_grad()
def selection_scores(router: Callable[[], Any], rule: Rule, logits: Tensor, top_k: int) -> Tensor:
    """The scores [tokens, n_experts] of which a router takes its largest; −inf in expert groups that it leaves out.

    For DeepSeek-V3 these are affinities plus the selection bias, for gpt-oss logits, for most families affinities.

    Raises:
        HookError: the layer chooses experts by the token's id.
    """
    mode = Selecting(rule, logits, top_k)
    with mode:
        router()
    if mode.scores is None and rule.select == "token":
        raise HookError("this layer chooses its experts by the token's id: there are no scores that it selects from")
    assert mode.scores is not None, "the router did not select by a top-k of what its logits became"
    return mode.scores if mode.barred is None else mode.scores.masked_fill(mode.barred.bool(), -torch.inf)


def check_indices(indices: Tensor, filled: Tensor | None, n_experts: int, name: str) -> None:
    """Forced experts must exist, no token can use one twice, and slots without an expert stay without.

    Args:
        indices: [batch, pos, top_k].
        filled: Which slots have an expert; all, if None.
        n_experts: Those there are.
        name: Of the hook.

    Raises:
        HookError: an id out of range, or a duplicate.
    """
    ids = indices
    if filled is not None:
        if not torch.equal(indices >= 0, filled):
            raise HookError(
                f"a hook on {name} moved -1, which marks slots behind a token's number of experts; edit hook_n_active "
                "to give a token more or fewer"
            )
        ids = torch.where(filled, indices, n_experts + torch.arange(indices.shape[-1], device=indices.device))
        indices = indices[filled]
    if indices.min() < 0 or indices.max() >= n_experts:
        low, high = int(indices.min()), int(indices.max())
        raise HookError(f"a hook on {name} returned experts {low}…{high}; expected ids from 0 to {n_experts - 1}")
    ordered = ids.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]).nonzero()
    if len(twice):
        *where, slot = twice[0].tolist()
        raise HookError(
            f"a hook on {name} returned expert {int(ordered[(*where, slot)])} twice at (batch, pos) {tuple(where)}; "
            "expected different experts in the slots of a token"
        )


def check_counts(counts: Tensor, hooks: LayerHooks, rule: Rule) -> None:
    """A token can have as many experts as the router lets it have.

    Raises:
        HookError: a number below 1, or above the experts there are, or above those that a token may choose from.
    """
    if counts.is_floating_point() or counts.min() < 1 or counts.max() > rule.n_experts:
        came = f"{counts.dtype} {counts.min().item()} to {counts.max().item()}"
        name = names.mlp(names.N_ACTIVE, hooks.layer)
        raise HookError(f"a hook on {name} returned {came}; expected whole numbers from 1 to {rule.n_experts}")
    allowed = (hooks.selection_state().scores > -torch.inf).sum(-1).flatten()
    short = (allowed < counts.squeeze(-1)).nonzero()
    if len(short):
        token = int(short[0])
        raise HookError(
            f"layer {hooks.layer}: {int(counts[token])} experts are wanted for a token, which may choose among "
            f"{int(allowed[token])} of {rule.n_experts}: others are in groups that the router leaves out, or pruned"
        )


def by_count(
    choose: Callable[[int], tuple[Tensor, Tensor]], counts: Int[Tensor, " tokens"]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Experts and weights [tokens, largest count], where each token has a number of experts of its own.

    `choose` is asked once for each number that occurs, and gives [tokens, number]: what a router does with the chosen
    scores (normalise, scale) is done over as many as the token has. Slots behind a token's number hold −1 and weight
    0; the third value is False there, and None where no token has such slots.
    """
    most = int(counts.max())
    indices, weights = choose(most)
    for count in counts.unique().tolist():
        if count < most:
            few = (counts == count)[:, None]
            own, own_weights = (F.pad(values, (0, most - count)) for values in choose(count))
            indices, weights = torch.where(few, own, indices), torch.where(few, own_weights, weights)
    filled = torch.arange(most, device=counts.device) < counts[:, None]
    if bool(filled.all()):
        return indices, weights, None
    return indices.masked_fill(~filled, -1), weights.masked_fill(~filled, 0), filled


def fill(indices: Int[Tensor, "tokens top_k"], n_experts: int) -> Int[Tensor, "tokens top_k"]:
    """With experts that the token has not in its slots of −1, so that all are different."""
    empty = indices < 0
    taken = torch.zeros(len(indices), n_experts + 1, dtype=torch.int8, device=indices.device)
    taken = taken.scatter(-1, indices.masked_fill(empty, n_experts), 1)[:, :n_experts]
    free = taken.sort(dim=-1, stable=True).indices
    turn = (empty.long().cumsum(-1) - 1).clamp(min=0)
    return torch.where(empty, free.gather(-1, turn), indices)


def _counted(again: Callable[[], Any], rule: Rule, logits: Tensor, top_k: int, count: int) -> tuple[Tensor, Tensor]:
    """Experts and weights [tokens, count] that a router of `top_k` takes if it takes `count`."""
    mode = Count(rule, logits, top_k, count)
    with mode:
        _, weights, indices, *_ = again()
    assert mode.chosen and indices.shape[-1] == weights.shape[-1] == count, (
        "the router did not choose as its family does"
    )
    return indices, weights


def _forced(again: Callable[[], Any], rule: Rule, logits: Tensor, top_k: int, forced: Tensor, count: int) -> Any:
    """What a router of `top_k` returns where a token's experts are the first `count` of those forced."""
    mode = ForceIndices(rule, logits, top_k, forced[:, :count])
    with mode:
        returned = again()
    assert mode.chosen == count, "the router did not choose as its family does"
    return returned


def route(router: Callable[..., Any], hooks: LayerHooks, rule: Rule, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a router of transformers' contract, `(logits, weights, indices, …)`, with its four hooks."""
    hooks.check_all_come(x)
    if rule.select == "token" and args and args[0] is None:
        raise InputError(
            f"layer {hooks.layer} chooses experts by the ids of tokens, and embeddings came without: pass ids; hooks "
            "(hook_embed) can replace what is embedded"
        )
    forcing, counting = hooks.has_listeners(names.EXPERT_INDICES), hooks.has_listeners(names.N_ACTIVE)
    watch = EditLogits(rule, hooks) if forcing or counting or hooks.has_listeners(names.ROUTER_LOGITS) else None
    with watch or nullcontext():
        logits, weights, indices, *rest = router(x, *args, **kwargs)
    if watch is None or not (forcing or counting):
        hooks.routed(indices, weights)
        weights = hooks.over_slots(names.ROUTING_WEIGHTS, weights)
        hooks.hand_on(indices, weights)
        return (logits, weights, indices, *rest)
    made, again, top_k, filled = watch.logits, partial(router, x, *args, **kwargs), indices.shape[-1], None
    assert made is not None, "the router made no logits by a linear product"
    hooks.selecting(made[..., : rule.n_experts], partial(selection_scores, again, rule, made, top_k))
    counts = torch.full((len(indices), 1), top_k, device=indices.device)
    edited = hooks.over_tokens(names.N_ACTIVE, counts)
    if edited is not counts and not torch.equal(edited, counts):
        check_counts(edited, hooks, rule)
        counts = edited
        indices, weights, filled = by_count(partial(_counted, again, rule, made, top_k), counts.squeeze(-1))
    hooks.routed(indices, weights, filled)
    forced = hooks.over_slots(names.EXPERT_INDICES, indices)
    if forced is not indices and not torch.equal(forced, indices):
        shape = (hooks.batch, hooks.pos, -1)
        where = None if filled is None else filled.view(shape)
        check_indices(forced.view(shape), where, rule.n_experts, names.mlp(names.EXPERT_INDICES, hooks.layer))
        weigh = partial(_forced, again, rule, made, top_k, forced if filled is None else fill(forced, rule.n_experts))
        if filled is None:
            logits, weights, _, *rest = weigh(forced.shape[-1])
        else:
            _, weights, _ = by_count(lambda count: (forced[:, :count], weigh(count)[1]), counts.squeeze(-1))
        indices = forced
        hooks.forced(indices)
    weights = hooks.over_slots(names.ROUTING_WEIGHTS, weights)
    indices = indices if filled is None else fill(indices, rule.n_experts)
    hooks.hand_on(indices, weights)
    return (logits, weights, indices, *rest)
