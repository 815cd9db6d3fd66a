"""Hook points by name, hook functions and caches: the running half of `HookedMoE`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.bridge_core import BridgeCore
from transformer_lens.utilities import Slice, get_attention_mask
from transformers import PreTrainedModel

from moe_lens import names
from moe_lens.errors import HookError, InputError, UnsupportedModelError
from moe_lens.model.cache import MoECache
from moe_lens.model.caching import Keep
from moe_lens.model.components import MoEBlock
from moe_lens.model.contract import Experts, top_k_of
from moe_lens.model.experts import Choice, LayerHooks
from moe_lens.model.families import Family
from moe_lens.model.hook_cache import following_tokens
from moe_lens.selection import Step

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


@dataclass
class _Running:
    """What `forward` was called with."""

    input: Any
    kwargs: dict[str, Any]
    past: int
    step: Step | None = None


class ExpertBridge(TransformerBridge):
    """A TransformerBridge that knows the hooks of experts, copies what it caches, and leaves the weights alone."""

    family: Family

    def __init__(self, model: PreTrainedModel, adapter: Any, tokenizer: Any, family: Family):
        if not any(name.endswith(".experts") for name, _ in model.named_modules()):
            raise UnsupportedModelError(
                f"this {family.model_type} has no layer with experts; "
                "dense models belong in TransformerLens's TransformerBridge"
            )
        self.__dict__.update(family=family, _original_names=tuple(model.state_dict()))
        super().__init__(model, adapter, tokenizer)
        for layer, block in enumerate(self.blocks):
            # Not modules of the norm: a reference, so that each hook point has one owner and one name.
            parts: Any = block._modules
            reader = parts.get("ln2") or parts.get("mlp")
            if "hook_resid_mid" in parts and reader is not None:
                reader.__dict__["residual_point"] = parts["hook_resid_mid"]
            hooks = getattr(parts.get("mlp"), "hooks", None)
            if isinstance(hooks, LayerHooks):
                hooks.layer = layer
                for name in names.ALIASED:
                    if name in hooks.points:
                        object.__setattr__(block, name, hooks.points[name])
                        self._hook_registry[names.block(name, layer)] = hooks.points[name]
        dead = (*names.DEAD, *family.dead)
        self._hook_registry = {n: p for n, p in self._hook_registry.items() if not n.endswith(dead)}
        self.__dict__["_all_hooks"] = {n: p for n, p in super().hook_dict.items() if not n.endswith(dead)}

    def _layer_hooks(self) -> Iterator[tuple[int, LayerHooks]]:
        for layer, block in enumerate(self.blocks):
            mlp = block._modules.get("mlp")
            if isinstance(mlp, MoEBlock) and mlp.hooks is not None:
                yield layer, mlp.hooks

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers that have experts."""
        return tuple(layer for layer, _ in self._layer_hooks())

    def _moe(self, layer: int) -> Any:
        """The module of transformers that holds a layer's router and experts."""
        blocks: Any = self.blocks
        return blocks[layer].mlp.moe

    def widened(self, layer: int, routed: Tensor) -> Tensor:
        """The experts' sum as wide as the residual stream, in families whose experts compute in a narrower space."""
        widens = self.family.widens
        return routed if widens is None else self._moe(layer).get_submodule(widens)(routed)

    def _experts(self, layer: int) -> Experts:
        """The experts of a layer, whatever modules hold them."""
        blocks: Any = self.blocks
        return blocks[layer].mlp.contract

    @property
    def _hf_config(self) -> Any:
        return self.original_model.config

    @property
    def n_experts(self) -> int:
        """Routed experts of a MoE layer, `n_identity_experts` among them."""
        return self._experts(self.moe_layers[0]).n_experts

    @property
    def n_identity_experts(self) -> int:
        """Routed experts, the last ids, that give back what they read: they have no neurons and no parameters."""
        return self._experts(self.moe_layers[0]).n_identities

    def has_shared(self, layer: int) -> bool:
        """Whether a MoE layer has shared experts, or a constant in their place (JetMoE's bias)."""
        return any(at == layer and names.SHARED_OUT in hooks.points for at, hooks in self._layer_hooks())

    @property
    def top_k(self) -> int:
        """Routed experts active for a token."""
        moe = self._moe(self.moe_layers[0])
        router, config = getattr(moe, self.family.router), self._hf_config.get_text_config()
        return top_k_of(moe, router, config, self.family.top_k)

    @property
    def n_shared_experts(self) -> int:
        """Shared experts of a MoE layer; they are fused into one MLP."""
        if not self.has_shared(self.moe_layers[0]) or self.family.shared is None:
            return 0
        return int(getattr(self._hf_config.get_text_config(), "n_shared_experts", None) or 1)

    # --- text ---

    def to_tokens(self, input: str | list[str], prepend_bos: bool | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens of a text or of texts [batch, pos], BOS once.

        A text that opens with the BOS token's own text (a rendered chat template) gets no second one; the other
        arguments are TransformerLens's.

        Raises:
            InputError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError(
                "this model has no tokenizer, so text cannot be read: pass token ids, or wrap it with its tokenizer, "
                "HookedMoE.from_hf(model, tokenizer); from_pretrained takes the tokenizer that is beside the weights"
            )
        bos = getattr(self.tokenizer, "bos_token", None)
        if bos and (getattr(self.cfg, "default_prepend_bos", True) if prepend_bos is None else prepend_bos):
            input = input.removeprefix(bos) if isinstance(input, str) else [text.removeprefix(bos) for text in input]
        return super().to_tokens(input, prepend_bos, *args, **kwargs)

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
        hooks = self._hooks_of(layer)
        if not 0 <= expert < self.n_experts:
            raise HookError(f"expert {expert} does not exist; expected 0 to {self.n_experts - 1}")
        made = {}
        for hook in names.EXPERT_HOOKS:
            if hook.name == "hook_pre_linear" and names.EXPERT_PRE_LINEAR not in hooks.points:
                continue
            if hook.name != "hook_out" and expert >= self.n_experts - self.n_identity_experts:
                continue  # an identity has no neurons
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
        self,
        name: str,
        aliases: dict[str, str],  # noqa: ARG002
        hook_dict: dict[str, HookPoint],  # noqa: ARG002
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

    def get_caching_hooks(
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

    def run_with_cache(
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
        tokens, mask = self._tokens_and_mask(input, pos_slice, **kwargs)
        following = following_tokens(*self._tokens_and_mask(input, **kwargs))
        following = None if following is None else Slice.unwrap(pos_slice).apply(following, dim=1)
        cache = MoECache(kept, self, has_batch_dim=True, tokens=tokens, mask=mask, following=following)
        if remove_batch_dim:
            cache.remove_batch_dim()
        return output, cache if return_cache_object else cache.cache_dict

    def _tokens_and_mask(
        self,
        input: str | list[str] | Tensor,
        pos_slice: Any = None,
        attention_mask: Tensor | None = None,
        prepend_bos: bool | None = None,
        padding_side: Any = None,
        **_: Any,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The tokens of an input, and where they are real rather than padding; None where unknown or not needed."""
        if not isinstance(input, Tensor):
            tokens = self.to_tokens(input, prepend_bos=prepend_bos, padding_side=padding_side)
            if attention_mask is None and isinstance(input, list) and len(input) > 1:
                bos = getattr(self.cfg, "default_prepend_bos", True) if prepend_bos is None else prepend_bos
                attention_mask = get_attention_mask(self.tokenizer, tokens, bos, padding_side=padding_side)
        elif input.is_floating_point():
            return None, None
        else:
            tokens = input if input.dim() == 2 else input[None]
        mask = None if attention_mask is None else attention_mask[:, -tokens.shape[1] :].bool()
        positions = Slice.unwrap(pos_slice)
        cut = [None if value is None else positions.apply(value, dim=1) for value in (tokens, mask)]
        return cut[0], cut[1]

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

    # --- the forward pass that is running, for hook functions that ask ---

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens's; hook functions can ask `step()` meanwhile which tokens are passing.

        Args:
            input: text, texts, tokens, or embeddings.
            args: `return_type` and so on, as in TransformerLens.
            kwargs: `attention_mask`, `start_at_layer`, `stop_at_layer`, `past_key_values`, …
        """
        outer = self.__dict__.get("_running")
        past = kwargs.get("past_key_values")
        self.__dict__["_running"] = _Running(input, kwargs, 0 if past is None else past.get_seq_length())
        try:
            return super().forward(input, *args, **kwargs)
        finally:
            self.__dict__["_running"] = outer

    def step(self) -> Step | None:
        """The tokens of the forward pass that is running; None where `forward` does not run."""
        running: _Running | None = self.__dict__.get("_running")
        if running is None:
            return None
        if running.step is None:
            running.step = self._step(running)
        return running.step

    def _step(self, running: "_Running") -> Step:
        attention_mask = running.kwargs.get("attention_mask")
        tokens, mask = self._tokens_and_mask(running.input, **running.kwargs)
        batch, pos = running.input.shape[:2] if tokens is None else tokens.shape
        if attention_mask is not None:
            mask = attention_mask.bool() if attention_mask.dim() == 2 else None
        if mask is not None and mask.shape[1] == pos and running.past:
            mask = torch.cat([mask.new_ones(batch, running.past), mask], 1)
        return Step(int(batch), int(pos), tokens, mask, running.past)

    def experts_in_slots(self, layer: int) -> Int[Tensor, "batch pos top_k"]:
        """Ids of the experts that the forward pass now running computes in a layer, by rank.

        For hook functions, from `hook_routing_weights` on: it holds what earlier hooks have forced, and −1 in slots
        that `hook_expert_kept` leaves out.

        Raises:
            HookError: a dense layer, or a layer that is not running or has not selected yet.
        """
        return self._hooks_of(layer).experts_in_slots()

    def choice(self, layer: int) -> Choice:
        """What the forward pass now running selects a layer's experts from; for hook functions on the selection.

        Raises:
            HookError: a dense layer, or a layer that is not selecting.
        """
        return self._hooks_of(layer).choice()

    def _hooks_of(self, layer: int) -> LayerHooks:
        hooks = dict(self._layer_hooks()).get(layer)
        if hooks is None:
            raise HookError(f"layer {layer} has no experts; MoE layers are {list(self.moe_layers)}")
        return hooks

    # --- what TransformerLens offers and we refuse ---

    def enable_compatibility_mode(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Refused: it folds and centres weights, which is wrong for packed experts."""
        raise UnsupportedModelError(
            "HookedMoE keeps the model's own weights: folding norms into packed experts is wrong for some families and "
            "inexact in bfloat16. Hook names and logit attribution work without compatibility mode"
        )

    def process_weights(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Refused, see `enable_compatibility_mode`."""
        self.enable_compatibility_mode()
