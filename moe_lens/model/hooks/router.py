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
from jaxtyping import Int
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
    """`Family.select`, of this router: in a family that selects by the token's id, some layers do not."""

    @property
    def counts(self) -> bool:
        """Whether it takes the largest of some scores, and weighs them apart from shared experts: it can take more."""
        return self.select == "topk" and self.width == self.n_experts


def rule_of(family: Family, router: Any, n_experts: int) -> Rule:
    """The rule of one router of a family."""
    extra = int(router.n_shared_experts) if family.shared_logits else 0
    factor = getattr(router, family.logits_factor) if family.logits_factor else 0
    select = "topk" if family.select == "token" and not hasattr(router, "tid2eid") else family.select
    return Rule(n_experts, n_experts + extra, bool(factor), select)


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
    """Run the router once more with the logits that it had, of which it takes `top_k` experts."""

    def __init__(self, rule: Rule, logits: Tensor, top_k: int):
        super().__init__(rule)
        self.given, self.top_k = logits, top_k

    def chooses(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether a call is that by which the router takes its experts, if its first argument is `whole`."""
        return func in TOPK and (args[1] if len(args) > 1 else kwargs["k"]) == self.top_k

    def found(self, logits: Tensor) -> Tensor:  # noqa: ARG002
        """Those of the first run."""
        return self.given


class _ForceIndices(_Again):
    """Give the router the answer of its choice.

    Masks are lifted: expert groups affect which experts are chosen, not the affinity of those that are.
    """

    def __init__(self, rule: Rule, logits: Tensor, top_k: int, indices: Tensor):
        super().__init__(rule, logits, top_k)
        self.indices, self.chosen = indices, 0

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The forced indices where the router chooses, and where it takes what it needs of the chosen."""
        scores = self.whole(args, kwargs)
        if scores is None:
            return func(*args, **kwargs)
        if self.rule.select == "sparsemixer":
            return self._one_by_one(func, args, kwargs)
        if func in MASK:
            return scores
        if self.chooses(func, args, kwargs):
            self.chosen = self.indices.shape[-1]
            return torch.return_types.topk((scores.gather(-1, self.indices), self.indices))
        if func in GATHER and self.rule.select == "token":
            self.chosen = self.indices.shape[-1]
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
        super().__init__(rule, logits, top_k)
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
        elif scores is not None and self.chooses(func, args, kwargs):
            self.scores = scores
        return func(*args, **kwargs)


class _Count(_Again):
    """Have the router take another number of experts; what it makes of their scores is its own business."""

    def __init__(self, rule: Rule, logits: Tensor, top_k: int, count: int):
        super().__init__(rule, logits, top_k)
        self.count, self.chosen = count, False

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """That many of the largest scores."""
        if self.whole(args, kwargs) is None or not self.chooses(func, args, kwargs):
            return func(*args, **kwargs)
        self.chosen = True
        if len(args) > 1:
            return func(args[0], self.count, *args[2:], **kwargs)
        return func(*args, **{**kwargs, "k": self.count})


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
        HookError: a number below 1, or above the experts there are, or above those in the groups of a token.
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
            f"layer {hooks.layer}: {int(counts[token])} experts are wanted for a token, which may choose "
            f"among {int(allowed[token])} of {rule.n_experts}, those of its best groups"
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
    mode = _Count(rule, logits, top_k, count)
    with mode:
        _, weights, indices, *_ = again()
    assert mode.chosen and indices.shape[-1] == weights.shape[-1] == count, (
        "the router did not choose as its family does"
    )
    return indices, weights


def _forced(again: Callable[[], Any], rule: Rule, logits: Tensor, top_k: int, forced: Tensor, count: int) -> Any:
    """What a router of `top_k` returns where a token's experts are the first `count` of those forced."""
    mode = _ForceIndices(rule, logits, top_k, forced[:, :count])
    with mode:
        returned = again()
    assert mode.chosen == count, "the router did not choose as its family does"
    return returned


def route(router: Callable[..., Any], hooks: LayerHooks, rule: Rule, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a router of transformers' contract, `(logits, weights, indices, …)`, with its four hooks."""
    hooks.check_all_come(x)
    forcing, counting = hooks.has_listeners(names.EXPERT_INDICES), hooks.has_listeners(names.N_ACTIVE)
    watch = _EditLogits(rule, hooks) if forcing or counting or hooks.has_listeners(names.ROUTER_LOGITS) else None
    with watch or nullcontext():
        logits, weights, indices, *rest = router(x, *args, **kwargs)
    if watch is None or not (forcing or counting):
        hooks.routed(indices, weights)
        return (logits, hooks.over_slots(names.ROUTING_WEIGHTS, weights), indices, *rest)
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
    return (logits, weights, indices if filled is None else fill(indices, rule.n_experts), *rest)
