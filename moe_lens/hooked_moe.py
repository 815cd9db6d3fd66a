"""HookedMoE: a TransformerBridge in which every Mixture-of-Experts layer is taken apart."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.bridge_core import BridgeCore
from transformer_lens.model_bridge.sources._bridge_builder import configure_tokenizer
from transformer_lens.utilities import Slice
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_lens import names
from moe_lens.errors import HookError, UnsupportedModelError
from moe_lens.model.adapter import build_adapter
from moe_lens.model.cache import MoECache
from moe_lens.model.caching import Keep
from moe_lens.model.components import MoEBlock
from moe_lens.model.experts import LayerHooks
from moe_lens.model.families import Family
from moe_lens.model.loading import load_pretrained
from moe_lens.model.parameters import LayerParameters, first_product, second_product
from moe_lens.model.saving import save_pretrained
from moe_lens.model.selfcheck import self_check
from moe_lens.routing import Routing

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


class HookedMoE(TransformerBridge):
    """A transformers MoE language model whose routers and experts are hook points.

    Use it as a TransformerBridge: `run_with_cache`, `run_with_hooks`, `hooks`, `generate`, `to_tokens`. The hook table
    is in `moe_lens.names`. Wrapping changes the transformers model in place: it belongs to the wrapper from then on.
    """

    family: Family

    def __init__(self, model: PreTrainedModel, adapter: Any, tokenizer: Any, family: Family):
        self.__dict__.update(family=family, _original_names=tuple(model.state_dict()))
        super().__init__(model, adapter, tokenizer)
        for layer, block in enumerate(self.blocks):
            # Not modules of the norm: a reference, so that each hook point has one owner and one name.
            block.ln2.__dict__["residual_point"] = block.hook_resid_mid
            if block.mlp.hooks is not None:
                block.mlp.hooks.layer = layer
                for name in names.ALIASED:
                    if name in block.mlp.hooks.points:
                        object.__setattr__(block, name, block.mlp.hooks.points[name])
                        self._hook_registry[names.block(name, layer)] = block.mlp.hooks.points[name]
        dead = (*names.DEAD, *family.dead)
        self._hook_registry = {n: p for n, p in self._hook_registry.items() if not n.endswith(dead)}
        self.__dict__["_all_hooks"] = {n: p for n, p in super().hook_dict.items() if not n.endswith(dead)}
        if not self.moe_layers:
            raise UnsupportedModelError(
                f"this {family.model_type} has no layer with experts; TransformerLens's TransformerBridge is for dense models"
            )

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
            SelfCheckError: the parts do not make up the whole.
        """
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
        save_pretrained(self.original_model, self._original_names, self.tokenizer, Path(folder), **kwargs)

    # --- what the model is ---

    def _layer_hooks(self) -> Iterator[tuple[int, LayerHooks]]:
        for layer, block in enumerate(self.blocks):
            if isinstance(block.mlp, MoEBlock) and block.mlp.hooks is not None:
                yield layer, block.mlp.hooks

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers that have experts."""
        return tuple(layer for layer, _ in self._layer_hooks())

    def has_shared(self, layer: int) -> bool:
        """Whether a MoE layer has shared experts."""
        return any(at == layer and names.SHARED_OUT in hooks.points for at, hooks in self._layer_hooks())

    def _moe(self, layer: int) -> Any:
        """Transformers' own MoE block."""
        blocks: Any = self.blocks
        return blocks[layer].mlp.original_component

    @property
    def _hf_config(self) -> Any:
        return self.original_model.config

    @property
    def n_experts(self) -> int:
        """Routed experts of a MoE layer."""
        return int(self._moe(self.moe_layers[0]).experts.num_experts)

    @property
    def top_k(self) -> int:
        """Routed experts active for a token."""
        return int(self._hf_config.num_experts_per_tok)

    @property
    def n_shared_experts(self) -> int:
        """Shared experts of a MoE layer; they are fused into one MLP."""
        if not self.has_shared(self.moe_layers[0]):
            return 0
        return int(getattr(self._hf_config, "n_shared_experts", None) or 1)

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

    # --- hooks ---

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every hook point by each of its names; hooks of single experts are there once they have been asked for."""
        return dict(self._all_hooks) if "_all_hooks" in self.__dict__ else super().hook_dict

    def expert_hooks(self, layer: int, expert: int) -> dict[str, HookPoint]:
        """Make and return the hook points of one expert, whose tensors hold that expert's rows alone.

        Raises:
            HookError: a dense layer, or no such expert.
        """
        hooks = dict(self._layer_hooks()).get(layer)
        if hooks is None:
            raise HookError(f"layer {layer} has no experts; MoE layers are {list(self.moe_layers)}")
        if not 0 <= expert < self.n_experts:
            raise HookError(f"expert {expert} does not exist; expected 0 to {self.n_experts - 1}")
        made = {}
        for hook in names.EXPERT_HOOKS:
            if hook.name == "hook_pre_linear" and names.EXPERT_PRE_LINEAR not in hooks.points:
                continue
            name = names.expert(hook.name, layer, expert)
            point = hooks.experts.setdefault((expert, hook.name), HookPoint())
            point.name = name
            self._all_hooks[name] = self._hook_registry[name] = made[name] = point
        return made

    def _find(self, name: str) -> HookPoint:
        """The hook point of a name, made on demand for one expert; a helpful error for anything else."""
        if name in self._all_hooks:
            return self._all_hooks[name]
        if (one := names.parse_expert(name)) is not None:
            made = self.expert_hooks(one[0], one[1])
            if name in made:
                return made[name]
        if (found := names.parse_mlp(name)) is not None and found[0] not in self.moe_layers:
            raise HookError(f"{name}: layer {found[0]} has no experts; MoE layers are {list(self.moe_layers)}")
        raise HookError(f"hook {name!r} does not exist on this model; model.hook_dict lists those that do")

    def _resolve_hook_point(
        self, name: str, aliases: dict[str, str], hook_dict: dict[str, HookPoint]
    ) -> tuple[str, HookPoint]:
        point = self._find(name)
        return point.name or name, point

    def get_hook_point(self, hook_name: str) -> HookPoint | None:
        """The hook point of a name, or None."""
        try:
            return self._find(hook_name)
        except HookError:
            return None

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook_fn: Any,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
    ) -> None:
        """Add a hook to a point, or to all whose name satisfies a predicate."""
        if isinstance(name, str):
            name = self._find(name).name or name
        super().add_hook(name, hook_fn, dir=dir, is_permanent=is_permanent)

    def _selected(self, names_filter: NamesFilter) -> list[tuple[HookPoint, list[str]]]:
        """Hook points that a filter selects, each with the names under which it was asked for."""
        if isinstance(names_filter, str):
            names_filter = [names_filter]
        if names_filter is None or callable(names_filter):
            wanted = [n for n in self._all_hooks if names_filter is None or names_filter(n)]
            wanted = [n for n in wanted if self._gated_hook_reason(self._all_hooks[n].name or n) is None]
        else:
            wanted = list(names_filter)
            for name in wanted:
                self.check_hooks_to_add(self._find(name), name, lambda *_: None)
        points: dict[int, tuple[HookPoint, list[str]]] = {}
        for name in wanted:
            point = self._find(name)
            points.setdefault(id(point), (point, []))[1].append(name)
        return list(points.values())

    def get_caching_hooks(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[dict[str, Tensor], list[tuple[str, Any]], list[tuple[str, Any]]]:
        """Caching hooks, not added yet: `(cache, fwd_hooks, bwd_hooks)`.

        What is stored is a copy: a later change in place by another hook does not reach it.
        """
        cache = {} if cache is None else cache
        positions = Slice.unwrap(pos_slice)
        fwd_hooks = [
            (keys[0], Keep(cache, tuple(keys), device, dtype, positions, remove_batch_dim))
            for _, keys in self._selected(names_filter)
        ]
        return cache, fwd_hooks, [(name, keep.gradients()) for name, keep in fwd_hooks] if incl_bwd else []

    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: str | list[str] | Tensor,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: NamesFilter = None,
        stop_at_layer: int | None = None,
        start_at_layer: int | None = None,
        pos_slice: Any = None,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run the model and keep activations: `(output, cache)`.

        Args:
            input: text, texts or tokens.
            return_cache_object: a `MoECache`; otherwise a dict of tensors.
            remove_batch_dim: for a batch of one.
            names_filter: a name, names or a predicate; None keeps everything, which selects eager attention.
            stop_at_layer: run the blocks before it; the output is the residual stream there.
            start_at_layer: see TransformerLens.
            pos_slice: positions to keep.
            incl_bwd: run backward from a scalar output, and keep gradients under `name + "_grad"`.
            reset_hooks_end: remove the caching hooks afterwards.
            clear_contexts: clear `ctx` of the points that were listened to.
            device: where to keep tensors, for example `"cpu"`.
            dtype: of what is kept, for floating-point tensors.
            kwargs: of `forward`: `return_type`, `attention_mask`, `prepend_bos`, `padding_side`, …

        Raises:
            HookError: a name that does not exist.
        """
        if incl_bwd and stop_at_layer is not None:
            raise HookError("incl_bwd needs the whole model: leave stop_at_layer out")
        kept, fwd_hooks, bwd_hooks = self.get_caching_hooks(
            names_filter, incl_bwd, device, pos_slice=pos_slice, dtype=dtype
        )
        first, last = (self._layer_index(at) for at in (start_at_layer or 0, stop_at_layer))
        runs = [name for name, _ in fwd_hooks if self._runs(name, first, last)]
        fwd_hooks, bwd_hooks = ([(n, keep) for n, keep in hooks if n in runs] for hooks in (fwd_hooks, bwd_hooks))
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            output = self.forward(input, stop_at_layer=stop_at_layer, start_at_layer=start_at_layer, **kwargs)
            if incl_bwd:
                self._backward(output)
        cache = MoECache(kept, self, has_batch_dim=True)
        if remove_batch_dim:
            cache.remove_batch_dim()
        return output, cache if return_cache_object else cache.cache_dict

    def _layer_index(self, layer: int | None) -> int:
        n_layers = len(self.blocks)
        return n_layers if layer is None else layer + n_layers if layer < 0 else layer

    @staticmethod
    def _runs(name: str, first: int, last: int) -> bool:
        """Whether a hook fires when only the blocks from `first` to before `last` count."""
        head, _, rest = name.partition(".")
        if head != "blocks":
            return first == 0 or not BridgeCore._is_embedding_stage_hook(name)
        return first <= int(rest.partition(".")[0]) < last

    @staticmethod
    def _backward(output: Any) -> None:
        if not isinstance(output, Tensor) or output.numel() != 1:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise HookError(f'incl_bwd needs a scalar to run backward from, got {shape}; pass return_type="loss"')
        if not output.requires_grad:
            raise HookError("incl_bwd needs gradients: no parameter requires one, or autograd is off")
        output.backward()

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

    # --- what TransformerLens offers and we refuse ---

    def enable_compatibility_mode(self, *args: Any, **kwargs: Any) -> None:
        """Refused: it folds and centres weights, which is wrong for packed experts."""
        raise UnsupportedModelError(
            "HookedMoE keeps the model's own weights: folding norms into packed experts is wrong for some families and "
            "inexact in bfloat16. Hook names and logit attribution work without compatibility mode"
        )

    def process_weights(self, *args: Any, **kwargs: Any) -> None:
        """Refused, see `enable_compatibility_mode`."""
        self.enable_compatibility_mode()


def family_name(model: PreTrainedModel) -> str:
    """A name for a model that was not loaded from anywhere."""
    return f"{model.config.model_type} (not loaded from a checkpoint)"
