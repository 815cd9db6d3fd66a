"""What all lenses share: from a point of the residual stream to logits, and from a cache to a `LensResult`."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens import names
from moe_lens.checked import AnyModel, Natural, Positive
from moe_lens.errors import InputError
from moe_lens.ids import in_order
from moe_lens.lenses.decoding import Decoding
from moe_lens.lenses.lens_result import LensResult
from moe_lens.model.experts.offloaded_experts import every_parameter
from moe_lens.model.loading.dispatch import output_place
from moe_lens.partial_sum import PartialSum
from moe_lens.reprs import Summary


class Lens(Summary, ABC):
    """Reads points of the residual stream as next-token distributions, through the model's final norm and unembedding.

    A lens translates a point into the basis that the final norm reads; everything else is the same for all lenses.

    Args:
        model: A `HookedMoE`.
    """

    def __init__(self, model: AnyModel):
        self.model = model

    def _facts(self) -> dict[str, Any]:
        return {"model": self.model.cfg.model_name, "layers": self.model.cfg.n_layers}

    @abstractmethod
    def translate(self, resid: Float[Tensor, "*axes d_model"], layer: Natural) -> Float[Tensor, "*axes d_model"]:
        """A point of the residual stream at a layer, translated into the basis of the last layer's output.

        Raises:
            InputError: the model has no such layer, or a stream of another width.
        """

    def _check_point(self, resid: Float[Tensor, "*axes width"], layer: int) -> None:
        cfg = self.model.cfg
        if layer >= cfg.n_layers or resid.shape[-1:] != (cfg.d_model,):
            raise InputError(
                f"got a stream {list(resid.shape)} at layer {layer}; expected layer 0 to {cfg.n_layers - 1} and a last "
                f"axis of {cfg.d_model}"
            )

    def logits(self, resid: Float[Tensor, "*axes d_model"], layer: Natural) -> Float[Tensor, "*axes d_vocab"]:
        """FinalNorm(translate(resid)) W_U; differentiable.

        Args:
            resid: Any points of the residual stream, of any precision.
            layer: Their layer, 0 to n_layers − 1.
        """
        return self.unembed(self.translate(self.placed(resid), layer))

    def placed(self, resid: Float[Tensor, "*axes width"]) -> Float[Tensor, "*axes width"]:
        """Points of the residual stream where the unembedding is, and in its precision: a cache may be elsewhere."""
        return resid.to(*output_place(self.model.original_model))

    def unembed(self, resid: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_vocab"]:
        """FinalNorm(resid) W_U with the family's own scaling: the model's logits, at its last residual stream.

        Args:
            resid: Any points of the residual stream, of any precision, in the basis of the last layer.

        Raises:
            InputError: A stream of another width.
        """
        if resid.shape[-1] != self.model.cfg.d_model:
            raise InputError(f"got a stream {list(resid.shape)}; expected a last axis of {self.model.cfg.d_model}")
        logits = self.model.unembed(self.model.ln_final(self.placed(resid)))
        return self.model.adapter.apply_output_logits_transform(logits)

    def unembedding_digest(self) -> str:
        """SHA-256 of the final norm and the unembedding in bfloat16, whatever the dtype of the loaded model."""
        digest = hashlib.sha256()
        for module in (self.model.ln_final, self.model.unembed):
            for parameter in every_parameter(module):
                rounded = parameter.detach().to(torch.bfloat16).cpu().contiguous()
                digest.update(rounded.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()

    def hooks(self, layers: Collection[int] | None = None, sums: Collection[PartialSum] | None = None) -> list[str]:
        """The hooks that must be cached so that `decode` can read these layers.

        Args:
            layers: Which layers; all if not given.
            sums: The sums to read; if not given, hooks for any sum, which take several times the memory.
        """
        model = self.model
        residual = {which.residual for which in sums or ()} | ({"pre"} if sums is None else set())
        wanted = [names.block(names.RESID_POST, model.cfg.n_layers - 1)]
        count = model.cfg.n_layers
        for layer in range(count) if layers is None else in_order("layers", layers, count):
            wanted.append(names.block(names.RESID_MID, layer))
            wanted += [names.block(names.RESID_PRE, layer)] if "pre" in residual else []
            if layer not in model.moe_layers:
                wanted.append(names.block(names.BLOCK_MLP_OUT, layer))
                continue
            parts = [names.EXPERT_INDICES, names.ROUTING_WEIGHTS, names.ROUTED_OUT]
            parts += [names.SHARED_OUT] if model.has_shared(layer) else []
            slots = [which for which in sums or () if which.picks and which.drawn != "unselected"]
            parts += [names.EXPERT_WEIGHTED] if sums is None or any(which.weighted for which in slots) else []
            plain = any(not which.weighted and (which.picks or not which.restricted) for which in sums or ())
            parts += [names.EXPERT_OUT] if sums is None or plain else []
            unselected = any(which.drawn == "unselected" for which in sums or ())
            parts += [names.MLP_IN, names.ROUTER_LOGITS] if sums is None or unselected else []
            wanted += [names.mlp(name, layer) for name in parts]
        return list(dict.fromkeys(wanted))

    @torch.no_grad()
    def decode(
        self,
        cache: Any,
        sums: PartialSum | Sequence[PartialSum],
        *,
        layers: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        targets: Int[Tensor, "batch pos"] | None = None,
        top: Positive = 5,
    ) -> LensResult:
        """Read partial sums of a cache, in chunks of logits.

        Args:
            cache: A `MoECache` of this model that holds `hooks(layers, sums)`.
            sums: One sum or several, read in every layer.
            layers: Which layers; all if not given. Sums that name ranks or experts are not read in dense layers.
            positions: Which positions of the cache, negative ones from its end; all if not given.
            targets: The target token at each of the positions, −1 for none; the next token of the text if not given.
            top: How many of the most likely tokens to keep.

        Raises:
            HookError: The cache lacks activations (the message names all of them), or a sum that names experts is
                requested for dense layers only.
            InputError: The cache of another model, no sum, or ranks, experts, layers or positions that do not exist.
        """
        return Decoding(self, cache, [sums] if isinstance(sums, PartialSum) else sums, layers, positions).run(
            targets, top
        )
