"""What a caching hook keeps of an activation."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from moe_lens import names
from moe_lens.model.tl_compat import BridgeCore


@dataclass(frozen=True, eq=False)
class CachingHook:
    """A hook function that stores a copy of what it sees; a later change in place does not reach the copy."""

    cache: dict[str, Tensor]
    keys: tuple[str, ...]
    """The names under which the copy is stored."""
    device: Any = None
    dtype: torch.dtype | None = None
    """Of what is kept, for floating-point tensors."""
    positions: Any = None
    """TransformerLens's `Slice` over positions."""
    remove_batch_dim: bool = False
    suffix: str = ""
    only_reads: ClassVar[bool] = True

    def gradients(self) -> "CachingHook":
        """The same for backward hooks."""
        return replace(self, suffix="_grad")

    def __call__(self, value: Any, hook: HookPoint) -> None:
        """Store `value`; what is no tensor (a tuple's further members, None) is left out."""
        if isinstance(value, tuple):
            value = value[0]
        if not isinstance(value, Tensor):
            return
        kept = self._cut(value.detach(), hook)
        kept = kept.to(device=self.device, dtype=self.dtype if kept.is_floating_point() else None)
        shared = kept.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
        if shared and not self._owns(value, kept, hook):
            kept = kept.clone()
        for key in self.keys:
            self.cache[key + self.suffix] = kept

    def _cut(self, value: Tensor, hook: HookPoint) -> Tensor:
        ragged = names.parse_expert(self.keys[0]) is not None
        if self.positions is not None and ragged:
            inside = torch.zeros(hook.ctx["n_pos"], dtype=torch.bool, device=value.device)
            inside[torch.as_tensor(self.positions.indices(len(inside)), device=value.device)] = True
            value = value[inside[hook.ctx["pos"]]]
        elif self.positions is not None and value.dim() >= 2:
            value = self.positions.apply(value, dim=BridgeCore._pos_slice_dim(hook.name or self.keys[0], hook))
        if self.remove_batch_dim and not ragged and value.shape[0] == 1:
            value = value[0]
        return value

    def _owns(self, value: Tensor, kept: Tensor, hook: HookPoint) -> bool:
        """Whether the tensor can be kept as it is: our own points hand out copies, and nobody but caches listens here.

        What another hook returned is that hook's, and the model may go on computing in it.
        """
        private = getattr(hook, "private", False) and not self.suffix and not hook.bwd_hooks
        whole = kept.numel() == value.numel()
        return private and whole and all(isinstance(handle.user_hook, CachingHook) for handle in hook.fwd_hooks)


@dataclass(frozen=True, eq=False)
class GraphHook:
    """A hook function that keeps what it sees itself, in the graph, with room for its gradient."""

    cache: dict[str, Tensor]
    keys: tuple[str, ...]

    def __call__(self, value: Any, hook: HookPoint) -> None:  # noqa: ARG002
        """Keep `value`; what is no tensor (a tuple's further members, None) is left out."""
        if isinstance(value, tuple):
            value = value[0]
        if not isinstance(value, Tensor):
            return
        if value.is_floating_point():
            value.requires_grad_()  # where all parameters before it are frozen, the graph begins here
            value.retain_grad()
        for key in self.keys:
            self.cache[key] = value
