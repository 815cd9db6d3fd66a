"""Editable routing: the model's own selection code runs, and hooks stand at its boundaries.

No family's selection is re-implemented. While the router runs, its one linear product passes through
`hook_router_logits`, and the family's code selects from what the hook returned. To force indices, the router runs once
more with its logits given and its final `topk` answered by the forced indices: the family's own code then computes
their weights.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_lens import names
from moe_lens.errors import HookError
from moe_lens.model.experts import LayerHooks

TOPK = (torch.topk, Tensor.topk)
MASK = (torch.masked_fill, Tensor.masked_fill)


class _EditLogits(TorchFunctionMode):
    """Pass the first linear product through `hook_router_logits`."""

    def __init__(self, hooks: LayerHooks):
        super().__init__()
        self.hooks, self.done = hooks, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.done or func is not F.linear:
            return out
        self.done = True
        return self.hooks.over_tokens(names.ROUTER_LOGITS, out)


class _ForceIndices(TorchFunctionMode):
    """Give the router its logits, and the answer of its final top-k.

    Masks of expert groups are lifted: they affect which experts are chosen, not the affinity of those that are.
    """

    def __init__(self, logits: Tensor, indices: Tensor):
        super().__init__()
        self.logits, self.indices, self.linear, self.chosen = logits, indices, False, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and not self.linear:
            self.linear = True
            return self.logits
        scores = args[0] if args else kwargs.get("input")
        whole = isinstance(scores, Tensor) and scores.shape == self.logits.shape
        if whole and func in MASK:
            return scores
        if whole and func in TOPK and (args[1] if len(args) > 1 else kwargs["k"]) == self.indices.shape[-1]:
            self.chosen = True
            return torch.return_types.topk((scores.gather(-1, self.indices), self.indices))
        return func(*args, **kwargs)


def check_indices(indices: Tensor, n_experts: int, name: str) -> None:
    """Forced experts must exist, and no token can use one twice.

    Raises:
        HookError: an id out of range, or a duplicate.
    """
    if indices.min() < 0 or indices.max() >= n_experts:
        low, high = int(indices.min()), int(indices.max())
        raise HookError(f"a hook on {name} returned experts {low}…{high}; expected ids from 0 to {n_experts - 1}")
    ordered = indices.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]).nonzero()
    if len(twice):
        *where, slot = twice[0].tolist()
        raise HookError(
            f"a hook on {name} returned expert {int(ordered[(*where, slot)])} twice at (batch, pos) {tuple(where)}; "
            "expected different experts in the slots of a token"
        )


def route(router: Callable[..., Any], hooks: LayerHooks, n_experts: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run a router of transformers' contract, `(logits, weights, indices)`, with its three hooks."""
    with _EditLogits(hooks) if hooks.heard(names.ROUTER_LOGITS) else nullcontext():
        logits, weights, indices = router(x)
    hooks.routed(indices, weights)
    if hooks.heard(names.EXPERT_INDICES):
        forced = hooks.over_slots(names.EXPERT_INDICES, indices)
        if forced is not indices and not torch.equal(forced, indices):
            per_token = forced.view(hooks.batch, hooks.pos, -1)
            check_indices(per_token, n_experts, names.mlp(names.EXPERT_INDICES, hooks.layer))
            mode = _ForceIndices(logits, forced)
            with mode:
                logits, weights, indices = router(x)
            assert mode.linear and mode.chosen, "the router did not select by a linear product and a top-k"
    return logits, hooks.over_slots(names.ROUTING_WEIGHTS, weights), indices
