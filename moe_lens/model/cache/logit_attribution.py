"""Direct attribution to logits, right for a model whose norms keep their gain."""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_lens import names
from moe_lens.checked import FromEnd, Natural
from moe_lens.errors import InputError
from moe_lens.model.cache.hook_cache import Cut, HookCache, as_slice
from moe_lens.model.experts.offloaded_experts import numbers_of


class AttributionCache(HookCache):
    """TransformerLens's attribution with the norm's gain, which TransformerLens omits."""

    def apply_ln_to_stack(
        self,
        residual_stack: Float[Tensor, "component *tokens d_model"],
        layer: FromEnd | None = None,
        mlp_input: bool = False,
        pos_slice: Cut = None,
        batch_slice: Cut = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Float[Tensor, "component *sliced d_model"]:
        """What each component adds to what a block, or the unembedding, reads: TransformerLens's method, with the gain.

        TransformerLens leaves the gain out, which is correct only if it was folded into the weights after the norm.

        Args:
            residual_stack: components of the residual stream at every token of the cache, or at the positions of
                `pos_slice`;
                a single one may lack the axis of components.
            layer: the block that reads it; None or -1 for the unembedding.
            mlp_input: whether the block's MLP reads it, instead of its attention.
            pos_slice: positions that `residual_stack` has been cut to.
            batch_slice: items of the batch to take.
            has_batch_dim: whether `residual_stack` has a batch axis.
            recompute_ln: apply the final norm to each component, with that component's own scale.

        Raises:
            HookError: the norm's scale was not cached, or there is no such layer.
            InputError: components of other tokens than the scale.
        """
        layer = self._end(layer)
        final = layer == self.model.cfg.n_layers
        where, items = self._where(pos_slice), as_slice(batch_slice)
        if not (final and recompute_ln):
            if batch_slice is not None and has_batch_dim:
                self._check_items(residual_stack, self._get_cached_ln_scale(layer, mlp_input, where, as_slice(None)))
            cut = items.apply(residual_stack, dim=1) if has_batch_dim else residual_stack
            scale = self._get_cached_ln_scale(layer, mlp_input, where, items)
            batched = has_batch_dim or not self.has_batch_dim
            alone = batched and batch_slice is None and cut.shape[:-1] == scale.shape[:-1]
            self._check_tokens(cut[None] if alone else cut, scale.shape[:-1], has_batch_dim)
        given = residual_stack
        if final and recompute_ln:
            dtype = gain(self.model.ln_final).dtype
            if torch.finfo(given.dtype).bits > torch.finfo(dtype).bits:
                given = given.to(dtype)  # torch's own norms take no wider input than their weights
        scaled = super().apply_ln_to_stack(given, layer, mlp_input, where, items, has_batch_dim, recompute_ln)
        if final and recompute_ln:
            return scaled.to(torch.promote_types(scaled.dtype, residual_stack.dtype))  # by the norm itself, with gain
        block = None if final else self.model.blocks[layer]
        self.model._check_places()
        norm = self.model.ln_final if block is None else block.ln2 if mlp_input else block.ln1
        return scaled * gain(norm).to(scaled)

    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "component *tokens d_model"],
        tokens: str | Natural | Int[Tensor, "..."],
        incorrect_tokens: str | Natural | Int[Tensor, "..."] | None = None,
        pos_slice: Cut = None,
        batch_slice: Cut = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, "component *sliced"]:
        """What each component adds to a token's logit, or to the difference of two logits, with the final norm frozen.

        (component ⊙ gain / scale) · W_U[:, token], with the scale that the run had. Over all components of
        `decompose_experts()` it sums to the logit (without the biases of the final norm and of the unembedding, where a
        model has them: b_norm · W_U[:, token] + b_U[token], the same for every token of the text). Where a family
        bounds its logits (Gemma 4, Beam, Muse Spark, Mistral Large 4), it is the logit before the bound that is meant.
        Computed on the stack's device, in float32 at least.

        Args:
            residual_stack: components of the final residual stream.
            tokens: a token (string or id) for all positions, or ids [batch], [pos] or [batch, pos], in this order.
            incorrect_tokens: tokens, of the same shape, whose logits are subtracted.
            pos_slice: positions that `residual_stack` has been cut to.
            batch_slice: items of the batch to take.
            has_batch_dim: whether `residual_stack` has a batch axis.

        Raises:
            HookError: the scale of the final norm was not cached.
            InputError: tokens and incorrect tokens differ in shape, or components are of other tokens than the scale.
        """
        wide = torch.promote_types(residual_stack.dtype, torch.float32)
        direction = self._directions(tokens).to(residual_stack.device, wide)
        if incorrect_tokens is not None:
            other = self._directions(incorrect_tokens).to(direction)
            if other.shape != direction.shape:
                shapes = tuple(direction.shape[:-1]), tuple(other.shape[:-1])
                raise InputError(f"tokens and incorrect_tokens have shapes {shapes}; expected the same")
            direction = direction - other
        items = as_slice(batch_slice)
        where = self._where(pos_slice)
        if batch_slice is not None and has_batch_dim:
            self._check_items(residual_stack, self[names.FINAL_SCALE])
        stack = items.apply(residual_stack, dim=1) if has_batch_dim else residual_stack
        scale = where.apply(self[names.FINAL_SCALE], dim=-2)
        scale = (items.apply(scale) if self.has_batch_dim else scale).squeeze(-1)
        self._check_tokens(stack, scale.shape, has_batch_dim)
        scale = scale.reshape(stack.shape[1:-1])
        batched = has_batch_dim and items.mode != "int"
        if batched and stack.ndim == 4 and direction.ndim == 2 and len(direction) == stack.shape[1]:
            direction = direction.unsqueeze(-2)  # one token per item, at all its positions
        if not _broadcasts(direction.shape, stack.shape[1:]):
            shapes = tuple(direction.shape[:-1]), tuple(stack.shape[1:-1])
            raise InputError(
                f"tokens have shape {shapes[0]}; expected one, or what fits components of {shapes[1]} tokens"
            )
        scale = scale.to(direction)
        # (c ⊙ gain / scale) · w = c · (gain ⊙ w) / scale: nothing of the stack's size is made.
        direction = direction * gain(self.model.ln_final).to(direction)
        direction = direction * getattr(self.model.adapter, "logits_factor", 1.0)
        if self._uses_ln_centering(None):
            direction = direction - direction.mean(-1, keepdim=True)
        return torch.stack([(part.to(wide) * direction).sum(-1) / scale for part in stack])

    def _check_items(self, stack: Tensor, scale: Tensor) -> None:
        """Raise where a stack has been cut along the batch already: items would be taken of it once more."""
        if self.has_batch_dim and stack.ndim > 2 and stack.shape[1] != len(scale):
            raise InputError(
                f"the stack holds {stack.shape[1]} items of the batch, and the cache {len(scale)}; batch_slice takes "
                "items of the whole stack: do not cut it before"
            )

    def _check_tokens(self, stack: Tensor, scaled: Sequence[int], has_batch_dim: bool) -> None:
        """Raise where components and a norm's scale are of different tokens: a broadcast would mix them up."""
        d_model, found = self.model.cfg.d_model, tuple(stack.shape[1:-1])
        if stack.ndim < 2 or stack.shape[-1] != d_model:
            raise InputError(
                f"the stack has shape {tuple(stack.shape)}; expected components of the residual stream, [component, "
                f"batch, pos, {d_model}]"
            )
        expected = tuple(scaled)
        if found != expected and (has_batch_dim or (1, *found) != expected):
            raise InputError(
                f"the stack holds components of {found} tokens, and the cache has {expected} there; pos_slice says to "
                "which positions the stack has been cut"
            )

    def _directions(self, tokens: str | int | Int[Tensor, "..."]) -> Float[Tensor, "... d_model"]:
        """Columns of the unembedding."""
        ids = torch.as_tensor(self.model.to_single_token(tokens) if isinstance(tokens, str) else tokens)
        d_vocab = getattr(self.model.adapter, "n_logits", None) or self.model.cfg.d_vocab
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise InputError(f"tokens are {ids.dtype}; expected ids, which are whole numbers")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < d_vocab:
            raise InputError(f"tokens go from {ids.min()} to {ids.max()}; expected ids from 0 to {d_vocab - 1}")
        W_U = self.model.W_U.detach()
        return rearrange(W_U[:, ids.to(W_U.device)], "d_model ... -> ... d_model")


def gain(norm: Any) -> Float[Tensor, " d_model"]:
    """What a norm multiplies by: by 1 where its owner has put an Identity in its place."""
    if isinstance(norm.original_component, nn.Identity):
        return torch.ones(norm.config.d_model, dtype=norm.config.dtype)
    weight = numbers_of(norm.original_component).detach()
    return 1 + weight if norm.uses_weight_offset else weight


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(shape, target) == target
    except RuntimeError:
        return False
