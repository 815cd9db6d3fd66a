"""The whole residual stream as a stack of heads, neurons and the rest: TransformerLens's methods, held to their sum."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens.utilities import Slice

from moe_lens import names
from moe_lens.checked import FromEnd
from moe_lens.errors import HookError
from moe_lens.model.cache.hook_cache import Cut
from moe_lens.model.cache.neuron_cache import NeuronCache, Reader
from moe_lens.model.experts.offloaded_experts import at_hand


class ResidualPartsCache(NeuronCache):
    """Components that sum to the residual stream."""

    def decompose_resid(
        self,
        layer: FromEnd | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Cut = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """TransformerLens's: what each sublayer before a layer adds to the residual stream.

        Args:
            layer: components before this layer; None or -1 for the whole model.
            mlp_input: up to the layer's MLP.
            mode: sublayers of which kind.
            apply_ln: divide by the cached scale of the norm that follows and multiply by its gain.
            pos_slice: positions to take.
            incl_embeds: whether what enters the first block, the embedding, is a component.
            return_labels: whether to return the labels, too.

        Raises:
            HookError: something was not cached, there is nothing to stack or no such layer, or the family's layers are
                made otherwise.
            InputError: another mode.
        """
        where, end = self._where(pos_slice), self._end(layer)
        for name, left_out in ((names.ATTN_OUT, "mlp"), (names.BLOCK_MLP_OUT, "attn")):
            lacking = [at for at in range(end) if names.block(name, at) not in self.model.hook_dict]
            if lacking and mode != left_out:
                raise HookError(
                    f"in {self.model.family.model_type}, layer {lacking[0]} has no {name}: not every layer adds "
                    "attention, and then an MLP. decompose_experts() gives the components that there are"
                )
        found = {"embed": self._embedded()} if incl_embeds else {}
        for at in range(end + mlp_input):
            if mode != "mlp":
                found[f"{at}_attn_out"] = self["attn_out", at]
            if mode != "attn" and at < end:
                found[f"{at}_mlp_out"] = self["mlp_out", at]
        if not found:
            raise HookError("without the embedding there is no component before layer 0")
        stack = self._reader(end, where, apply_ln, mlp_input, None)(
            torch.stack([where.apply(part, dim=-2) for part in found.values()])
        )
        return (stack, [*found]) if return_labels else stack

    def _embedded(self) -> Tensor:
        """What enters the first block: the embedding, also where a pass began with embeddings."""
        entering = names.block(names.RESID_PRE, 0)
        return self["hook_embed"] if self.has_embed and entering not in self else self[entering]

    def accumulated_resid(
        self,
        layer: FromEnd | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Cut = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """TransformerLens's: the residual stream before each layer up to one.

        Args:
            layer: the last one; None or -1 for the stream after the last layer.
            incl_mid: whether the stream before each MLP is there, too.
            apply_ln: apply the norm that reads the last stream: after the last layer the final norm, with each stream's
                own scale; before another layer that layer's norm, with the cached scale.
            pos_slice: positions to take.
            mlp_input: up to the layer's MLP.
            return_labels: whether to return the labels, too.

        Raises:
            HookError: something was not cached, or there is no such layer.
        """
        where = self._where(pos_slice)
        return super().accumulated_resid(self._end(layer), incl_mid, apply_ln, where, mlp_input, return_labels)

    def stack_activation(self, activation_name: str, layer: FromEnd = -1, sublayer_type: str | None = None) -> Any:
        """TransformerLens's: an activation of every layer before one, as a stack.

        Args:
            activation_name: short, such as `"resid_pre"`.
            layer: layers before this one; -1 for all.
            sublayer_type: see TransformerLens's `get_act_name`.

        Raises:
            HookError: something was not cached, or there is no such layer.
        """
        end = self._end(layer)
        if not end:
            raise HookError("there is no layer before layer 0 to stack")
        return super().stack_activation(activation_name, end, sublayer_type)

    def get_full_resid_decomposition(
        self,
        layer: FromEnd | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Cut = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Any:
        """The residual stream that a layer reads, as a stack of components that sum to it.

        Attention heads, neurons (of experts by rank, see `stack_neuron_results`) or whole MLPs, the embedding, and
        biases. In DeepSeekMoE 16B, the neurons of one layer are 8,448 components: 69 MB a token in float32, unless they
        are projected. `decompose_experts` has whole experts as components.

        Args:
            layer: components before this layer; None or -1 for the whole model.
            mlp_input: up to the layer's MLP, its attention heads included.
            expand_neurons: neurons instead of whole MLPs or MoE layers.
            apply_ln: divide by the cached scale of the norm that follows and multiply by its gain.
            pos_slice: positions to take.
            return_labels: whether to return the labels, too.
            project_output_onto: directions, [d_model] or [d_model, out]; saves memory.

        Raises:
            HookError: something was not cached, or components do not sum to the residual stream, because a hook edited
                one after it was cached, or because the family adds something else.
        """
        self._terms_of_a_sum()
        end = self._end(layer)
        where, onto = self._where(pos_slice), project_output_onto
        read = self._reader(end, where, apply_ln, mlp_input, onto)
        at_once = onto is None  # in the widest dtype of the parts; projected ones are never made in full
        parts = list(self._labelled_parts(end, mlp_input, expand_neurons, where, Reader() if at_once else read))
        stack, labels = torch.cat([rows for _, rows in parts]), [label for of, _ in parts for label in of]
        stack = read(stack) if at_once else stack
        stream = self._stream(end, mlp_input, where)
        off = (stack.sum(0) - read(stream[None])[0]).abs().amax().item()
        # Parts, and what was kept, may be in a wider dtype than the run.
        rounded = max(torch.finfo(dtype).eps for dtype in (stack.dtype, stream.dtype, self.model.cfg.dtype))
        if off > 16 * rounded * stack.abs().sum(0).amax().item():
            raise HookError(
                f"components do not sum to the residual stream, but miss it by {off:.3g}: a hook edited one "
                f"after it was cached, or {self.model.family.model_type} adds something that is none of them"
            )
        stack = stack.squeeze(-1) if onto is not None and onto.ndim == 1 else stack
        return (stack, labels) if return_labels else stack

    def _labelled_parts(
        self, end: int, mlp_input: bool, expand_neurons: bool, where: Slice, read: Reader
    ) -> Iterator[tuple[list[str], Tensor]]:
        """Labels and components of the stream before a layer, [component, *tokens, out], in TransformerLens's order."""
        heads, labels = self.stack_head_results(end + mlp_input, True, pos_slice=where)
        yield labels, read(heads)
        if end and expand_neurons:
            for layer in range(end):
                yield from self._of_layer(layer, where, Slice(None), read)
        elif end:
            mlps, labels = self.decompose_resid(end, mlp_input, "mlp", False, where, False, True)
            yield labels, read(mlps)
        yield ["embed"], read(where.apply(self._embedded(), -2)[None])
        # of attention that is taken apart: what is one component has its bias in it
        bias = self.model._accumulated_bias(end, mlp_input, include_mlp_biases=expand_neurons)
        yield ["bias"], read(bias.to(heads.device).expand(1, *heads.shape[1:]))

    def stack_head_results(
        self,
        layer: FromEnd | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Cut = None,
        apply_ln: bool = False,
    ) -> Any:
        """As in TransformerLens; attention without hooks for heads is one component, `L0attn`.

        Args:
            layer: layers before this one; None or -1 for the whole model.
            return_labels: whether to return the labels, too.
            incl_remainder: whether to add a last component, `remainder`: the rest of the residual stream there.
            pos_slice: positions to take.
            apply_ln: divide by the cached scale of the norm that follows and multiply by its gain.

        Raises:
            HookError: something was not cached.
        """
        end, where = self._end(layer), self._where(pos_slice)
        hooks, layout = self.model.hook_dict, getattr(self.model.family, "layout", None)
        if layout is None and all(f"blocks.{at}.attn.hook_z" in hooks for at in range(end)):
            return super().stack_head_results(end, return_labels, incl_remainder, where, apply_ln)
        parts = ("attn", *layout.added) if layout is not None and layout.stream == "shortcut" else ()
        found = {f"L{at}attn": names.block(names.ATTN_OUT, at) for at in range(end)}
        found |= {f"L{at}{part}": names.block(f"{part}.hook_out", at) for at in range(end) for part in parts}
        found = {label: hook for label, hook in found.items() if hook in hooks}
        stream = self._stream(end, False, where)
        stack = torch.stack([where.apply(self[hook], dim=-2) for hook in found.values()] or [stream])[: len(found)]
        if incl_remainder:
            stack = torch.cat([stack, (stream - stack.sum(0))[None]])
        stack = self._reader(end, where, apply_ln, False, None)(stack)
        return (stack, [*found, *["remainder"] * incl_remainder]) if return_labels else stack

    def _ensure_head_results(self) -> bool:
        """TransformerLens's, for heads whose values are of another width than their keys (DeepSeek-V2, V3), too.

        They are in a graph where what they are made of is: a cache holds copies, unless it was made with `keep_graph`.
        """
        in_graph = any(
            ("z", layer, "attn") in self and self["z", layer, "attn"].requires_grad
            for layer in range(self.model.cfg.n_layers)
        )
        with torch.set_grad_enabled(in_graph and torch.is_grad_enabled()):
            wanted = [at for at in range(self.model.cfg.n_layers) if f"blocks.{at}.attn.hook_result" not in self]
            with at_hand(*(self.model.blocks[at]._modules.get("attn") for at in wanted)):
                return self._make_head_results()

    def _make_head_results(self) -> bool:
        for layer in range(self.model.cfg.n_layers):
            key, attention = f"blocks.{layer}.attn.hook_result", getattr(self.model.blocks[layer], "attn", None)
            if key in self.cache_dict or attention is None or ("z", layer, "attn") not in self:
                continue
            self.model._check_places()
            z, weights = self["z", layer, "attn"], attention.W_O
            if tuple(z.shape[-2:]) != tuple(weights.shape[:2]):
                z = z.flatten(-2).unflatten(-1, weights.shape[:2])
                self.cache_dict[key] = torch.einsum("...hd,hdm->...hm", z, weights.to(z))
        return super()._ensure_head_results()
