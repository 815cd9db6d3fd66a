"""Modes under which a family's router runs: what its code computes is seen, edited or answered, call by call.

While a mode is on, torch hands it every function that the router calls: the product that makes the logits, the choice
of the largest scores, and what follows from it.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_lens import names
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


class Watch(TorchFunctionMode, ABC):
    """Find a router's logits while it runs, and what it does with them."""

    def __init__(self, rule: Rule):
        super().__init__()
        self.rule, self.product = rule, False
        self.logits: Tensor | None = None

    @abstractmethod
    def found(self, logits: Tensor) -> Tensor:
        """The logits have been made: what the router goes on with."""

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


class EditLogits(Watch):
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


class Again(Watch):
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


class ForceIndices(Again):
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


class Selecting(Again):
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


class Count(Again):
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
