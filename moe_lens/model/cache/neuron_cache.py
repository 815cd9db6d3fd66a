"""What neurons add to the residual stream, those of experts by rank: TransformerLens's methods, for MoE layers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities import Slice

from moe_lens import names
from moe_lens.checked import FromEnd
from moe_lens.errors import HookError
from moe_lens.model.cache.hook_cache import Cut, as_slice
from moe_lens.model.cache.logit_attribution import gain
from moe_lens.model.cache.sum_cache import SumCache
from moe_lens.model.experts.offloaded_experts import at_hand
from moe_lens.routing import output_factors


class NeuronCache(SumCache):
    """Neurons as components of the residual stream."""

    def get_neuron_results(
        self, layer: FromEnd, neuron_slice: Cut = None, pos_slice: Cut = None, project_output_onto: Tensor | None = None
    ) -> Float[Tensor, "*tokens neurons_and_out"]:
        """What each neuron of a layer adds to the residual stream; in a MoE layer, each of the chosen experts' neurons.

        A neuron of the expert at rank r adds g_r · post_r[n] · W_out[expert_r, n]: its activation times its row of the
        output matrix times the expert's routing weight. Shared experts have other components, see
        `stack_neuron_results`.

        Args:
            layer: the layer.
            neuron_slice: neurons to take, of each expert in a MoE layer.
            pos_slice: positions to take.
            project_output_onto: directions, [d_model] or [d_model, out]; then no tensor [neuron, d_model] is made.

        Returns:
            [batch, pos, neuron, d_model], in a MoE layer [batch, pos, rank · neuron, d_model] with rank 0's neurons
            first; [batch, pos, neuron] for one direction, [batch, pos, neuron, out] for several.

        Raises:
            HookError: activations, indices or weights were not cached, the output of the family's experts is not a
                sum over neurons, or the layer has no MLP.
        """
        layer = self._layer(layer)
        where, neurons = self._where(pos_slice), as_slice(neuron_slice)
        if layer not in self.model.moe_layers:
            mlp = self.model.blocks[layer]._modules.get("mlp")
            if mlp is None:
                raise HookError(f"layer {layer} of this {self.model.family.model_type} has no MLP, and so no neurons")
            scale, onto = getattr(mlp, "multiplier", 1.0), project_output_onto
            with at_hand(mlp):
                onto = None if onto is None else onto.to(mlp.W_out)
                found = super().get_neuron_results(layer, neurons, where, onto)
            return found if scale == 1.0 else found * scale
        indices, acts = self._weighted_neurons(layer, where)
        acts, matrix = neurons.apply(acts, dim=-1), neurons.apply(self.model.W_out[layer].detach(), dim=1)
        if neurons.mode == "int":
            acts, matrix = acts[..., None], matrix[:, None]
        if project_output_onto is not None:
            onto = project_output_onto.to(matrix)
            matrix = matrix @ (onto[:, None] if onto.ndim == 1 else onto)
        found = (acts[..., None] * matrix[indices.to(matrix.device)].to(acts)).flatten(-3, -2)
        return found.squeeze(-1) if project_output_onto is not None and project_output_onto.ndim == 1 else found

    def stack_neuron_results(
        self,
        layer: FromEnd | None,
        pos_slice: Cut = None,
        neuron_slice: Cut = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
        mlp_input: bool = False,
    ) -> Any:
        """What MLPs and MoE layers before a layer add to the residual stream, neuron by neuron, as a stack.

        Labels are `L0N5` in dense layers and `L3R0N5` for neuron 5 of the expert at rank 0. A MoE layer has further
        components where they exist, so that all of them sum to what it adds: `L3shared` (its shared experts), `L3bias`
        (the output biases of its experts, weighted) and `L3identity` (experts that return their input). They are
        included whatever `neuron_slice` is. A dense layer whose neurons have no hook is one component, `L0mlp`; biases
        of dense layers are left out, as in TransformerLens.

        Args:
            layer: layers before this one; None or -1 for the whole model.
            pos_slice: positions to take.
            neuron_slice: neurons to take, of each expert in a MoE layer.
            return_labels: whether to return the labels, too.
            incl_remainder: whether to add a last component, `remainder`: the rest of the residual stream there.
            apply_ln: divide by the cached scale of the norm that follows and multiply by its gain.
            project_output_onto: directions, [d_model] or [d_model, out]; saves memory.
            mlp_input: whether `incl_remainder` and `apply_ln` use the stream before the layer's MLP.

        Raises:
            HookError: something was not cached, or the family's experts are no sums of neurons.
        """
        end = self._end(layer)
        where, neurons = self._where(pos_slice), as_slice(neuron_slice)
        neurons = Slice([cast(int, neurons.slice)]) if neurons.mode == "int" else neurons
        read = self._reader(end, where, apply_ln, mlp_input, project_output_onto)
        parts = [part for at in range(end) for part in self._of_layer(at, where, neurons, read)]
        labels = [label for names_, _ in parts for label in names_]
        stacks = [rows for _, rows in parts]
        if incl_remainder or not stacks:
            whole = read(
                where.apply(self["resid_mid", end] if mlp_input else self["resid_post", end - 1], dim=-2)[None]
            )
            neurons_give = sum((rows.sum(0) for rows in stacks), start=torch.zeros_like(whole[0]))
            stacks.append((whole - neurons_give)[: int(incl_remainder)])
            labels += ["remainder"] * incl_remainder
        stack = torch.cat(stacks)
        stack = stack.squeeze(-1) if project_output_onto is not None and project_output_onto.ndim == 1 else stack
        return (stack, labels) if return_labels else stack

    def _stream(self, end: int, mlp_input: bool, where: Slice) -> Tensor:
        """The residual stream before a layer or before its MLP, or behind the last layer."""
        if mlp_input:
            return where.apply(self["resid_mid", end], dim=-2)
        return where.apply(self["resid_post", end - 1] if end else self["resid_pre", 0], dim=-2)

    def _reader(self, end: int, where: Slice, apply_ln: bool, mlp_input: bool, onto: Tensor | None) -> "Reader":
        if onto is None:
            return Reader(self, end, where, mlp_input) if apply_ln else Reader()
        onto = onto[:, None] if onto.ndim == 1 else onto
        if not apply_ln:
            return Reader(onto=onto)
        scale = self._get_cached_ln_scale(end, mlp_input, where)
        # Norm, then projection: (x ⊙ gain / scale) · P = x · (gain ⊙ P) / scale, so that nothing wide is made.
        block = None if end == self.model.cfg.n_layers else self.model.blocks[end]
        self.model._check_places()
        norm = self.model.ln_final if block is None else block.ln2 if mlp_input else block.ln1
        onto = gain(norm).to(onto)[:, None] * onto
        if self._uses_ln_centering(end):
            onto = onto - onto.mean(0)
        return Reader(onto=onto, scale=scale)

    def _of_layer(self, layer: int, where: Slice, neurons: Slice, read: "Reader") -> Iterator[tuple[list[str], Tensor]]:
        """Labels and components of one layer, [component, *tokens, out]."""

        def single(label: str, values: Tensor) -> tuple[list[str], Tensor]:
            return [f"L{layer}{label}"], read(values[None])

        def taken(hook: str, dim: int = -2) -> Tensor:
            return where.apply(self[hook], dim=dim)

        experts = layer in self.model.moe_layers
        post = names.mlp(names.EXPERT_POST if experts else "hook_post", layer)
        if not experts and post not in self.model.hook_dict:
            if (whole := names.block(names.BLOCK_MLP_OUT, layer)) in self.model.hook_dict:
                yield single("mlp", taken(whole))
            return
        which = neurons.apply(torch.arange(self[post].shape[-1])).tolist()
        slots = [f"R{rank}" for rank in range(self[post].shape[-2])] if experts else [""]
        found = self.get_neuron_results(layer, neurons, where, read.onto)
        yield [f"L{layer}{slot}N{n}" for slot in slots for n in which], read.projected(found.movedim(-2, 0))
        if not experts:
            return
        if self.model.has_shared(layer):
            yield single("shared", taken(names.mlp(names.SHARED_OUT, layer)))
        indices = taken(names.mlp(names.EXPERT_INDICES, layer))
        if (bias := self.model._experts(layer).second()[1]) is not None:
            bias = bias if isinstance(bias, Tensor) else bias.read(range(bias.shape[0]))
            weights = output_factors(taken(names.mlp(names.ROUTING_WEIGHTS, layer)), self.model.family)
            weights = weights * taken(names.mlp(names.EXPERT_KEPT, layer))
            yield single("bias", (weights[..., None] * bias.detach()[indices.to(bias.device)].to(weights)).sum(-2))
        if self.model.n_identity_experts:
            identity = indices >= self.model.n_experts - self.model.n_identity_experts
            yield single("identity", (where.apply(self._slots(layer, True), dim=-3) * identity[..., None]).sum(-2))

    def _weighted_neurons(self, layer: int, where: Slice) -> tuple[Tensor, Tensor]:
        """Experts by rank, and their neurons' activations times the routing weights.

        Identities have neither: their place is taken by the first expert's matrix, times zero.
        """
        self._terms_of_a_sum()
        family, experts = self.model.family, self.model._experts(layer)
        if experts.post_norm or getattr(family, "widens", None) is not None:
            raise HookError(
                f"in {family.model_type}, what neurons of experts give passes a norm or a projection before it is "
                "added to the residual stream: they are no terms of a sum. Their hooks can be read and edited"
            )
        hooks = [names.mlp(name, layer) for name in (names.EXPERT_INDICES, names.ROUTING_WEIGHTS, names.EXPERT_POST)]
        self._require(*hooks)
        indices, weights, post = (
            where.apply(self[hook], dim=dim) for hook, dim in zip(hooks, (-2, -2, -3), strict=True)
        )
        post = post * output_factors(weights, family)[..., None].to(post)
        if self.model.n_identity_experts:
            identity = indices >= self.model.n_experts - self.model.n_identity_experts
            indices, post = indices.masked_fill(identity, 0), post.masked_fill(identity[..., None], 0)
        return indices, post


@dataclass(frozen=True)
class Reader:
    """What is made of components: as they are, as the next norm leaves them, or what they give in some directions."""

    cache: Any = None
    """Applies the norm, if there is no projection."""
    end: int = 0
    where: Any = None
    mlp_input: bool = False
    onto: Tensor | None = None
    """[d_model, out], the norm's gain included."""
    scale: Tensor | None = None

    def __call__(self, stack: Float[Tensor, "component *tokens d_model"]) -> Float[Tensor, "component *tokens out"]:
        """Components of the residual stream, as they are read."""
        return self.projected(stack if self.onto is None else stack @ self.onto.to(stack))

    def projected(self, stack: Float[Tensor, "component *tokens out"]) -> Float[Tensor, "component *tokens out"]:
        """The same for components that are projected already."""
        if self.cache is not None:
            return self.cache.apply_ln_to_stack(
                stack, self.end, self.mlp_input, self.where, has_batch_dim=self.cache.has_batch_dim
            )
        return stack if self.scale is None else stack / self.scale.to(stack)
