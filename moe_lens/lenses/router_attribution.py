"""Why a token was sent to an expert: a router logit as the sum of what wrote it, and what router rows point at."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from moe_lens import names
from moe_lens.checked import AnyModel, Natural
from moe_lens.errors import HookError, InputError
from moe_lens.model.experts.offloaded_experts import numbers_of
from moe_lens.reprs import Summary
from moe_lens.routing import LayerRouting

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Greatest deviation of the sum of all components from the router logits, as a share of the largest component.

Norms of several families compute in float32 even in a float64 model."""


@dataclass(frozen=True, eq=False)
class RouterAttrs(Summary):
    """The router logits of a layer, each the sum of what earlier parts of the model wrote."""

    layer: Natural
    labels: tuple[str, ...]
    """`embed`, `0_head_3`, `0_attn_bias`, `0_mlp_out`, `1_shared_out`, `1_rank_0` or `1_expert_17`, and `constant`."""
    values: Float[Tensor, "component *tokens n_experts"]
    """What each component adds to each expert's router logit."""
    logits: Float[Tensor, "*tokens n_experts"]
    """The router logits of the run: the sum of the components, up to rounding."""

    def centred(self) -> "RouterAttrs":
        """With the mean over experts subtracted from every component, and from the logits.

        What raises all experts alike chooses none: this is what a softmax router decides by.
        """
        values, logits = (x - x.mean(-1, keepdim=True) for x in (self.values, self.logits))
        return replace(self, values=values, logits=logits)

    def to_frame(self, expert: Natural | None = None) -> pd.DataFrame:
        """One row per component, batch, position and expert, or of one expert alone: component, …, logit.

        Raises:
            InputError: There is no such expert.
        """
        n_experts = self.logits.shape[-1]
        if expert is not None and not 0 <= expert < n_experts:
            raise InputError(f"there is no expert {expert}; the layer has 0 to {n_experts - 1}")
        values = self.values if self.values.ndim == 4 else self.values[:, None]
        experts = range(n_experts) if expert is None else [expert]
        axes = [self.labels, range(values.shape[1]), range(values.shape[2]), experts]
        index = pd.MultiIndex.from_product(axes, names=["component", "batch", "pos", "expert"])
        shown = values[..., list(experts)].detach().float().cpu().flatten().numpy()
        return pd.DataFrame({"logit": shown}, index=index).reset_index()


def router_attrs_hooks(model: AnyModel, layer: Natural, *, heads: bool = True) -> list[str]:
    """The names that a cache must hold for `router_attrs` at a layer: everything that writes before its experts.

    Raises:
        HookError: The layer is dense, or the family has no such hooks.
    """
    if layer not in model.moe_layers:
        raise HookError(f"layer {layer} has no router; the layers with experts are {list(model.moe_layers)}")
    wanted = [names.block(names.RESID_PRE, 0)]
    for before in range(layer + 1):
        wanted.append(names.block(names.ATTN_OUT, before))
        wanted += [_z(before)] if heads else []
        if before == layer:
            break
        if before not in model.moe_layers:
            wanted.append(names.block(names.BLOCK_MLP_OUT, before))
            continue
        wanted += [names.mlp(name, before) for name in (names.EXPERT_WEIGHTED, names.EXPERT_INDICES)]
        wanted.append(names.mlp(names.ROUTING_WEIGHTS, before))
        wanted += [names.mlp(names.SHARED_OUT, before)] if model.has_shared(before) else []
    wanted += [_scale(layer), names.mlp(names.ROUTER_LOGITS, layer)]
    absent = [name for name in wanted if model.get_hook_point(name) is None]
    if absent and all(name.endswith("attn.hook_z") for name in absent):
        raise HookError("the attention of this family has no hooks for its heads; pass heads=False to keep it whole")
    if absent:
        raise HookError(f"what this family's routers read cannot be taken apart: it has no hooks {absent}")
    return wanted


@torch.no_grad()
def router_attrs(
    cache: Any, layer: Natural, *, by: Literal["rank", "expert"] = "rank", heads: bool = True
) -> RouterAttrs:
    """The router logits of a layer as a sum over the embedding, attention heads and upstream experts.

    A router is linear in the normed residual stream. With the norm's scale frozen at what it was in the run, every
    component c that was added to the stream adds W_router (gain ⊙ c / scale) to the logits, exactly: the components sum
    to the logits. What a component would do to the scale is left out.

    Args:
        cache: A `MoECache` that holds `router_attrs_hooks(model, layer, heads=heads)`.
        layer: A layer with experts.
        by: One component per rank of an upstream layer, or per expert (zero where a token did not choose it).
        heads: Whether attention is taken apart into heads, each with what it moved from all positions; otherwise it is
            one component a layer, as it has to be where a family's attention does not end in one output matrix.

    Raises:
        HookError: The cache lacks something (the message names it), the layer is dense, or the family lacks the hooks.
        InputError: The family's attention cannot be taken apart, or its router is not linear in the normed stream.
    """
    model = cache.model
    missing = [name for name in router_attrs_hooks(model, layer, heads=heads) if name not in cache]
    if missing:
        raise HookError(f"the cache lacks {missing}; router_attrs_hooks(model, {layer}) lists what to cache")
    logits = cache[names.mlp(names.ROUTER_LOGITS, layer)]
    if len(model.W_router[layer]) != logits.shape[-1]:
        raise InputError(f"{len(model.W_router[layer])} router rows make {logits.shape[-1]} logits: not one for each")
    labels: list[str] = []
    values: list[Tensor] = []
    for part, stack in _components(cache, layer, heads):
        labels += part
        values.append(_through_router(cache, layer, stack))
    values.append(_constant(model, layer).expand_as(logits)[None])
    labels.append("constant")
    joined = torch.cat(values)
    off = (joined.sum(0) - logits.to(joined)).abs().max()
    allowed = _TOLERANCE[logits.dtype] * joined.abs().max()
    if not off <= allowed:
        raise InputError(
            f"the components of layer {layer} miss its router logits by {off:.2g} (allowed: {allowed:.2g}): this "
            "family scales or norms what it adds to the residual stream, a hook edited the run, or the cache is of "
            "another model"
        )
    if by == "expert":
        labels, joined = _by_expert(cache, labels, joined)
    return RouterAttrs(layer, tuple(labels), joined, logits)


def _components(cache: Any, layer: int, heads: bool) -> Iterator[tuple[list[str], Tensor]]:
    """Labels and stacks [component, …, d_model] that sum to the stream between attention and experts."""
    stack, labels = cache.decompose_experts(layer)
    attention = {f"{before}_attn_out": before for before in range(layer + 1)}
    kept = [i for i, label in enumerate(labels) if not heads or label not in attention]
    yield [labels[i] for i in kept], stack[kept]
    if not heads:
        yield [f"{layer}_attn_out"], cache[names.block(names.ATTN_OUT, layer)][None]
        return
    for before in attention.values():
        yield _heads(cache, before)


def _heads(cache: Any, layer: int) -> tuple[list[str], Tensor]:
    """z_h W_O of each head, and the bias if there is one."""
    model = cache.model
    whole, z = cache[names.block(names.ATTN_OUT, layer)], cache[_z(layer)]
    model._check_places()
    projection = getattr(getattr(model.blocks[layer].attn, "o", None), "original_component", None)
    n_heads = int(model.cfg.n_heads)
    if z.ndim == whole.ndim + 1:
        z = z.flatten(-2)  # TransformerLens cuts the latent attention of DeepSeek-V2 and V3 at the wrong places
    if not isinstance(projection, torch.nn.Linear) or z.shape[-1] != projection.in_features or z.shape[-1] % n_heads:
        raise InputError(
            f"the attention of layer {layer} does not end in one output matrix that reads {n_heads} heads; "
            "pass heads=False to keep it whole"
        )
    matrix = rearrange(numbers_of(projection), "d_model (head width) -> head width d_model", head=n_heads)
    z = rearrange(z, "... (head width) -> head ... width", head=n_heads)
    stack = torch.stack([part @ weight for part, weight in zip(z, matrix, strict=True)])
    labels = [f"{layer}_head_{head}" for head in range(n_heads)]
    bias: Any = numbers_of(projection, "bias")
    if bias is not None:
        stack = torch.cat([stack, bias.expand_as(whole)[None]])
        labels.append(f"{layer}_attn_bias")
    off = (stack.sum(0) - whole).abs().max()
    if not off <= _TOLERANCE[whole.dtype] * stack.abs().max():
        raise InputError(
            f"the heads of layer {layer} miss what attention wrote by {off:.2g}: something stands behind them in this "
            "family, or a hook edited the run; pass heads=False"
        )
    return labels, stack


def _through_router(
    cache: Any, layer: int, stack: Float[Tensor, "component *tokens d_model"]
) -> Float[Tensor, "component *tokens n_experts"]:
    """W_router (gain ⊙ c / scale) of each component."""
    rows = cache.model.W_router[layer].detach()
    normed = cache.apply_ln_to_stack(stack, layer, mlp_input=True, has_batch_dim=cache.has_batch_dim)
    wide = torch.promote_types(torch.promote_types(rows.dtype, normed.dtype), torch.float32)
    return normed.to(wide) @ rows.to(normed.device, wide).T


def _constant(model: Any, layer: int) -> Float[Tensor, " n_experts"]:
    """What no component wrote: the router's bias, and the norm's."""
    rows = model.W_router[layer].detach()
    found = torch.zeros(rows.shape[0], dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
    for bias, through in ((router_bias(model, layer), None), (_bias(model.blocks[layer].ln2.original_component), rows)):
        if bias is not None:
            found += bias.detach().to(found) if through is None else through.to(found) @ bias.detach().to(found)
    return found


def router_bias(model: Any, layer: int) -> Float[Tensor, " n_experts"] | None:
    """What a router adds to its product to make logits, not the bias for the choice; None where it adds nothing."""
    return _bias(getattr(model._moe(layer), model.family.router))


def _bias(module: Any) -> Tensor | None:
    return None if getattr(module, "bias", None) is None else numbers_of(module, "bias")


def _by_expert(cache: Any, labels: list[str], values: Tensor) -> tuple[list[str], Tensor]:
    """What upstream ranks add, under the names of the experts that had them."""
    n_experts = cache.model.n_experts
    found: list[str] = []
    parts: list[Tensor] = []
    for i, label in enumerate(labels):
        before, _, rank = label.partition("_rank_")
        if not rank:
            found.append(label)
            parts.append(values[i : i + 1])
        elif rank == "0":
            routing: LayerRouting = cache.routing(int(before))
            chosen = rearrange(routing.indices, "... rank -> rank ...")[..., None]
            ranks = values[i : i + len(chosen)]
            moved = ranks.new_zeros(n_experts, *ranks.shape[1:])
            into = chosen.clamp(min=0).expand_as(ranks)  # slots without an expert add nothing to the first
            parts.append(moved.scatter_add_(0, into.to(ranks.device), ranks))
            found += [f"{before}_expert_{expert}" for expert in range(n_experts)]
    return found, torch.cat(parts)


def _z(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"


def _scale(layer: int) -> str:
    return f"blocks.{layer}.ln2.hook_scale"
