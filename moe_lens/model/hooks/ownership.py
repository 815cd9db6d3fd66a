"""A model belongs to one thread at a time, from its first claim to its last.

Hooks, and what a forward pass tells its hooks, are state of the model: a second thread inside `with model.ablate(…)`
of the first would be ablated too, and would mix its rows into the first one's cache. So a forward pass, an open hook
context and a stream each claim the model, and another thread, or another task of the same event loop, gets an error;
never a wait, because a paused stream would let it wait for ever. Backward passes run on threads of autograd, which act
for the thread that waits for them.
"""

import gc
import sys
import threading
import weakref
from contextlib import nullcontext, suppress
from typing import Any, cast

import torch

from moe_lens.errors import HookError, InUseError
from moe_lens.model.hooks.interrupts import uninterrupted, unwatch, watch


class Claim:
    """One reason why a thread owns a model. Whoever opened it holds it; the owner only knows of it.

    A claim that was thrown away without `leave`, because an exception struck at a bad moment, is thus known to be lost.
    """

    __slots__ = ("__weakref__", "leaving", "owner", "running", "task", "thread", "what")

    def __init__(self, owner: "Owner", what: str):
        self.owner, self.what = owner, what
        self.thread, self.task = threading.current_thread(), _task()
        self.leaving = False
        self.running: Any = None
        """What a forward pass tells its hooks, if this is one."""

    @uninterrupted
    def __enter__(self) -> "Claim":
        self.owner.take(self)
        return self

    @uninterrupted
    def __exit__(self, *_: object) -> None:
        self.leaving = True
        self.undo()
        self.owner.drop(self)

    def undo(self) -> None:
        """Take out what the claim has put into the model."""

    def lets(self, task: Any) -> bool:
        """Whether this thread, in this task, may use the model too."""
        if self.thread.ident != threading.get_ident():
            return not self.thread.is_alive() or _in_backward()
        return self.task is None or self.task is task or self.task.done()


class Owner:
    """The claims on one model. A copy of the model belongs to nobody."""

    def __init__(self) -> None:
        self._model: Any = None
        self._claims: list[weakref.ref[Claim]] = []
        """In the order in which they came. No lock: one that an exception leaves locked would let others wait."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Owner":
        return Owner()

    def __reduce__(self) -> tuple[type["Owner"], tuple[()]]:
        return Owner, ()

    def bind(self, model: Any) -> None:
        """Say whose claims these are."""
        self._model = weakref.ref(model)

    def take(self, claim: Claim) -> None:
        """Enter a claim.

        Raises:
            InUseError: the model belongs to another thread or task.
        """
        mine = weakref.ref(claim)
        self._claims.append(mine)
        before = list(self._claims)
        before = before[: before.index(mine)]  # of two that come at once, the first has it
        if any([getattr(ref(), "in_stack", False) for ref in before]):  # noqa: C419 (a generator could be interrupted)
            gc.collect(1)  # a stack that an exception has left is in a circle with that exception, and holds its scopes
        lost = [ref for ref in before if (other := ref()) is None or _lost(other)]
        live = [other for ref in before if ref not in lost and (other := ref()) is not None]
        try:
            self._check(live)
            if any([getattr(other, "abandoned", False) for other in live]):  # noqa: C419 (as above)
                raise InUseError(
                    "a hook context that was entered by hand was about to be left, and never was: call its __exit__ "
                    "again, or model.reset_hooks()"
                )
        except InUseError:
            self._remove(mine)
            raise
        watch(claim)
        if lost:
            self.sweep(claim)
            for ref in lost:
                self._remove(ref)

    def sweep(self, claim: Claim) -> None:
        """Remove all temporary hooks from the model but those of the claims that hold, a new one apart."""
        held = [other for ref in self._claims if (other := ref()) not in (None, claim) and not _lost(other)]
        self._model().remove_leftovers([handle for other in held for handle in getattr(other, "handles", ())])

    def drop(self, claim: Claim) -> None:
        """Remove a claim; any thread may, because any thread may collect a forgotten generator."""
        self._remove(weakref.ref(claim))
        unwatch(claim)

    def _remove(self, ref: "weakref.ref[Claim]") -> None:
        with suppress(ValueError):
            self._claims.remove(ref)

    def check(self) -> None:
        """Nothing, where this thread may use the model.

        Raises:
            InUseError: the model belongs to another thread or task.
        """
        self._check([claim for ref in self._claims if (claim := ref()) is not None])

    def check_between_passes(self) -> None:
        """Nothing, where this thread may use the model, and is not inside a forward pass of it.

        Raises:
            HookError: it is, because a hook function asks for another pass.
            InUseError: the model belongs to another thread or task.
        """
        self.check()
        if self.running is not None:
            raise HookError(
                "a hook function runs the model while a forward pass of it is running, whose hooks, cache and layer "
                "limits would be mixed with its own. Run it before, and let the function use what came; or let it run "
                "a copy made before (copy.deepcopy(model))"
            )

    def give_up(self) -> None:
        """Count as lost what was about to be left, and never was."""
        for ref in self._claims:
            if (claim := ref()) is not None and getattr(claim, "abandoned", False):
                claim.leaving = True

    @property
    def claimed(self) -> bool:
        """Whether the model belongs to anybody."""
        return any(ref() is not None for ref in self._claims)

    def passing(self) -> "Claim | nullcontext[None]":
        """A claim for tokens that pass through a layer, where the forward pass has none: transformers' own model runs.

        Raises:
            InUseError: the model belongs to another thread or task.
        """
        self.check()
        return nullcontext() if self.claimed else Claim(self, "a forward pass of the wrapped model")

    @property
    def running(self) -> Any:
        """What the forward pass that is running tells its hooks; None where none is."""
        for ref in reversed(self._claims):
            claim = ref()
            if claim is not None and claim.running is not None and not claim.leaving:
                return claim.running
        return None

    @property
    def columns(self) -> torch.Tensor | None:
        """Of the generation that is running, the column that each of the prompt's had before padding was moved."""
        found = (getattr(ref(), "columns", None) for ref in reversed(self._claims))
        return next((columns for columns in found if columns is not None), None)

    @property
    def depth(self) -> int:
        """How many hook contexts are open."""
        return sum(hasattr(ref(), "handles") for ref in self._claims)

    def scopes(self) -> list[Any]:
        """The hook contexts that are open."""
        return [claim for ref in self._claims if hasattr(claim := ref(), "handles") and not _lost(cast(Claim, claim))]

    @staticmethod
    def _check(claims: list[Claim]) -> None:
        if not claims:
            return
        task = _task()
        for claim in claims:
            if claim.lets(task):
                continue
            where = "another asyncio task" if claim.thread.ident == threading.get_ident() else repr(claim.thread.name)
            raise InUseError(
                f"this model is in use: {where} is inside {claim.what}, and two at once would mix their hooks and "
                "caches. Use it from one thread at a time, or give each a copy: copy.deepcopy(model)"
            )


def _lost(claim: Claim) -> bool:
    """Whether an exception has struck while it was being left, or its thread has ended."""
    return (claim.leaving and claim.thread.ident == threading.get_ident()) or not claim.thread.is_alive()


def _in_backward() -> bool:
    """Whether this is a thread of autograd's own: it acts for the one that waits for the backward pass."""
    return torch._C._current_graph_task_id() != -1 and isinstance(threading.current_thread(), threading._DummyThread)


def _task() -> Any:
    """The asyncio task that runs, if any does."""
    asyncio = sys.modules.get("asyncio")
    if asyncio is None or asyncio._get_running_loop() is None:
        return None
    return asyncio.current_task()
