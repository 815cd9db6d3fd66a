"""A hook point that refuses what a hook function may not return."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint, LensHandle

from moe_lens.errors import HookError

if TYPE_CHECKING:
    from moe_lens.model.hooks.ownership import Owner

_ADDED = f"{HookPoint.add_hook.__qualname__}.<locals>"
"""Part of the names of the functions that TransformerLens gives to torch."""


class StayingLevel(int):
    """The level of a hook that stays when the context that added it has been left, for `reset_hooks(level=…)`."""


class CheckedPoint(HookPoint):
    """A hook point whose hooks return a tensor of the shape, kind and device that they were given, or None.

    torch broadcasts what another shape allows, so an edit of one position would become one of all. A copy of the point
    has the hooks that outlive any `with`, and they see the copy.
    """

    owner: "Owner | None" = None

    def add_hook(self, hook: Any, dir: Any = "fwd", *args: Any, **kwargs: Any) -> LensHandle:
        """As TransformerLens's."""
        handle = super().add_hook(_Checking(hook, self, backward=dir == "bwd"), dir, *args, **kwargs)
        handle.user_hook = hook
        return handle

    def has_hooks(self, dir: Any = "both", including_permanent: bool = True, level: int | None = None) -> bool:
        """As TransformerLens's, which asks every hook; each part of a model asks whether there is any."""
        if dir == "both" and including_permanent and level is None:
            return bool(self.fwd_hooks or self.bwd_hooks)
        return super().has_hooks(dir, including_permanent, level)

    def layer(self) -> int:
        """The layer that the point belongs to.

        Raises:
            HookError: it belongs to none.
        """
        head, _, rest = (self.name or "").partition(".")
        if head != "blocks":
            raise HookError(f"{self.name} is outside of the layers: it has no number")
        return int(rest.partition(".")[0])

    def remove_handles(self, handles: set[int]) -> None:
        """Remove hooks by the `id` of their handles, and what an interrupted removal or addition has left."""
        of_torch: list[dict[int, Any]] = [self._forward_hooks, self._backward_hooks]
        for torch_hooks, known in zip(of_torch, (self.fwd_hooks, self.bwd_hooks), strict=True):
            known[:] = [handle for handle in known if id(handle) not in handles and handle.hook.id in torch_hooks]
            ids = {handle.hook.id for handle in known}
            for number in [n for n, hook in torch_hooks.items() if n not in ids and _ADDED in hook.__qualname__]:
                del torch_hooks[number]

    def temporary(self) -> list[LensHandle]:
        """Hooks that some `with` is to remove."""
        return [handle for handle in (*self.fwd_hooks, *self.bwd_hooks) if not _lasts(handle)]

    def __getstate__(self) -> dict[str, Any]:
        """Without the functions that torch calls: they hold the point that they were added to."""
        state = {key: value for key, value in self.__dict__.items() if key not in ("fwd_hooks", "bwd_hooks")}
        lasting = [
            (direction, handle.user_hook, handle.is_permanent, handle.context_level)
            for direction, handles in (("fwd", self.fwd_hooks), ("bwd", self.bwd_hooks))
            for handle in handles
            if _lasts(handle)
        ]
        empty = {key: type(value)() for key, value in state.items() if key.endswith("_hooks") and value}
        return {**state, **empty, "lasting": lasting}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Add the hooks again."""
        lasting = state.pop("lasting")
        super().__setstate__(state)
        self.fwd_hooks, self.bwd_hooks = [], []
        for direction, hook, is_permanent, level in lasting:
            self.add_hook(hook, dir=direction, is_permanent=is_permanent, level=level)


def _lasts(handle: LensHandle) -> bool:
    level = handle.context_level
    return level is None or isinstance(level, StayingLevel) or handle.is_permanent


def check_points(module: nn.Module, owner: "Owner") -> None:
    """Make every hook point of a model a checked one."""
    for point in module.modules():
        if isinstance(point, HookPoint):
            point.__class__ = CheckedPoint
            point.__dict__["owner"] = owner


class _Checking:
    """A hook function that answers for what it returns."""

    def __init__(self, hook: Callable[..., Any], point: CheckedPoint, backward: bool):
        self.hook, self.point, self.backward = hook, point, backward

    def __repr__(self) -> str:
        return getattr(self.hook, "__qualname__", type(self.hook).__name__)  # not its own: that may print tensors

    def __call__(self, tensor: Any, *, hook: Any) -> Any:
        if self.point.owner is not None:
            self.point.owner.check()
        if getattr(self.hook, "only_reads", False):
            return self.hook(tensor, hook=hook)
        # A copy: others hold the tensor (the stream, sibling layers, the caller, a gradient's other summand); a change
        # in place is one of what passes here alone.
        value = _copied(tensor)
        before, version = _layout(value), changes_of(value)
        seen = self.hook(value, hook=hook)
        if seen is None or seen is value:
            if _layout(value) != before:
                raise HookError(f"a hook on {hook.name} changed {_words(before)} in place to {_words(_layout(value))}")
            return value if changes_of(value) != version or _must_replace(value, tensor, self.backward) else None
        if self.backward and isinstance(seen, tuple) and len(seen) == 1:
            seen = seen[0]
        return _fitting(seen, value, hook.name)


def _copied(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_copied, value))
    return value.clone() if isinstance(value, Tensor) else value


def changes_of(value: Any) -> Any:
    """What tells whether a tensor was changed in place; None of what does not count its changes."""
    if isinstance(value, tuple):
        return tuple(map(changes_of, value))
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def _must_replace(value: Any, tensor: Any, backward: bool) -> bool:
    """Whether the copy that a hook has seen must go on in place of the tensor.

    It has been changed past torch's count (`.data`, numpy), or the hook may have kept it, to ask for its gradient.
    """
    if isinstance(value, tuple):
        return any(_must_replace(*pair, backward) for pair in zip(value, tensor, strict=True))
    if not isinstance(value, Tensor):
        return False
    if value.requires_grad and torch.is_grad_enabled() and not backward:
        return True
    try:
        return not torch.equal(value, tensor)
    except RuntimeError:  # in torch.vmap and on the meta device there is nothing to compare
        return True


def _layout(value: Any) -> Any:
    return (value.dtype, tuple(value.shape), value.device) if isinstance(value, Tensor) else None


def _words(layout: Any) -> str:
    return "no tensor" if layout is None else f"{layout[0]} of shape {layout[1]} on {layout[2]}"


def _fitting(seen: Any, value: Any, name: str | None) -> Any:
    """A copy of what a hook has returned, in the dtype of what it was given.

    Raises:
        HookError: it is something else.
    """
    if isinstance(value, tuple) and isinstance(seen, tuple) and len(seen) == len(value):
        return tuple(_fitting(mine, given, name) for mine, given in zip(seen, value, strict=True))
    if not isinstance(value, Tensor):
        if type(seen) is not type(value):
            raise HookError(
                f"a hook on {name} returned {type(seen).__name__}; expected {type(value).__name__}, or None"
            )
        return seen
    if not isinstance(seen, Tensor) or seen.shape != value.shape:
        came = f"shape {tuple(seen.shape)}" if isinstance(seen, Tensor) else type(seen).__name__
        raise HookError(f"a hook on {name} returned {came}; expected a tensor of shape {tuple(value.shape)}, or None")
    if _kind(seen) != _kind(value):
        raise HookError(f"a hook on {name} returned {seen.dtype}; expected {value.dtype}")
    if seen.device != value.device:
        raise HookError(f"a hook on {name} returned a tensor on {seen.device}; expected one on {value.device}")
    if seen.layout != value.layout:
        raise HookError(f"a hook on {name} returned a tensor of layout {seen.layout}; expected {value.layout}")
    # A copy: what is kept elsewhere, as in a cache, is not what later hooks change in place, and a parameter becomes
    # none of the model's.
    return seen.to(value.dtype, copy=True)


def _kind(value: Tensor) -> tuple[bool, bool, bool]:
    return value.dtype.is_floating_point, value.dtype.is_complex, value.dtype == torch.bool
