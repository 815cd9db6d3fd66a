"""HookedMoE: a TransformerBridge in which every Mixture-of-Experts layer is taken apart."""

from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import configure_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_lens import names
from moe_lens.errors import HookError, InputError
from moe_lens.model.adapter import build_adapter
from moe_lens.model.bridge import ExpertBridge
from moe_lens.model.experts import LayerHooks, experts_forward
from moe_lens.model.loading import load_pretrained
from moe_lens.model.parameters import LayerParameters, first_product, second_product
from moe_lens.model.saving import save_pretrained
from moe_lens.model.selfcheck import self_check
from moe_lens.routing import Routing


class HookedMoE(ExpertBridge):
    """A transformers MoE language model whose routers and experts are hook points.

    Use it as a TransformerBridge: `run_with_cache`, `run_with_hooks`, `hooks`, `generate`, `to_tokens`. The hook table
    is in `moe_lens.names`. Wrapping changes the transformers model in place: it belongs to the wrapper from then on.
    """

    # --- loading and saving ---

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, check: bool = True, trust_remote_code: bool = False, **kwargs: Any
    ) -> Self:
        """Load a model by hub name, local folder, or `"tiny-deepseekmoe"`, the embedded one.

        Args:
            name_or_path: what transformers' `from_pretrained` takes.
            check: run the self-check on a few tokens.
            trust_remote_code: run code that comes with the checkpoint; DeepSeekMoE does not need it.
            kwargs: `dtype`, `device_map`, `revision`, `cache_dir`, … as in transformers.

        Raises:
            CheckpointError: the checkpoint is not whole; names file and tensor.
            UnsupportedModelError: the family is not supported.
            SelfCheckError: the parts do not make up the whole.
        """
        model, tokenizer = load_pretrained(str(name_or_path), trust_remote_code=trust_remote_code, **kwargs)
        return cls.from_hf(model, tokenizer, name=str(name_or_path), check=check)

    @classmethod
    def from_hf(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str | None = None,
        check: bool = True,
    ) -> Self:
        """Wrap a loaded transformers model, in place and for good.

        Raises:
            UnsupportedModelError: the family is not supported, or the model is wrapped already.
            InputError: the tokenizer was not loaded from anywhere.
            SelfCheckError: the parts do not make up the whole.
        """
        if tokenizer is not None and "name_or_path" not in tokenizer.init_kwargs:
            raise InputError(
                "this tokenizer was not loaded from anywhere, and TransformerLens loads tokenizers again to add the "
                "BOS token: save it with its save_pretrained, and pass what AutoTokenizer loads from there"
            )
        adapter, family = build_adapter(model, name or getattr(model.config, "_name_or_path", "") or family_name(model))
        if tokenizer is not None:
            tokenizer = configure_tokenizer(tokenizer, adapter.cfg)
        hooked = cls(model, adapter, tokenizer, family)
        if check and not any(p.is_meta for p in model.parameters()):
            self_check(hooked)
        return hooked

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write the model (and tokenizer) as transformers does, in the family's original format.

        Args:
            folder: where to.
            kwargs: of transformers' `save_pretrained`.
        """
        model: Any = self.original_model
        save_pretrained(model, self._original_names, self.tokenizer, Path(folder), **kwargs)

    # --- what the model is ---

    @property
    def W_router(self) -> LayerParameters:
        """Router rows, `W_router[layer]` [n_experts, d_model]."""
        router = self.family.router
        return LayerParameters(
            "W_router", {at: lambda at=at: getattr(self._moe(at), router).weight for at in self.moe_layers}
        )

    @property
    def W_gate(self) -> LayerParameters:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Activated branch of the experts, `W_gate[layer, expert]` [d_model, d_expert]."""
        return self._first("W_gate", 0)

    @property
    def W_in(self) -> LayerParameters:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Linear branch of the experts, `W_in[layer, expert]` [d_model, d_expert]."""
        return self._first("W_in", 1)

    @property
    def W_out(self) -> LayerParameters:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Output matrix of the experts, `W_out[layer, expert]` [d_expert, d_model]."""
        return LayerParameters(
            "W_out", {at: lambda at=at: second_product(self._moe(at).experts) for at in self.moe_layers}
        )

    def _first(self, name: str, branch: int) -> LayerParameters:
        interleaved = self.family.interleaved
        return LayerParameters(
            name,
            {at: lambda at=at: first_product(self._moe(at).experts, branch, interleaved) for at in self.moe_layers},
        )

    # --- routing ---

    def routing(self, input: str | list[str] | Tensor, **kwargs: Any) -> Routing:
        """Routing of every MoE layer on a text or on tokens; nothing else is kept.

        Args:
            input: text, texts or tokens.
            kwargs: of `forward`: `attention_mask`, `prepend_bos`, …
        """
        kept = {names.ROUTER_LOGITS, names.EXPERT_INDICES, names.ROUTING_WEIGHTS}
        wanted = [names.mlp(name, layer) for layer in self.moe_layers for name in kept]
        with torch.no_grad():
            _, cache = self.run_with_cache(input, names_filter=wanted, **kwargs)
        return Routing.stack([cache.routing(layer) for layer in self.moe_layers])

    # --- experts ---

    @torch.no_grad()
    def expert_outputs(
        self, layer: int, x: Float[Tensor, "*tokens d_model"], experts: Int[Tensor, "*tokens n"]
    ) -> Float[Tensor, "*tokens n d_model"]:
        """E_i(x), not weighted, of any experts at any tokens, selected or not; no hook fires and nothing is routed.

        Args:
            layer: a layer with experts.
            x: what the experts read, as `mlp.hook_in` has it.
            experts: ids, n for each token.

        Raises:
            HookError: the layer is dense.
            InputError: an id out of range.
        """
        if layer not in self.moe_layers:
            raise HookError(f"layer {layer} has no experts; MoE layers are {list(self.moe_layers)}")
        wrong = (experts < 0) | (experts >= self.n_experts)
        if wrong.any():
            raise InputError(
                f"there is no expert {int(experts[wrong][0])}; expected ids from 0 to {self.n_experts - 1}"
            )
        module = self._moe(layer).experts
        rows = x[..., None, :].expand(*experts.shape, x.shape[-1]).reshape(-1, x.shape[-1])
        rows = rows.to(module.down_proj.device, module.down_proj.dtype)
        silent = LayerHooks(layer, linear_branch=module.has_gate, shared=False)
        ids = experts.reshape(-1, 1).to(rows.device)
        out = experts_forward(module, silent, self.family.interleaved, rows, ids, rows.new_ones(ids.shape))
        return out.view(*experts.shape, -1).to(x.device)


def family_name(model: PreTrainedModel) -> str:
    """A name for a model that was not loaded from anywhere."""
    return f"{model.config.model_type} (not loaded from a checkpoint)"
