"""`MoECache`: TransformerLens's activation cache, with experts by token and parts that sum to the stream."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.utilities import Slice

from moe_lens import names
from moe_lens.checked import FromEnd, Natural, checked
from moe_lens.errors import HookError
from moe_lens.model.cache.hook_cache import Cut
from moe_lens.model.cache.residual_parts import ResidualPartsCache
from moe_lens.routing import LayerRouting, affinity
from moe_lens.selection import SelectedRows, Selection, Step


@checked
@dataclass(frozen=True, eq=False)
class ExpertRows:
    """One expert's output at every token."""

    values: Float[Tensor, "*tokens d_model"]
    """Zero where `mask` is false."""
    mask: Bool[Tensor, "*tokens"]
    """True at real tokens that selected the expert."""


class _Part(NamedTuple):
    """Components of the residual stream that come from the same hooks."""

    labels: list[str]
    hooks: list[str]
    moe_layer: int | None = None
    """For routed experts, the layer they are in."""


@checked
class MoECache(ResidualPartsCache):
    """Activations of one run by hook name: TransformerLens's cache, with methods for experts.

    `cache[…]` returns the stored tensor itself, as in TransformerLens: changing it in place changes the cache. Methods
    return new tensors, except `routing`, which holds the stored ones too. Axes are those of the cache: no batch axis
    after `remove_batch_dim`, and after a `pos_slice` the position axis has the cached positions only.

    Args:
        cache_dict: tensors by full hook name, or by either name of hooks that have two.
        model: the model that computed them.
        has_batch_dim: whether the tensors' first axis is the batch.
        tokens: ids at the cached positions.
        mask: true at real tokens, false at padding; None when there is no padding.
        following: the id of the next token of the text, also where only some positions were cached; −1 if none.
    """

    # Routing and experts

    def routing(self, layer: FromEnd) -> LayerRouting:
        """Routing of one layer: indices and weights by rank, and logits and affinities of all experts if cached.

        Affinities are computed from the logits in float32 at least. `Routing.stack` joins several layers.

        Raises:
            HookError: the layer is dense, or indices or weights were not cached.
        """
        layer = self._moe_layer(layer, "routing")
        indices, weights = names.mlp(names.EXPERT_INDICES, layer), names.mlp(names.ROUTING_WEIGHTS, layer)
        self._require(indices, weights)
        logits = names.mlp(names.ROUTER_LOGITS, layer)
        known = self.cache_dict.get(self._full_name(logits))
        return LayerRouting(
            layer=layer,
            n_experts=self.model.n_experts,
            indices=self[indices],
            weights=self[weights],
            logits=known,
            probs=None if known is None else affinity(known, self.model.family.score),
            mask=None if self.mask is None else self.mask.to(self[indices].device),
        )

    def expert_out(self, layer: FromEnd, *, expert: Natural, weighted: bool = False) -> ExpertRows:
        """Output of one expert at every token; zero where a token did not select it, and at padding.

        Args:
            layer: a layer with experts.
            expert: its id.
            weighted: whether to multiply by the routing weight.

        Raises:
            HookError: the layer is dense, or the outputs or indices were not cached.
            InputError: there is no such expert.
        """
        layer = self._moe_layer(layer, "experts")
        self._check_ids("expert", (expert,), self.model.n_experts)
        slots = self._slots(layer, weighted)
        self._require(names.mlp(names.EXPERT_INDICES, layer))
        chosen = self[names.mlp(names.EXPERT_INDICES, layer)] == expert
        mask = chosen.any(-1)
        if self.mask is not None:
            mask = mask & self.mask.to(mask.device)
        rank = chosen.int().argmax(-1)
        values = slots.take_along_dim(rank[..., None, None], dim=-2).squeeze(-2)
        return ExpertRows(values.masked_fill(~mask[..., None], 0), mask)

    def select(self, name: str, selection: Selection) -> SelectedRows:
        """The rows of an activation that a selection names, with the layer, token, rank and expert of each.

        The cached positions are counted from 0, as if they were the whole text.

        Args:
            name: `"expert_out"`, `"expert_weighted"`, `"routing_weights"`, `"expert_post"`, …
            selection: Experts or ranks, layers, positions.

        Raises:
            InputError: the model has no such layer, expert or rank.
            HookError: the activation or the indices were not cached, or the activation is not by rank.
        """
        selection.check(self.model)
        found = []
        for layer in selection.layers_of(self.model):
            indices, values = self["expert_indices", layer], self[name, layer]
            if not self.has_batch_dim:
                indices, values = indices[None], values[None]
            if values.shape[:3] != indices.shape:
                raise HookError(
                    f"{name} of layer {layer} is {tuple(values.shape)}; select takes what experts have by rank, "
                    f"{tuple(indices.shape)} (batch, pos, rank) and more axes, such as expert_out"
                )
            mask = None if self.mask is None else self.mask.view(indices.shape[:2]).to(indices.device)
            tokens = None if self.tokens is None else self.tokens.view(indices.shape[:2])
            step = Step(*indices.shape[:2], tokens=tokens, seen=mask)
            slots = selection.slots(layer, indices, selection.positions(step))
            batch, pos, rank = slots.nonzero(as_tuple=True)
            found.append((values[slots], torch.full_like(batch, layer), batch, pos, rank, indices[slots]))
        return SelectedRows(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    # The whole in parts

    def decompose_experts(
        self,
        layer: FromEnd | None = None,
        *,
        by: Literal["rank", "expert"] = "rank",
        apply_ln: bool = False,
        pos_slice: Cut = None,
        return_labels: bool = True,
    ) -> Any:
        """The residual stream entering a block, or leaving the last one, as a stack of components that sum to it.

        Components are `embed` (what enters block 0), `3_attn_out`, `0_mlp_out` of dense layers, `3_shared_out`, and
        `3_rank_0` or `3_expert_17`: weighted outputs, zero where a token did not select the expert. By expert there
        are `n_experts` components in each layer: 27 × 64 in DeepSeekMoE 16B, 14 MB for each token in float32; use
        `pos_slice` to limit the positions.

        Args:
            layer: components before this block; None (or -1, as in TransformerLens) for the whole model.
            by: one component per rank, or per expert.
            apply_ln: divide by the cached scale of the norm that follows and multiply by its gain.
            pos_slice: positions to take.
            return_labels: whether to return the labels too.

        Returns:
            The stack, [component, batch, pos, d_model], and its labels; or the stack alone.

        Raises:
            HookError: hooks that are needed were not cached; the message names them all.
        """
        self._terms_of_a_sum()
        where = self._where(pos_slice)
        end = self._end(layer)
        parts = list(self._parts(end, by))
        self._require(*(hook for part in parts for hook in part.hooks))
        labels = [label for part in parts for label in part.labels]
        embed = where.apply(self[parts[0].hooks[0]], dim=-2)
        stack = embed.new_zeros(len(labels), *embed.shape)
        row = 0
        for part in parts:
            rows = stack[row : row + len(part.labels)]
            if part.moe_layer is None:
                rows[0] = where.apply(self[part.hooks[0]], dim=-2)
            else:
                self._fill(rows, part.moe_layer, by, where)
            row += len(rows)
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, end, pos_slice=where, has_batch_dim=self.has_batch_dim)
        return (stack, labels) if return_labels else stack

    def _parts(self, end: int, by: str) -> Iterator[_Part]:
        """What stands before block `end`, in order."""
        yield _Part(["embed"], [names.block(names.RESID_PRE, 0)])
        for layer in range(end):
            hooks = self.model.hook_dict  # in hybrid families, a layer may lack attention or an MLP
            if names.block(names.ATTN_OUT, layer) in hooks:
                yield _Part([f"{layer}_attn_out"], [names.block(names.ATTN_OUT, layer)])
            layout = getattr(self.model.family, "layout", None)
            if layout is not None and layout.stream == "shortcut":
                for part in ("attn", *layout.added):
                    yield _Part([f"{layer}_{part}"], [names.block(f"{part}.hook_out", layer)])
            if layer not in self.model.moe_layers:
                if names.block(names.BLOCK_MLP_OUT, layer) in hooks:
                    yield _Part([f"{layer}_mlp_out"], [names.block(names.BLOCK_MLP_OUT, layer)])
                continue
            if self.model.has_shared(layer):
                yield _Part([f"{layer}_shared_out"], [names.mlp(names.SHARED_OUT, layer)])
            ready = [names.mlp(names.EXPERT_WEIGHTED, layer)]
            made = [names.mlp(names.EXPERT_OUT, layer), names.mlp(names.ROUTING_WEIGHTS, layer)]
            hooks = made if ready[0] not in self and all(name in self for name in made) else ready
            if by == "expert":
                hooks = [*hooks, names.mlp(names.EXPERT_INDICES, layer)]
            slots = self._n_slots(layer) or self.model.top_k
            count = slots if by == "rank" else self.model.n_experts
            yield _Part([f"{layer}_{by}_{number}" for number in range(count)], hooks, layer)

    def _fill(self, rows: Tensor, layer: int, by: str, where: Slice) -> None:
        """Write a layer's routed components into `rows`, [component, batch, pos, d_model], which are zero."""
        slots = rearrange(
            where.apply(self._slots(layer, weighted=True), dim=-3), "... rank d_model -> rank ... d_model"
        )
        if by == "rank":
            rows.copy_(slots)
        else:
            chosen = rearrange(
                where.apply(self[names.mlp(names.EXPERT_INDICES, layer)], dim=-2), "... rank -> rank ..."
            )
            where_to = chosen.clamp(min=0)[..., None].expand_as(
                slots
            )  # slots without an expert add nothing to the first
            rows.scatter_add_(0, where_to.to(rows.device), slots.to(rows))
