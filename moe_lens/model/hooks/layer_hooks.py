"""Hook points of a MoE layer, and what its running forward pass tells them: shapes, ranks, choices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from moe_lens import names
from moe_lens.errors import HookError
from moe_lens.model.cache.caching_hook import CachingHook
from moe_lens.model.hooks.checked_point import CheckedPoint, changes_of
from moe_lens.model.hooks.ownership import Owner
from moe_lens.model.hooks.scaling import unscaled


def rank_order(
    indices: Int[Tensor, "tokens top_k"], weights: Float[Tensor, "tokens top_k"]
) -> Int[Tensor, "tokens top_k"]:
    """Slots of each token by routing weight, largest first; ties go to the lower expert index."""
    by_index = indices.argsort(-1)
    by_weight = weights.detach().gather(-1, by_index).sort(dim=-1, descending=True, stable=True).indices
    return by_index.gather(-1, by_weight)


def call_hook(point: HookPoint, value: Tensor) -> tuple[Tensor, bool]:
    """Run the hooks of a point on `value`, which nobody else holds; the result and whether it must replace the value.

    An edit is a returned tensor or a change in place. Backward hooks need the result in the graph, edited or not, and
    so does a hook function that may have kept it, to ask for its gradient later.
    """
    version = changes_of(value)
    seen = point(value)
    unchanged = seen is value and version is not None and value._version == version
    if unchanged and not point.bwd_hooks and not (seen.requires_grad and _may_be_kept(point)):
        return value, False
    return seen, True


def _may_be_kept(point: HookPoint) -> bool:
    return torch.is_grad_enabled() and not all(isinstance(handle.user_hook, CachingHook) for handle in point.fwd_hooks)


class SelectionState(NamedTuple):
    """What a layer selects its experts from, in one forward pass."""

    scores: Float[Tensor, "batch pos n_experts"]
    """The family takes the largest: affinities, for most; −inf in expert groups that are left out, and where the logit
    is −inf, as that of pruned experts is in a preview."""
    wishes: Int[Tensor, "batch pos n_experts"]
    """1 where an expert is to be chosen, −1 where it must not be; interventions of the pass add theirs in place."""
    logits: Float[Tensor, "batch pos n_experts"]
    """Router logits, as hooks have left them."""


_OF_PASS = {
    **{"batch": 0, "pos": 0, "computed": False},
    **dict.fromkeys(("_routing", "_handed", "_slots", "_used", "_kept", "_filled", "_scores", "_choice")),
}
"""What a layer knows of the pass that is running, before it is told."""


class LayerHooks:
    """The hook points of one MoE layer and the layout of the tokens that are passing through it."""

    def __init__(self, layer: int, linear_branch: bool, shared: bool, counts: bool = False):
        self.layer = layer
        absent = {names.MLP_IN, names.MLP_OUT}
        absent |= set() if linear_branch else {names.EXPERT_PRE_LINEAR}
        absent |= set() if shared else {names.SHARED_OUT}
        absent |= set() if counts else {names.N_ACTIVE}
        self.points: dict[str, HookPoint] = {
            hook.name: CheckedPoint() for hook in names.MLP_HOOKS if hook.name not in absent
        }
        for point in self.points.values():
            point.private = True  # pyright: ignore[reportArgumentType]  # hooks get a copy of their own: see run_with_cache
        self.experts: dict[tuple[int, str], HookPoint] = {}
        self.owner = Owner()
        """That of the model, once it is wrapped."""
        self.batch = self.pos = 0
        self.computed = False
        """Whether its experts have run in this pass."""
        self._routing: tuple[Tensor, Tensor] | None = None
        self._handed: tuple[tuple[Tensor, int | None], ...] | None = None
        self._slots: Tensor | None = None
        self._used: Tensor | None = None
        self._kept: Tensor | None = None
        self._filled: Tensor | None = None
        self._scores: Callable[[], tuple[Tensor, Tensor]] | None = None
        self._choice: SelectionState | None = None
        self.factors: Callable[[], dict[str, float]] = dict
        """What the family multiplies by after the experts at this moment, by hook; hooks show the product."""

    def start(self, batch: int, pos: int) -> dict[str, Any]:
        """A forward pass enters the layer with `batch` × `pos` tokens.

        Returns what `finish` takes, to go on with the pass around it where a hook function in the layer runs the layer.
        """
        before = {name: self.__dict__[name] for name in _OF_PASS} if self.batch else _OF_PASS
        self.__dict__.update(_OF_PASS, batch=batch, pos=pos)
        return before

    def finish(self, before: dict[str, Any]) -> None:
        """Let go of the pass's tensors."""
        self.__dict__.update(before)

    def check_ran(self) -> None:
        """Hooks show what the layer has computed, at the end of a pass.

        Raises:
            HookError: somebody listens to router or experts, and something else stands in their place.
        """
        if (self._routing is None or not self.computed) and self.heard(names.SHARED_OUT):
            raise self.unheard("router" if self._routing is None else "experts")

    def heard(self, without: str = "") -> bool:
        """Whether anybody listens to any of the hooks, but for one."""
        points = (point for name, point in self.points.items() if name != without)
        return any(point.has_hooks() for point in (*points, *self.experts.values()))

    def unheard(self, what: str) -> HookError:
        """What is said to those who listen to a part that something else computes."""
        return HookError(
            f"hooks of layer {self.layer} cannot run: something else was put in the place of its {what} after the "
            "model was wrapped. Put back what was wrapped, and change its parameters in place, or what it computes by "
            "hooks"
        )

    def check_all_come(self, x: Tensor) -> None:
        """Hooks show every token.

        Raises:
            HookError: somebody listens, and only some of the tokens come to this layer's router.
        """
        came = x.numel() // x.shape[-1]
        if came != self.batch * self.pos and self.heard():
            raise HookError(
                f"{came} of {self.batch * self.pos} tokens come to the experts of layer {self.layer}: those of images "
                "have experts of their own. Give it text alone, or remove the hooks on routing and experts"
            )

    def routed(self, indices: Tensor, weights: Tensor, filled: Tensor | None = None) -> None:
        """Note the model's own routing, by the number of experts in force: it defines the ranks.

        Args:
            indices: [tokens, top_k].
            weights: [tokens, top_k].
            filled: true in slots that hold a chosen expert; None if all do.
        """
        self._routing, self._used, self._filled = (indices, weights), indices, filled

    def hand_on(self, indices: Tensor, weights: Tensor) -> None:
        """Note what the router returns, as hooks have left it."""
        self._handed = tuple((each, changes_of(each)) for each in (indices, weights))

    def check_handed(self, indices: Tensor, weights: Tensor) -> None:
        """Experts compute with the routing that hooks have shown; in every family it is the same tensors that come.

        Raises:
            HookError: somebody listens, and it was changed on the way.
        """
        came = {"ids": indices, "weights": weights}.items()
        for (what, value), (shown, changes) in zip(came, self._handed or (), strict=False):
            unchanged = changes_of(shown) == changes
            if (unchanged and value is shown) or not self.heard():
                continue
            if not (unchanged and torch.equal(shown.to(value), value)):
                raise HookError(
                    f"hooks of layer {self.layer} would not show what is computed: {what} of experts were changed "
                    "between the router and the experts. Remove what changes them (a hook of torch, or a forward of "
                    "somebody's own), and do what it does with hooks of the wrapped model"
                )

    def selecting(self, logits: Tensor, scores: Callable[[], Tensor]) -> None:
        """Note from which logits the router selects, and how to find the scores of which it takes its largest."""
        self._scores = lambda: (logits, scores())

    def selection_state(self) -> SelectionState:
        """What the pass now running selects from.

        Raises:
            HookError: the layer is not selecting.
        """
        if self._choice is None:
            if self._scores is None:
                raise HookError(f"layer {self.layer} is not selecting: ask from a hook on {names.EXPERT_INDICES}")
            logits, scores = (values.view(self.batch, self.pos, -1) for values in self._scores())
            scores = scores.masked_fill(logits.isneginf(), -torch.inf)
            self._choice = SelectionState(scores, torch.zeros_like(scores, dtype=torch.int8), logits)
        return self._choice

    def forced(self, indices: Tensor) -> None:
        """Note the experts that a hook has put into the slots."""
        self._used = indices

    def experts_in_slots(self) -> Int[Tensor, "batch pos top_k"]:
        """Ids of the experts that the pass now running computes, by rank; −1 in slots that are left out.

        Raises:
            HookError: no pass is between this layer's selection and its end.
        """
        if self._used is None:
            raise HookError(
                f"layer {self.layer} has not selected its experts: ask from a hook on what comes after that"
            )
        used = self._used.flatten()
        if self._kept is not None:
            used = used.masked_fill(~self._kept, -1)
        return used[self.slots].view(self.batch, self.pos, -1)

    def has_listeners(self, name: str) -> bool:
        """Whether anybody listens to the hook."""
        point = self.points.get(name)
        return point is not None and point.has_hooks()

    @property
    def slots(self) -> Int[Tensor, " slots"]:
        """Where, in the model's order of slots, the slot of each (token, rank) is."""
        if self._slots is None:
            if self._routing is None:
                raise self.unheard("router")
            indices, weights = self._routing
            if self._filled is not None:
                weights = weights.masked_fill(~self._filled, -torch.inf)  # behind all others
            order = rank_order(indices, weights)
            first = torch.arange(0, order.numel(), order.shape[1], device=order.device)
            self._slots = (first[:, None] + order).flatten()
        return self._slots

    def over_tokens(self, name: str, value: Tensor) -> Tensor:
        """Pass [tokens, …] through a hook that sees [batch, pos, …]."""
        if not self.has_listeners(name):
            return value
        factor = self.factors().get(name, 1.0)
        view = value.reshape(self.batch, self.pos, value.shape[-1])
        seen, edited = call_hook(self.points[name], view.clone() if factor == 1.0 else view * factor)
        if not edited:
            return value
        return (seen if factor == 1.0 else unscaled(seen, view, factor)).reshape(value.shape)

    def over_slots(self, name: str, value: Tensor, place: Tensor | None = None) -> Tensor:
        """Pass values of slots through a hook that sees [batch, pos, rank, …].

        `value` is [tokens, top_k, …] in the model's order, or [rows, …] in the order for which `place` gives each slot
        of the model's order its row; slots that are left out have the row after the last.
        """
        if not self.has_listeners(name):
            return value
        rows = self.slots if place is None else place[self.slots]
        flat = value if place is not None else value.reshape(rows.numel(), *value.shape[2:])
        view = flat if len(flat) == len(rows) else F.pad(flat, (0, 0) * (flat.dim() - 1) + (0, 1))
        view = view.index_select(0, rows).view(self.batch, self.pos, -1, *flat.shape[1:])
        factor = self.factors().get(name, 1.0)
        shown = view if factor == 1.0 else view * factor
        seen, edited = call_hook(self.points[name], shown)
        if not edited:
            return value
        seen = seen if factor == 1.0 else unscaled(seen, view, factor)
        back = rows.new_empty(len(flat) + 1)
        back[rows] = torch.arange(rows.numel(), device=rows.device)
        return seen.reshape(-1, *flat.shape[1:]).index_select(0, back[: len(flat)]).view(value.shape)

    def keep(self, tokens: int, top_k: int, device: torch.device) -> Bool[Tensor, " slots"] | None:
        """The slots to compute, in the model's order; None for all of them."""
        if self._filled is None and not self.has_listeners(names.EXPERT_KEPT):
            return None
        if self._filled is None:
            kept = torch.ones(tokens, top_k, dtype=torch.bool, device=device)
        else:
            kept = self._filled.to(device)
        edited = self.over_slots(names.EXPERT_KEPT, kept)
        if bool(edited.all()):
            return None
        self._kept = edited.flatten()
        return self._kept

    def over_expert(self, name: str, value: Tensor, permutation: Tensor, ends: Tensor) -> Tensor:
        """Pass the rows of each listened-to expert through its own hook; `value` is [slots, …] sorted by expert."""
        for (expert, hook), point in self.experts.items():
            if hook != name or not point.has_hooks():
                continue
            start, end = (int(ends[expert - 1]) if expert else 0), int(ends[expert])
            slot = permutation[start:end]
            top_k = self.slots.numel() // (self.batch * self.pos)
            rank = torch.empty_like(self.slots)
            rank[self.slots] = torch.arange(rank.numel(), device=rank.device) % top_k
            token = slot // top_k
            point.ctx.update(batch=token // self.pos, pos=token % self.pos, rank=rank[slot], n_pos=self.pos)
            seen, edited = call_hook(point, value[start:end].clone())
            if edited:
                value = torch.cat([value[:start], seen, value[end:]])
        return value
