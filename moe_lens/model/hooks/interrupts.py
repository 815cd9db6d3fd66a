"""Ctrl-C waits while hooks are put in or taken out.

Python runs signal handlers in the main thread at the start of any function, so a KeyboardInterrupt can strike in an
`__exit__` before its first statement; what was to be undone then stays. While a model is claimed, a handler stands in
front of the one that was there. It looks where the interrupt strikes: inside a function that must run whole, or in the
machinery of contextlib, the signal is sent again a moment later; anywhere else it goes to the handler behind.
"""

import _thread
import contextlib
import inspect
import signal
import threading
import time
import weakref
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_WHOLE: set[CodeType] = set()
_CONTEXTLIB = contextlib.contextmanager.__code__.co_filename
_watched: "weakref.WeakSet[Any]" = weakref.WeakSet()
_behind: Callable[[int, FrameType | None], Any] | None = None


def uninterrupted(function: Function) -> Function:
    """Let SIGINT wait until the function has returned, or a generator function has yielded.

    It works while something is watched.
    """
    _WHOLE.add(inspect.unwrap(function).__code__)
    return function


@uninterrupted
def watch(holder: object) -> None:
    """Let interrupts of the main thread wait where they must, until `unwatch(holder)` or the end of its life."""
    global _behind
    if threading.get_ident() != threading.main_thread().ident:
        return
    _watched.add(holder)
    here = signal.getsignal(signal.SIGINT)
    if here is not _interrupted and callable(here):
        _behind = here
        signal.signal(signal.SIGINT, _interrupted)


@uninterrupted
def unwatch(holder: object) -> None:
    """The opposite of `watch`."""
    _watched.discard(holder)
    if _watched or threading.get_ident() != threading.main_thread().ident:
        return
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, _behind)


def _interrupted(number: int, frame: FrameType | None) -> None:
    if _must_wait(frame):
        _thread.start_new_thread(_send_again, (number,))  # not threading.Thread: it takes locks
    elif _behind is not None:
        _behind(number, frame)


def _must_wait(frame: FrameType | None) -> bool:
    if frame is not None and frame.f_code.co_filename == _CONTEXTLIB:
        return True  # between a `with` and the context manager that a generator or an ExitStack makes
    while frame is not None:
        if frame.f_code in _WHOLE:
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    time.sleep(0.001)
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, number)  # wakes a blocking call too
    else:
        _thread.interrupt_main(signal.Signals(number))
