"""Partial sums: points of the residual stream between before and after the experts, from cached activations."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens import names
from moe_lens.checked import FromEnd, Natural, checked
from moe_lens.errors import HookError, InputError
from moe_lens.ids import Ids, one_id
from moe_lens.model.cache.logit_attribution import AttributionCache
from moe_lens.model.cache.unselected import drawn_numbers, unselected_experts, unselected_term
from moe_lens.partial_sum import PartialSum
from moe_lens.routing import output_factors

At = tuple[Int[Tensor, " n"], ...]
"""Some tokens: indices of their batch items and positions, or of positions alone where there is no batch axis."""


@checked
@dataclass(frozen=True, eq=False)
class ResidualSum:
    """A `PartialSum` of one layer, computed."""

    values: Float[Tensor, "*tokens d_model"]
    """A new tensor: changing it does not change the cache."""
    layer: Natural
    """The layer of the model."""
    which: PartialSum
    """The sum that was asked for."""
    dense: bool
    """Whether the layer has no experts, so that its whole MLP takes their place in the sum."""


class SelectedExpert(NamedTuple):
    """The routed expert of a sum at each token."""

    expert: Int[Tensor, "*tokens"]
    """The expert, if the sum has a single one (by rank, by id or drawn) and the token selected it; −1 otherwise."""
    weight: Float[Tensor, "*tokens"]
    """Its routing weight, or 1 in an unweighted sum; NaN where there is no single expert."""
    present: Bool[Tensor, "*tokens"]
    """False where a sum names experts and the token selected none of them."""


class SumCache(AttributionCache):
    """Partial sums over a layer's experts."""

    unselected: Mapping[tuple[int, PartialSum], Float[Tensor, "*tokens d_model"]] = MappingProxyType({})
    """Outputs of unselected experts that were computed during the cached pass, by layer and sum. For other sums the
    layer's experts run once more, and are read once more if they are kept on disk or on another device."""
    draws: Float[Tensor, "layer *tokens"] | None = None
    """Uniform random numbers in [0, 1) that decide which experts a sum draws, for each layer of the model and token.
    If not given, they come from the seed of the sum and depend on which tokens are cached together."""

    def partial_sum(
        self, layer: FromEnd, which: PartialSum | None = None, *, at: At | None = None, **chosen: Any
    ) -> ResidualSum:
        """Compute a partial sum: `partial_sum(3, PartialSum(ranks=[0]))`, or just `partial_sum(3, ranks=[0])`.

        In a dense layer a sum over all experts is u plus the whole MLP, and the result says `dense`; shared experts add
        nothing there. If weighted outputs were not cached, they are computed as weights × outputs, without any edit of
        `hook_expert_weighted`.

        Args:
            layer: the layer.
            which: the sum.
            at: only these tokens, as index tensors of the axes before the last, (batch, pos): values are [n, d_model].
            chosen: arguments of `PartialSum`, instead of `which`.

        Raises:
            HookError: an activation was not cached, the sum names ranks or experts in a dense layer, or it is empty
                because the layer has no shared experts.
            InputError: ranks or experts that the model does not have, or both a PartialSum and keywords.
        """
        if which is not None and chosen:
            raise InputError(f"got {which} and {sorted(chosen)}; expected a PartialSum or its keywords, not both")
        which = which or PartialSum(**chosen)
        layer = self._layer(layer)
        dense = layer not in self.model.moe_layers
        self._check(which, layer)
        terms = list(self._terms(layer, which, dense, at))
        if not terms:
            raise HookError(f"layer {layer} has no shared experts: the sum {which.label!r} is empty there")
        values = terms[0].clone() if len(terms) == 1 else sum(terms[1:], start=terms[0])
        return ResidualSum(values, layer, which, dense)

    def selected_expert(self, layer: FromEnd, which: PartialSum, *, at: At | None = None) -> SelectedExpert:
        """Which routed expert a sum has at each token, if it is one.

        Raises:
            HookError: the layer is dense, or indices or weights were not cached.
            InputError: ranks or experts that the model does not have, or no unselected expert to draw, because all are
                always active.
        """
        layer = self._moe_layer(layer, "experts")
        self._check(which, layer)
        indices = self._taken(names.mlp(names.EXPERT_INDICES, layer), at)
        weights = self._taken(names.mlp(names.ROUTING_WEIGHTS, layer), at)
        present = torch.ones_like(indices[..., 0], dtype=torch.bool)
        if which.drawn == "unselected":
            expert, weight = self._unselected(layer, which.seed, at), weights[..., 0]
        else:
            chosen = self._chosen(layer, which, indices, at)
            present = chosen.any(-1) if which.experts else present
            single = which.drawn or len(which.ranks or which.experts or ()) == 1
            expert = (indices * chosen).sum(-1).masked_fill(~chosen.any(-1) | (not single), -1)
            weight = (weights * chosen).sum(-1)
        weight = weight if which.weighted else torch.ones_like(weight)
        return SelectedExpert(expert, weight.masked_fill(expert < 0, torch.nan), present)

    def require(self, wanted: Iterable[str]) -> None:
        """Check that activations are cached, or can be computed from cached ones.

        Raises:
            HookError: some are missing; the message names all of them.
        """
        lacking = [name for name in wanted if name not in self and not self._can_make(name)]
        if lacking:
            raise HookError(self._why_missing(lacking))

    def _can_make(self, name: str) -> bool:
        found = names.parse_mlp(name)
        if found is None or found[1] not in (names.EXPERT_WEIGHTED, names.ROUTED_OUT):
            return False
        layer, hook = found
        if hook == names.ROUTED_OUT and names.mlp(names.EXPERT_WEIGHTED, layer) in self:
            return True
        return all(names.mlp(part, layer) in self for part in (names.EXPERT_OUT, names.ROUTING_WEIGHTS))

    def _terms(self, layer: int, which: PartialSum, dense: bool, at: At | None) -> Iterator[Tensor]:
        if dense and which.picks:
            raise HookError(self._dense(layer, repr(which.label)))
        if which.residual != "none":
            yield self._taken(names.block(names.RESID_MID if which.residual == "mid" else names.RESID_PRE, layer), at)
        if dense:
            if not which.restricted:
                yield self._taken(names.block(names.BLOCK_MLP_OUT, layer), at)
            return
        whole = names.mlp(names.ROUTED_OUT, layer)
        every = not which.restricted or len(which.ranks or ()) == self._n_slots(layer)
        if every and which.weighted and whole in self:
            yield self._taken(whole, at)
        elif every:
            yield self._slots(layer, which.weighted, at).sum(-2)
        elif which.drawn == "unselected":
            yield self._unselected_out(layer, which, at)
        elif which.ranks:
            yield self._slots(layer, which.weighted, at)[..., list(which.ranks), :].sum(-2)
        elif which.picks:
            slots = self._slots(layer, which.weighted, at)
            indices = self._taken(names.mlp(names.EXPERT_INDICES, layer), at)
            wanted = self._chosen(layer, which, indices, at)
            yield slots.masked_fill(~wanted[..., None], 0).sum(-2)
        if which.shared and self.model.has_shared(layer):
            yield self._taken(names.mlp(names.SHARED_OUT, layer), at)

    def _taken(self, name: str, at: At | None) -> Tensor:
        return self[name] if at is None else self[name][at]

    def _slots(self, layer: int, weighted: bool, at: At | None = None) -> Float[Tensor, "*tokens top_k d_model"]:
        """Expert outputs by rank; weighted ones are made from unweighted ones if they have to be."""
        plain, ready = names.mlp(names.EXPERT_OUT, layer), names.mlp(names.EXPERT_WEIGHTED, layer)
        weights = names.mlp(names.ROUTING_WEIGHTS, layer)
        if not weighted:
            return self._taken(plain, at)
        if ready in self or plain not in self or weights not in self:
            return self._taken(ready, at)
        outputs, factors = self._taken(plain, at), output_factors(self._taken(weights, at), self.model.family)
        return (outputs * factors[..., None]).to(outputs.dtype)

    def _chosen(self, layer: int, which: PartialSum, indices: Tensor, at: At | None) -> Tensor:
        """True in the slots, [*tokens, top_k], of the experts that a sum picks out."""
        if which.experts:
            return torch.isin(indices, torch.tensor(list(which.experts), device=indices.device))
        top_k = indices.shape[-1]
        ranks = torch.arange(top_k, device=indices.device)
        if which.drawn:
            return ranks == self._draw(layer, which.seed, top_k, at).to(ranks.device)[..., None]
        return torch.isin(ranks, torch.tensor(list(which.ranks or ()), device=ranks.device)).expand_as(indices)

    def _draw(self, layer: int, seed: int, below: int, at: At | None) -> Int[Tensor, "*tokens"]:
        """A number for every token. All tokens draw, so that a token's number does not depend on who else is read."""
        drawn = drawn_numbers(self[names.mlp(names.EXPERT_INDICES, layer)], layer, seed, below, self._draws(layer))
        return drawn if at is None else drawn[tuple(axis.cpu() for axis in at)]

    def _unselected(self, layer: int, seed: int, at: At | None) -> Int[Tensor, "*tokens"]:
        indices = self[names.mlp(names.EXPERT_INDICES, layer)]
        name = names.mlp(names.ROUTER_LOGITS, layer)
        logits = self[name] if name in self else None  # noqa: SIM401  # a cache has no `get`
        expert = unselected_experts(indices, layer, seed, self.model.n_experts, self._draws(layer), logits)
        return expert if at is None else expert[at]

    def _draws(self, layer: int) -> Float[Tensor, "*tokens"] | None:
        return None if self.draws is None else self.draws[layer]

    def _unselected_out(self, layer: int, which: PartialSum, at: At | None) -> Float[Tensor, "*tokens d_model"]:
        if (ready := self.unselected.get((layer, which))) is not None:
            return ready if at is None else ready[at]
        parts = (names.MLP_IN, names.ROUTING_WEIGHTS)
        x, weights = (self._taken(names.mlp(name, layer), at) for name in parts)
        return unselected_term(self.model, layer, which, x, self._unselected(layer, which.seed, at), weights)

    def _terms_of_a_sum(self) -> None:
        """What experts give must be added to the residual stream as it is.

        Raises:
            HookError: the family puts a norm between, or rescales the stream.
        """
        family = self.model.family
        if not getattr(family, "adds_as_computed", True):
            raise HookError(
                f"in {family.model_type}, what experts give is not added to the residual stream as it is "
                f"({family.note or 'a norm follows the MoE block'}): it is no term of a sum. "
                "hook_expert_weighted and hook_routed_out can be read and edited all the same"
            )

    def _n_slots(self, layer: int) -> int | None:
        """Slots of a layer in the run that was cached; None if nothing shows it."""
        axes = {names.EXPERT_INDICES: -1, names.ROUTING_WEIGHTS: -1, names.EXPERT_OUT: -2, names.EXPERT_WEIGHTED: -2}
        held = (self[full].shape[axis] for name, axis in axes.items() if (full := names.mlp(name, layer)) in self)
        return next(held, None)

    def _check(self, which: PartialSum, layer: int) -> None:
        self._terms_of_a_sum()
        self._check_ids("rank", which.ranks or (), self._n_slots(layer) or self.model.top_k)
        self._check_ids("expert", which.experts or (), self.model.n_experts)

    def _check_ids(self, what: str, numbers: Any, count: int) -> None:
        if isinstance(numbers, Ids) and numbers.mask is not None:
            numbers.check(f"{what}s", count)
        wrong = [number for number in numbers if one_id(what, number) >= count]
        if wrong:
            raise InputError(f"there is no {what} {wrong[0]}; the model has {what}s 0 to {count - 1}")
