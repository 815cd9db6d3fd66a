"""Many coalitions of experts taken out of the same texts, at the cost of what they change.

Pairs of a coalition and a text are stacked into batches of their own, each begun at the first layer in which one of its
texts chose an expert that is taken out: what the clean run computed before that is not computed again, and a text that
chose none of them is not run at all.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens import names
from moe_lens.errors import InputError
from moe_lens.interventions.clean_run import CleanRun, Hooks
from moe_lens.interventions.metrics import Loss
from moe_lens.interventions.rerouting import reselect
from moe_lens.interventions.selection_bias import no_bias
from moe_lens.interventions.sweep import LOGITS
from moe_lens.model.families.expert_groups import check_groups
from moe_lens.model.loading.batch_sizes import rows_at_once, tokens_at_once

Removal = Literal["reroute", "zero", "prune"]
"""How experts are taken out: forbidden before selection, so that others come; their contribution set to zero; or gone
from the model, so that affinities, too, are those of a router without them."""

CACHED = 2**20
"""Logits at a time on a CPU: about as many as its cache holds."""


@torch.no_grad()
def added_losses(
    model: Any,
    run: CleanRun,
    metric: Loss,
    coalitions: Bool[Tensor, "coalition layer n_experts"],
    pairs: Int[Tensor, "pair 2"],
    how: Removal,
) -> Float[Tensor, " pair"]:
    """Nats that a text loses when a coalition is taken out of it, everywhere: summed over its predicted tokens.

    See `added_at`, of which these are the sums over all places.
    """
    every = torch.ones(1, run.batch, run.pos, dtype=torch.bool)
    return added_at(model, run, metric, coalitions, pairs, how, every)[:, 0]


@torch.no_grad()
def added_at(
    model: Any,
    run: CleanRun,
    metric: Loss,
    coalitions: Bool[Tensor, "coalition layer n_experts"],
    pairs: Int[Tensor, "pair 2"],
    how: Removal,
    places: Bool[Tensor, "part text pos"],
) -> Float[Tensor, "pair part"]:
    """Nats that parts of a text lose when a coalition is taken out of it, everywhere.

    Args:
        model: A `HookedMoE`.
        run: The clean run of the texts.
        metric: Which tokens are predicted.
        coalitions: The experts of each, over the model's MoE layers.
        pairs: (coalition, text): what is run.
        how: How they are taken out.
        places: From where predicted tokens are counted, of each part.

    Returns:
        Loss without the coalition − loss with it, in float64 on the CPU.

    Raises:
        InputError: A coalition leaves a layer fewer experts than a token needs, in groups of experts too where a router
            chooses from them; or a loss is not finite.
    """
    from accelerate.utils.memory import should_reduce_batch_size

    device = run.logits.device
    most = int(coalitions.sum(-1).max()) if coalitions.numel() else 0
    if how != "zero" and model.n_experts - most < model.top_k:
        raise InputError(f"{model.n_experts - most} experts of a layer would be left; a token needs {model.top_k}")
    if how == "prune":
        check_groups(model, ~coalitions.cpu(), torch.full((len(model.moe_layers),), model.top_k))
    reads = metric.reads(run.batch, run.pos).to(device)
    clean = torch.zeros(reads.shape, dtype=torch.float64, device=device)
    batch, pos = reads.nonzero().unbind(-1)
    clean[reads] = metric.values(run.logits[batch, pos], batch, pos).to(clean)
    coalitions = coalitions.to(device)
    first = _first_layers(model, run, coalitions, pairs.to(device), chosen=how != "prune")
    places = places.to(device)
    found = torch.zeros(len(pairs), len(places), dtype=torch.float64)
    queue = [number for number in first.argsort(stable=True).tolist() if int(first[number]) < model.cfg.n_layers]

    def run_some(numbers: list[int]) -> None:
        some = torch.tensor(numbers, device=device)
        taken, items = pairs.to(device)[some].unbind(-1)
        states = _without(model, run, coalitions[taken], items, int(first[some[0]]), how)
        row, at = reads[items].nonzero().unbind(-1)
        added = torch.zeros(reads[items].shape, dtype=torch.float64, device=device)
        at_once = LOGITS if device.type != "cpu" else CACHED
        for part in torch.arange(len(row), device=device).split(rows_at_once(at_once, run.logits.shape[-1])):
            r, p = row[part], at[part]
            losses = metric.values(run.replay.logits(states[r, p]), items[r], p)
            added[r, p] = losses.double() - clean[items[r], p]
        found[some.cpu()] = torch.stack([(added * part[items]).sum(-1) for part in places], 1).cpu()

    size = max(1, tokens_at_once(model, device) // run.pos)
    while queue:
        try:
            run_some(queue[:size])
        except Exception as error:
            if size == 1 or not should_reduce_batch_size(error):
                raise
            size //= 2
        else:
            queue = queue[size:]
    if not found.isfinite().all():
        raise InputError("a loss without some experts is not finite: the logits hold NaN or infinities")
    return found


def _first_layers(
    model: Any,
    run: CleanRun,
    coalitions: Bool[Tensor, "coalition layer n_experts"],
    pairs: Int[Tensor, "pair 2"],
    *,
    chosen: bool,
) -> Int[Tensor, " pair"]:
    """The first layer of each pair in which the coalition has an expert, that the text chose; n_layers if none has."""
    real, rows = run.mask, torch.arange(run.batch, device=pairs.device)
    first = torch.full((len(pairs),), model.cfg.n_layers, device=pairs.device)
    for row, layer in reversed(list(enumerate(model.moe_layers))):
        indices = run.indices(layer).masked_fill(~real[..., None], model.n_experts).to(pairs.device)
        used = torch.zeros(run.batch, model.n_experts + 1, dtype=torch.bool, device=pairs.device)
        used[rows[:, None], indices.flatten(1)] = True
        members = coalitions[pairs[:, 0], row]
        hit = (members & used[pairs[:, 1], :-1] if chosen else members).any(-1)
        first = torch.where(hit, layer, first)
    return first


def _without(
    model: Any, run: CleanRun, taken: Bool[Tensor, "rows layer n_experts"], items: Tensor, start: int, how: Removal
) -> Float[Tensor, "rows pos d_model"]:
    """The last stream of some texts, from which each row's own experts are taken out."""
    hooks = [
        hook
        for row, layer in enumerate(model.moe_layers)
        if layer >= start and bool(taken[:, row].any())
        for hook in HOOKS[how](model, layer, taken[:, row])
    ]
    resid = run.stream(start, items)
    read = [(row, layer) for row, layer in enumerate(model.moe_layers) if layer >= start and how == "prune"]
    gone = {layer: taken[:, row].repeat_interleave(run.pos, 0) for row, layer in read}
    with no_bias(model, gone), model.hooks(hooks):
        for layer in range(start, model.cfg.n_layers):
            resid = run.replay.block(layer, resid, items)
    return resid


def _forbidden(model: Any, layer: int, taken: Bool[Tensor, "rows n_experts"]) -> Hooks:
    def choose(indices: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        out = taken.to(indices.device)
        hit = _members(out, indices).any(-1)
        if not hit.any():
            return indices
        scores = model.selection_state(layer).scores[hit][None]
        wishes = -out[hit.nonzero()[:, 0]].to(torch.int8)[None]
        chosen = indices.clone()
        chosen[hit] = reselect(layer, indices[hit][None], scores, wishes)[0]
        return chosen

    return [(names.mlp(names.EXPERT_INDICES, layer), choose)]


def _gone(model: Any, layer: int, taken: Bool[Tensor, "rows n_experts"]) -> Hooks:
    def masked(logits: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return logits.masked_fill(taken.to(logits.device)[:, None], -torch.inf)

    # Without affinity an expert might still be chosen for its bias, where that is not one that `no_bias` knows.
    return [(names.mlp(names.ROUTER_LOGITS, layer), masked), *_forbidden(model, layer, taken)]


def _zeroed(model: Any, layer: int, taken: Bool[Tensor, "rows n_experts"]) -> Hooks:
    def out() -> Tensor:
        experts = model.experts_in_slots(layer)
        return _members(taken.to(experts.device), experts)

    def weigh(weights: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return weights.masked_fill(out(), 0)

    def compute(kept: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return kept & ~out()

    return [(names.mlp(names.ROUTING_WEIGHTS, layer), weigh), (names.mlp(names.EXPERT_KEPT, layer), compute)]


HOOKS = {"reroute": _forbidden, "zero": _zeroed, "prune": _gone}


def _members(out: Bool[Tensor, "rows n_experts"], experts: Int[Tensor, "rows pos top_k"]) -> Bool[Tensor, "rows pos k"]:
    """Which slots hold an expert that is taken out of their row; those of −1 hold none."""
    return out.gather(-1, experts.clamp(min=0).flatten(1)).view(experts.shape) & (experts >= 0)
