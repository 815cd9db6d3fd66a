"""Editable routing: the model's own selection code runs, and hooks stand at its boundaries.

No family's selection is re-implemented. While the router runs, the product that makes its logits passes through
`hook_router_logits`, and the family's code selects from what the hook returned. To force indices, the router runs once
more with its logits given and its choice answered by the forced indices: the family's own code then computes their
weights.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_lens import names
from moe_lens.errors import HookError
from moe_lens.model.experts.nonstandard_experts import TOPK
from moe_lens.model.families.family import Family
from moe_lens.model.hooks.layer_hooks import LayerHooks

PRODUCT = (F.linear, torch.mm)
TIMES = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
LARGEST = (torch.max, Tensor.max)
MASK = (torch.masked_fill, Tensor.masked_fill)
GATHER = (torch.gather, Tensor.gather)


class Rule(NamedTuple):
    """What has to be known of a router to see its logits and to answer its choice."""

    n_experts: int
    width: int
    """Columns of the product: routed experts, then shared ones where the family weighs them too."""
    multiplied: bool
    """Whether the logits are a multiplication of the product."""
    select: str
    """`Family.select`."""


def rule_of(family: Family, router: Any, n_experts: int) -> Rule:
    """The rule of one router of a family."""
    extra = int(router.n_shared_experts) if family.shared_logits else 0
    factor = getattr(router, family.logits_factor) if family.logits_factor else 0
    return Rule(n_experts, n_experts + extra, bool(factor), family.select)


class _Watch(TorchFunctionMode):
    """Find a router's logits while it runs, and what it does with them."""

    def __init__(self, rule: Rule):
        super().__init__()
        self.rule, self.product = rule, False
        self.logits: Tensor | None = None

    def found(self, logits: Tensor) -> Tensor:
        """The logits have been made: what the router goes on with."""
        return logits

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What a function of the logits returns to the router."""
        return func(*args, **kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.logits is not None:
            return self.answer(func, args, kwargs)
        out = func(*args, **kwargs)
        wide = isinstance(out, Tensor) and out.dim() and out.shape[-1] == self.rule.width
        if wide and func in PRODUCT:
            self.product = True
        elif not (wide and self.product and func in TIMES):
            return out
        if self.rule.multiplied and func in PRODUCT:
            return out
        self.logits = out  # an edit below calls functions of its own
        self.logits = self.found(out)
        return self.logits

    def whole(self, args: Any, kwargs: Any) -> Tensor | None:
        """The first argument, where it has a number for every token and routed expert."""
        assert self.logits is not None
        first = args[0] if args else kwargs.get("input")
        rows = self.logits.numel() // self.rule.width
        fits = isinstance(first, Tensor) and first.dim() == 2 and tuple(first.shape) == (rows, self.rule.n_experts)
        return first if fits else None


class _EditLogits(_Watch):
    """Pass the logits of the routed experts through `hook_router_logits`."""

    def __init__(self, rule: Rule, hooks: LayerHooks):
        super().__init__(rule)
        self.hooks = hooks

    def found(self, logits: Tensor) -> Tensor:
        """What the hook makes of them."""
        n_experts = self.rule.n_experts
        if self.rule.width == n_experts:
            return self.hooks.over_tokens(names.ROUTER_LOGITS, logits)
        own = logits[..., :n_experts]
        seen = self.hooks.over_tokens(names.ROUTER_LOGITS, own)
        return logits if seen is own else torch.cat([seen, logits[..., n_experts:]], -1)


class _Again(_Watch):
    """Run the router once more with the logits that it had."""

    def __init__(self, rule: Rule, logits: Tensor):
        super().__init__(rule)
        self.given = logits

    def found(self, logits: Tensor) -> Tensor:  # noqa: ARG002
        """Those of the first run."""
        return self.given


class _ForceIndices(_Again):
    """Give the router the answer of its choice.

    Masks are lifted: expert groups affect which experts are chosen, not the affinity of those that are.
    """

    def __init__(self, rule: Rule, logits: Tensor, indices: Tensor):
        super().__init__(rule, logits)
        self.indices, self.chosen = indices, 0

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The forced indices where the router chooses, and where it takes what it needs of the chosen."""
        scores = self.whole(args, kwargs)
        if scores is None:
            return func(*args, **kwargs)
        top_k = self.indices.shape[-1]
        if self.rule.select == "sparsemixer":
            return self._one_by_one(func, args, kwargs)
        if func in MASK:
            return scores
        if func in TOPK and (args[1] if len(args) > 1 else kwargs["k"]) == top_k:
            self.chosen = top_k
            return torch.return_types.topk((scores.gather(-1, self.indices), self.indices))
        if func in GATHER and self.rule.select == "token":
            self.chosen = top_k
            return scores.gather(-1, self.indices)
        return func(*args, **kwargs)

    def _one_by_one(self, func: Any, args: Any, kwargs: Any) -> Any:
        """PhiMoE takes the largest logit k times; logits far below it are masked, but for the forced expert's."""
        out = func(*args, **kwargs)
        if func in LARGEST and self.chosen < self.indices.shape[-1]:
            self.chosen += 1
            return torch.return_types.max((out[0], self.indices[:, self.chosen - 1, None]))
        if func in MASK:
            one = self.indices[:, self.chosen - 1, None]
            return out.scatter(-1, one, self.given.gather(-1, one).to(out.dtype))
        return out


class _Selecting(_Again):
    """Note from which scores the router selects."""

    def __init__(self, rule: Rule, logits: Tensor, top_k: int):
        super().__init__(rule, logits)
        self.top_k = top_k
        self.scores: Tensor | None = None
        self.barred: Tensor | None = None

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the router asked for."""
        scores = self.whole(args, kwargs)
        if scores is not None and self.rule.select == "sparsemixer":
            if func in LARGEST and self.scores is None:
                self.scores = scores
        elif scores is not None and func in MASK:
            self.barred = args[1] if len(args) > 1 else kwargs["mask"]
        elif scores is not None and func in TOPK and (args[1] if len(args) > 1 else kwargs["k"]) == self.top_k:
            self.scores = scores
        return func(*args, **kwargs)


@torch.no_grad()
def selection_scores(router: Callable[[], Any], rule: Rule, logits: Tensor, top_k: int) -> Tensor:
    """The scores [tokens, n_experts] of which a router takes its largest; −inf in expert groups that it leaves out.

    For DeepSeek-V3 these are affinities plus the selection bias, for gpt-oss logits, for most families affinities.

    Raises:
        HookError: the layer chooses experts by the token's id.
    """
    mode = _Selecting(rule, logits, top_k)
    with mode:
        router()
    if mode.scores is None and rule.select == "token":
        raise HookError("this layer chooses its experts by the token's id: there are no scores that it selects from")
    assert mode.scores is not None, "the router did not select by a top-k of what its logits became"
    return mode.scores if mode.barred is None else mode.scores.masked_fill(mode.barred.bool(), -torch.inf)


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


def route(router: Callable[..., Any], hooks: LayerHooks, rule: Rule, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a router of transformers' contract, `(logits, weights, indices, …)`, with its three hooks."""
    hooks.check_all_come(x)
    forcing = hooks.has_listeners(names.EXPERT_INDICES)
    watch = _EditLogits(rule, hooks) if forcing or hooks.has_listeners(names.ROUTER_LOGITS) else None
    with watch or nullcontext():
        logits, weights, indices, *rest = router(x, *args, **kwargs)
    hooks.routed(indices, weights)
    if watch is not None and forcing:
        made = watch.logits
        assert made is not None, "the router made no logits by a linear product"
        again = partial(router, x, *args, **kwargs)
        hooks.selecting(partial(selection_scores, again, rule, made, indices.shape[-1]))
        forced = hooks.over_slots(names.EXPERT_INDICES, indices)
        if forced is not indices and not torch.equal(forced, indices):
            per_token = forced.view(hooks.batch, hooks.pos, -1)
            check_indices(per_token, rule.n_experts, names.mlp(names.EXPERT_INDICES, hooks.layer))
            mode = _ForceIndices(rule, made, forced)
            with mode:
                logits, weights, _, *rest = again()
            assert mode.chosen == forced.shape[-1], "the router did not choose as its family does"
            indices = forced
            hooks.forced(indices)
    return (logits, hooks.over_slots(names.ROUTING_WEIGHTS, weights), indices, *rest)
