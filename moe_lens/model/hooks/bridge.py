"""Running a model with hook functions and caches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.bridge_core import BridgeCore
from transformer_lens.utilities import Slice, get_attention_mask

from moe_lens.errors import HookError, InputError
from moe_lens.model.cache.caching_hook import Keep
from moe_lens.model.cache.hook_cache import following_tokens
from moe_lens.model.cache.moe_cache import MoECache
from moe_lens.model.hooks.hook_table import HookTable
from moe_lens.model.hooks.layer_hooks import Choice
from moe_lens.selection import Step

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


@dataclass
class _Running:
    """What `forward` was called with."""

    input: Any
    kwargs: dict[str, Any]
    past: int
    step: Step | None = None


class ExpertBridge(HookTable):
    """The running half of `HookedMoE`: it copies what it caches, and tells hook functions what is running."""

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

    # --- caches ---

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
