"""Running a model with a cache: `run_with_cache`, and its `names_filter`."""

from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import Slice

from moe_lens.errors import HookError
from moe_lens.model.cache.caching_hook import CachingHook, GraphHook
from moe_lens.model.cache.hook_cache import check_from_end, following_tokens
from moe_lens.model.cache.moe_cache import MoECache
from moe_lens.model.devices import check_kept
from moe_lens.model.hooks.forward import OF_INPUT, ExpertBridge
from moe_lens.model.hooks.forward_checks import (
    NamesFilter,
    as_names,
    check_graph_kept,
    check_positions,
    layer_limits,
)
from moe_lens.model.torch_transforms import uncompiled


class CachedRuns(ExpertBridge):
    """The part of `HookedMoE` that keeps activations: copies, which later changes in place do not reach."""

    def _selected(self, names_filter: NamesFilter) -> list[tuple[HookPoint, list[str]]]:
        """Hook points that a filter selects, each with the names under which it was asked for."""
        names_filter = as_names(names_filter)
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

        Args:
            names_filter: A name, names or a predicate; None is everything.
            incl_bwd: Whether gradients are stored, too, under the name + `_grad`.
            device: Where to store; each tensor's own if not given.
            remove_batch_dim: Whether to drop the batch axis, of a batch of one.
            cache: A dictionary to store into; a new one if not given.
            pos_slice: Positions to store; all if not given.
            dtype: Of what is stored; each tensor's own if not given.
        """
        check_kept(device, dtype)
        cache = {} if cache is None else cache
        positions = Slice.unwrap(pos_slice)
        fwd_hooks = [
            (keys[0], CachingHook(cache, tuple(keys), device, dtype, positions, remove_batch_dim))
            for _, keys in self._selected(names_filter)
        ]
        return cache, fwd_hooks, [(name, keep.gradients()) for name, keep in fwd_hooks] if incl_bwd else []

    @uncompiled
    def run_with_cache(
        self,
        input: Any,
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
        keep_graph: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run the model and keep activations: `(output, cache)`.

        Args:
            input: what `forward` takes.
            return_cache_object: a `MoECache`; otherwise a dict of tensors.
            remove_batch_dim: drop the batch axis of what is kept, for a batch of one.
            names_filter: a name, names or a predicate; None keeps everything, which selects eager attention.
            stop_at_layer: run the blocks before it; the output is the residual stream there.
            start_at_layer: see TransformerLens.
            pos_slice: positions to keep.
            incl_bwd: run backward from a scalar output, and keep gradients under `name + "_grad"`.
            reset_hooks_end: remove the caching hooks afterwards.
            clear_contexts: clear `ctx` of the hook points that were cached.
            device: where to keep tensors, for example `"cpu"`.
            dtype: dtype of the floating-point tensors that are kept; their own if not given.
            keep_graph: keep activations in the graph instead of copies, so that any loss of theirs or of the output can
                be differentiated: after `loss.backward()` each has its `.grad`; `torch.autograd.grad` takes them, too.
            kwargs: of `forward`: `return_type`, `attention_mask`, `prepend_bos`, `padding_side`, …

        Raises:
            HookError: a name that does not exist.
            InputError: `keep_graph` where autograd is off, or beside what asks for a copy.
        """
        if incl_bwd and stop_at_layer is not None:
            raise HookError("incl_bwd needs the whole model: leave stop_at_layer out")
        given = self.read(
            input,
            **{word: kwargs.pop(word) for word in OF_INPUT & kwargs.keys()},
            residual=start_at_layer is not None,
        )
        check_positions(pos_slice, given.values.shape[1])
        check_from_end(pos_slice, given.mask)
        if keep_graph:
            copies = {"incl_bwd": incl_bwd, "remove_batch_dim": remove_batch_dim}
            copies |= {"device": device is not None, "dtype": dtype is not None, "pos_slice": pos_slice is not None}
            check_graph_kept([word for word, asked in copies.items() if asked])
        kept, fwd_hooks, bwd_hooks = self.get_caching_hooks(
            names_filter, incl_bwd, device, pos_slice=pos_slice, dtype=dtype
        )
        if keep_graph:
            fwd_hooks = [(name, GraphHook(kept, keep.keys)) for name, keep in fwd_hooks]
        first, last = layer_limits(len(self.blocks), start_at_layer, stop_at_layer)
        runs = [name for name, _ in fwd_hooks if self._runs(name, first, last)]
        fwd_hooks, bwd_hooks = ([(n, keep) for n, keep in hooks if n in runs] for hooks in (fwd_hooks, bwd_hooks))
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            output = self.forward(given, stop_at_layer=stop_at_layer, start_at_layer=start_at_layer, **kwargs)
            if incl_bwd:
                self._backward(output)
        positions = Slice.unwrap(pos_slice)
        parts = (given.tokens, given.mask, following_tokens(given.tokens, given.mask))
        tokens, mask, following = (None if part is None else positions.apply(part, dim=1) for part in parts)
        cache = MoECache(kept, self, has_batch_dim=True, tokens=tokens, mask=mask, following=following)
        if remove_batch_dim:
            cache.remove_batch_dim()
        return output, cache if return_cache_object else cache.cache_dict

    @staticmethod
    def _backward(output: Any) -> None:
        if not isinstance(output, Tensor) or output.numel() != 1:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise HookError(f'incl_bwd needs a scalar to run backward from, got {shape}; pass return_type="loss"')
        if not output.requires_grad:
            raise HookError("incl_bwd needs gradients: no parameter requires one, or autograd is off")
        output.backward()
