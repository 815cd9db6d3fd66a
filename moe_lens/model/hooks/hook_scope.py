"""Hooks that are in place inside a `with`, and leave the model whatever happens."""

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from torch import Tensor, nn
from transformer_lens.hook_points import LensHandle

from moe_lens import names
from moe_lens.argument_checks import ReadByItself
from moe_lens.model.hooks.checked_point import CheckedPoint, StayingLevel
from moe_lens.model.hooks.interrupts import uninterrupted
from moe_lens.model.hooks.ownership import Claim
from moe_lens.model.tl_compat import StopAtLayerException

Hooks = Annotated[Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]], ReadByItself()]
Direction = Literal["fwd", "bwd"]


class HookScope(Claim):
    """An open hook context: the claim on the model that its hooks are."""

    __slots__ = ("clear_contexts", "exit", "handles", "in_stack", "model", "points", "recipe", "remove")

    def __init__(self, model: Any, what: str, *, remove: bool = True, clear_contexts: bool = False):
        super().__init__(model.owner, what)
        self.model, self.remove, self.clear_contexts = model, remove, clear_contexts
        self.points: list[CheckedPoint] = []
        self.handles: list[LensHandle] = []
        self.in_stack = False
        self.recipe: Any = None
        """How the intervention is made that its hooks are of, where that can be said by value."""
        self.exit: Callable[[], Any] | None = None
        """Of a scope that was entered by hand: a weak reference to what was looked up to leave it."""

    @property
    def abandoned(self) -> bool:
        """Whether it was about to be left by hand, and what was to do so is gone."""
        return self.exit is not None and self.exit() is None

    @uninterrupted
    def enter(self, fwd_hooks: Hooks, bwd_hooks: Hooks) -> None:
        """Claim the model and add hooks to it.

        Raises:
            HookError: a hook point that does not exist.
            InUseError: the model belongs to another thread.
        """
        with_hooks: list[tuple[Direction, Hooks]] = [("fwd", fwd_hooks), ("bwd", bwd_hooks)]
        self.owner.take(self)
        try:
            self.model.context_level = level = self.owner.depth
            for direction, hooks in with_hooks:
                for name, function in hooks:
                    for point in self.model.points_of(name, function, direction):
                        self.points.append(point)
                        self.handles.append(point.add_hook(function, dir=direction, level=level))
        except BaseException:
            self.leaving = True
            self.owner.sweep(self)
            self.owner.drop(self)
            raise

    def undo(self) -> None:
        """Take the hooks out."""
        ids = {id(handle) for handle in self.handles}
        for point in self.points:
            if self.remove:
                point.remove_handles(ids)
            if self.clear_contexts:
                point.clear_context()
        if not self.remove:
            for handle in self.handles:
                handle.context_level = StayingLevel(handle.context_level or 0)

    @uninterrupted
    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.model.context_level = self.owner.depth


class ForwardClaim(Claim):
    """A forward pass: the claim on the model that it is."""

    __slots__ = ("model",)

    def __init__(self, model: Any):
        super().__init__(model.owner, "a forward pass")
        self.model = model

    def undo(self) -> None:
        """Let the next pass begin and end where it will: TransformerLens's own clearing can be interrupted."""
        run_all_blocks(self.model)

    def end_after_blocks(self) -> None:
        """Let the pass end with the last block's output: final norm and unembedding are not called."""
        nn.Module.register_forward_hook(self.model.blocks[-1], _end_here)


def _end_here(block: Any, args: Any, output: Any) -> None:  # noqa: ARG001
    raise StopAtLayerException(output[0] if isinstance(output, tuple) else output)


class ModuleHooks(Claim):
    """Functions that torch calls before and after modules run, in place inside a `with`.

    Each works only while the claim is held: one that an exception leaves behind does nothing, and goes at the next
    entry.
    """

    __slots__ = ("modules",)

    def __init__(self, model: Any, what: str):
        super().__init__(model.owner, what)
        self.modules: list[nn.Module] = []

    def before(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Let `function(claim, module, args, kwargs)` be called before a module: it gives other arguments, or None."""
        self.modules.append(module)
        module.register_forward_pre_hook(_WhileHeld(self, function), with_kwargs=True)

    def after(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Let `function(claim, module, args, out)` be called after a module: it gives another output, or None."""
        self.modules.append(module)
        nn.Module.register_forward_hook(module, _WhileHeld(self, function))

    def undo(self) -> None:
        """Take them out."""
        remove_lost(self.modules)


class _WhileHeld:
    """A function of a claim, called while that is held; it does not hold it itself."""

    def __init__(self, claim: Claim, function: Callable[..., Any]):
        self._claim, self.function = weakref.ref(claim), function

    @property
    def claim(self) -> Claim | None:
        claim = self._claim()
        return None if claim is None or claim.leaving else claim

    def __call__(self, *arguments: Any) -> Any:
        return None if (claim := self.claim) is None else self.function(claim, *arguments)


def remove_lost(modules: Iterable[nn.Module]) -> None:
    """Remove from modules what `ModuleHooks` that are held no more have put there."""
    for module in modules:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [
                number for number, hook in hooks.items() if isinstance(hook, _WhileHeld) and hook.claim is None
            ]:
                del hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)


class GenerationClaim(Claim):
    """A generation: the claim on the model that it is."""

    __slots__ = ("columns", "model")

    def __init__(self, model: Any, what: str, columns: Tensor | None):
        super().__init__(model.owner, what)
        self.model = model
        self.columns = columns
        """What `ModelInput.columns` says of the prompt; None while a stream is paused, too."""

    def undo(self) -> None:
        """Forget the key-value cache, as TransformerLens does unless it is interrupted."""
        self.model.__dict__.update(_capture_hf_cache=False)
        self.model.__dict__.pop("_last_hf_cache", None)


def run_all_blocks(model: Any) -> None:
    """Clear where a forward pass was to start and stop."""
    after_last = model.blocks[-1]._forward_hooks
    for number in [number for number, hook in after_last.items() if hook is _end_here]:
        del after_last[number]
    for block in model.blocks:
        state = block.__dict__
        if state.get("_stop_at_layer_idx") is not None or state.get("_start_at_layer_idx") is not None:
            state.update(_stop_at_layer_idx=None, _start_at_layer_idx=None, _start_residual=None)


@dataclass(frozen=True, slots=True)
class TakesBatch:
    """A hook function that needs the batch axis, whatever the others in its run are shown."""

    function: Callable[..., Any]

    def __call__(self, value: Any, hook: Any) -> Any:
        """What the function returns."""
        return self.function(value, hook)


def without_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """A hook function that is shown activations of a batch of one without their batch axis.

    Rows of an expert have none.
    """
    if isinstance(function, TakesBatch):
        return function

    def inner(value: Any, hook: Any) -> Any:
        if value.shape[0] != 1 or names.parse_expert(hook.name) is not None:
            return function(value, hook)
        one = value.squeeze(0)
        seen = function(one, hook)
        return seen.unsqueeze(0) if isinstance(seen, Tensor) and seen.dim() == one.dim() else seen

    return inner


class _Leave:
    """What one `with` statement, or one `ExitStack`, calls at the end."""

    __slots__ = ("__weakref__", "opener", "scope")

    def __init__(self, opener: "OpensScope | None"):
        self.opener, self.scope = opener, None

    @uninterrupted
    def __call__(self, *arguments: Any) -> None:
        opener = arguments[0] if self.opener is None else self.opener
        scope = opener._open[-1] if self.scope is None else self.scope
        scope.leaving = True
        if self.scope is None:
            opener._open.pop()
        scope.__exit__()


class _Exit:
    """`__exit__` of what can be entered again and again.

    A `with` statement looks `__exit__` up before it calls `__enter__`, an `ExitStack` does so on the class; each gets a
    `_Leave` of its own, which alone holds the scope. If an exception strikes before the first line of leaving, it is
    dropped, and the scope is known to be lost. Who calls `__enter__` by hand looks `__exit__` up afterwards: if that
    was never called, nobody can say whether it was meant to be, and the model is not used before that is known.
    """

    def __get__(self, opener: "OpensScope | None", owner: type) -> Any:
        try:
            leave = _Leave(opener)
            looked_up = _next[threading.get_ident()] = weakref.ref(leave)
            _say_looked_up(opener, looked_up)
        except BaseException:
            _say_looked_up(opener, _gone)
            raise
        return leave


def _say_looked_up(opener: "OpensScope | None", what: Callable[[], Any]) -> None:
    """Tell the innermost scope that was entered by hand what is to leave it, unless something is there for that."""
    scope = opener._open[-1] if opener is not None and opener._open else None
    if scope is not None and (scope.exit is None or scope.abandoned):
        scope.exit = what


def _gone() -> None:
    """A reference to what is there no more."""


_next: dict[int, Any] = {}
"""Of each thread, what was looked up last."""


class OpensScope(ABC):
    """Something that opens a scope of hooks in each `with`, also inside itself."""

    if TYPE_CHECKING:

        def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
            """Close the scope."""
    else:
        __exit__ = _Exit()

    _open: list[HookScope]
    """Scopes that no `with` holds, innermost last."""

    def __init__(self) -> None:
        object.__setattr__(self, "_open", [])  # also where the class is frozen

    @abstractmethod
    def scope(self) -> HookScope:
        """A scope, entered."""

    def entered(self) -> Any:
        """What `with … as` gives."""
        return self

    @uninterrupted
    def __enter__(self) -> Any:
        entered, opened = self.entered(), self._open
        waiting = _next.pop(threading.get_ident(), None)
        leave = None if waiting is None else waiting()
        if leave is not None and leave.opener in (None, self):
            for by_hand in opened:
                by_hand.exit = None if by_hand.exit is waiting else by_hand.exit
            leave.scope = self.scope()
            leave.scope.in_stack = leave.opener is None
            return entered
        scope = self.scope()
        try:
            opened += [scope]
            return entered
        except BaseException:
            opened[:] = [other for other in opened if other is not scope]
            raise


class HookContext(OpensScope):
    """What `model.hooks(…)` returns."""

    def __init__(self, model: Any, hooks: tuple[Hooks, Hooks], remove: bool, clear_contexts: bool):
        super().__init__()
        self.model, self._hooks, self._how = model, hooks, {"remove": remove, "clear_contexts": clear_contexts}

    def scope(self) -> HookScope:
        """A scope, entered."""
        scope = HookScope(self.model, "an open hook context", **self._how)
        scope.enter(*self._hooks)
        return scope

    def entered(self) -> Any:
        """The model."""
        return self.model
