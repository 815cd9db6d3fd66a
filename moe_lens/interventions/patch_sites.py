"""Where activations are patched: from a place in one run to the variant of another run that has it patched in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens import names
from moe_lens.interventions.clean_run import CleanRun, Variant
from moe_lens.routing import output_factors


@dataclass(frozen=True)
class Site:
    """One kind of activation that can be patched."""

    hooks: tuple[str, ...]
    """Bare names of the hooks that hold it."""
    in_block: bool = False
    """Whether they stand in the block rather than in its MLP."""
    sparse: bool = True
    """Whether only layers with experts have it."""
    units: tuple[str, ...] = ()
    """Axes beside layer and position that it can be swept over."""

    def names(self, layer: int) -> list[str]:
        """Full names of its hooks in a layer."""
        return [(names.block if self.in_block else names.mlp)(hook, layer) for hook in self.hooks]

    def layers(self, model: Any) -> tuple[int, ...]:
        """The layers of a model that have it."""
        known = model.hook_dict
        return tuple(at for at in range(model.cfg.n_layers) if all(name in known for name in self.names(at)))


SITES = {
    "resid_pre": Site((names.RESID_PRE,), in_block=True, sparse=False),
    "resid_mid": Site((names.RESID_MID,), in_block=True, sparse=False),
    "resid_post": Site((names.RESID_POST,), in_block=True, sparse=False),
    "attn_out": Site((names.ATTN_OUT,), in_block=True, sparse=False),
    "mlp_out": Site((names.MLP_OUT,), sparse=False),
    "routed_out": Site((names.ROUTED_OUT,)),
    "shared_out": Site((names.SHARED_OUT,)),
    "expert_out": Site((names.EXPERT_OUT, names.EXPERT_INDICES, names.ROUTING_WEIGHTS), units=("expert", "rank")),
    "expert_weighted": Site((names.EXPERT_WEIGHTED, names.EXPERT_INDICES), units=("expert", "rank")),
    "router_logits": Site((names.ROUTER_LOGITS,), units=("expert",)),
    "routing": Site((names.EXPERT_INDICES, names.ROUTING_WEIGHTS)),
}
"""All sites by name."""

Places = Bool[Tensor, "batch pos"]
Units = Callable[[Int[Tensor, "batch pos slot"], Int[Tensor, "batch pos slot"]], Bool[Tensor, "batch pos slot"]]
"""From the expert and the rank of each slot to whether it is patched."""


@dataclass(frozen=True, eq=False)
class Parts:
    """What patching adds to the routed sum of a layer, slot by slot.

    `expert_weighted`: the slots of the source with their g E and those of the base with −g E, so that an expert that
    the source did not choose loses its contribution, and one that the base did not choose gains the source's.
    `expert_out`: the base's own weight (1 where weights multiply inputs) times the difference of outputs. The same
    expert is the one with the same id (where either run did not choose it, nothing changes), the same rank is the slot
    of that rank, whatever its expert.
    """

    experts: Int[Tensor, "batch pos slot"]
    ranks: Int[Tensor, "batch pos slot"]
    values: Float[Tensor, "batch pos slot d_model"]

    @classmethod
    def of(cls, site: str, base: CleanRun, source: CleanRun, layer: int, by_expert: bool) -> "Parts":
        """Parts of a layer for `expert_weighted` or `expert_out`."""
        ids, other = base.indices(layer), source.indices(layer)
        rank = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
        if site == "expert_weighted":
            name = names.mlp(names.EXPERT_WEIGHTED, layer)
            values = torch.cat([source.cache[name], -base.cache[name]], 2)
            return cls(torch.cat([other, ids], 2), torch.cat([rank, rank], 2), values)
        name = names.mlp(names.EXPERT_OUT, layer)
        ours, theirs = base.cache[name], source.cache[name]
        if by_expert:
            same = ids[..., :, None] == other[..., None, :]
            theirs = torch.where(same.any(-1)[..., None], same.to(theirs.dtype) @ theirs, ours)
        factors = output_factors(base.weights(layer), base.cache.model.family)
        return cls(ids, rank, factors[..., None].to(ours.dtype) * (theirs - ours))

    def chosen(self, units: Units, places: Places) -> Bool[Tensor, "batch pos slot"]:
        """The slots that are patched."""
        return units(self.experts, self.ranks) & places[..., None]

    def variant(self, base: CleanRun, layer: int, slots: Bool[Tensor, "batch pos slot"]) -> Variant:
        """The base run with some slots patched."""

        def delta(items: Int[Tensor, " items"]) -> Float[Tensor, "items pos d_model"]:
            return (self.values[items] * slots[items][..., None]).sum(2)

        return base.adding(layer, names.EXPERT_WEIGHTED, delta, slots.any(-1))


def differing(site: str, base: CleanRun, source: CleanRun, layer: int) -> Places:
    """Where the activation is not the same in both runs, as before the first token that differs."""
    of_hooks = [(base.cache[name] != source.cache[name]).flatten(2).any(-1) for name in SITES[site].names(layer)]
    return torch.stack(of_hooks).any(0).to(base.logits.device)


def stream_variant(site: str, base: CleanRun, source: CleanRun, layer: int, places: Places) -> Variant:
    """The base run with an activation of the source at some places; for sites that are no experts' outputs."""
    if site in ("resid_pre", "resid_post"):
        at = layer + (site == "resid_post")

        def resid(items: Int[Tensor, " items"]) -> Float[Tensor, "items pos d_model"]:
            return _where(places[items], source.stream(at, items), base.stream(at, items))

        return Variant(at, resid, changed=places)
    hooks = SITES[site].names(layer)
    if site in ("mlp_out", "routed_out", "shared_out"):  # what they add to the stream
        ours, theirs = base.cache[hooks[0]], source.cache[hooks[0]]

        def delta(items: Int[Tensor, " items"]) -> Float[Tensor, "items pos d_model"]:
            return _where(places[items], theirs[items] - ours[items], torch.zeros_like(ours[items]))

        return base.adding(layer, SITES[site].hooks[0], delta, places)
    return Variant(layer, hooks=[(name, replace_at(places, source.cache[name])) for name in hooks], changed=places)


def logits_variant(
    base: CleanRun, source: CleanRun, layer: int, places: Places, experts: Bool[Tensor, " n_experts"]
) -> Variant:
    """The base run with some experts' router logits of the source."""
    (name,) = SITES["router_logits"].names(layer)
    value = torch.where(experts, source.cache[name], base.cache[name])
    return Variant(layer, hooks=[(name, replace_at(places, value))], changed=places)


def replace_at(places: Places, source: Float[Tensor, "batch pos *shape"] | Int[Tensor, "batch pos *shape"]) -> Any:
    """A hook of a variant: the source's activation at some places."""
    items = places.any(1)
    there, value = places[items], source[items]

    def replace(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001  # TransformerLens passes hook by name
        return _where(there.to(activation.device), value.to(activation), activation)

    return replace


def _where(places: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(places.view(*places.shape, *[1] * (no.ndim - 2)), yes, no)
