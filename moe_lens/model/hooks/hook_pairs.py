"""Hooks as people write them: pairs of a name, or a predicate on names, and a function."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any
from weakref import WeakSet

from moe_lens.errors import HookError, a_kind

Pair = tuple[str | Callable[[str], bool], Callable[..., Any]]
_EXPECTED = "expected pairs [(name, function), …], the name being a text or a function from a name to True or False"

_FITTING: WeakSet[Any] = WeakSet()
"""Code and classes of hook functions that fit: reading the signature of each took a third of a pass with all hooks."""


def as_pairs(hooks: Any) -> list[Pair]:
    """Hooks in a list, which can be gone through again.

    Args:
        hooks: Pairs; of an intervention, its `fwd_hooks`.

    Raises:
        HookError: They are no pairs, or a function does not take an activation and `hook`.
    """
    if isinstance(hooks, str | Mapping) or not isinstance(hooks, Iterable):
        raise HookError(f"hooks are {a_kind(hooks)}; {_EXPECTED}")
    pairs = list(hooks)
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise HookError(f"a hook is {pair!r:.80}; {_EXPECTED}")
        name, function = pair
        if not isinstance(name, str) and not callable(name):
            raise HookError(f"a hook is named by {a_kind(name)}, {name!r:.80}; {_EXPECTED}")
        check_function(function)
    return [(name, function) for name, function in pairs]


def check_function(function: Any) -> None:
    """Nothing, where a hook function can be called as TransformerLens calls it: `function(activation, hook=point)`.

    Raises:
        HookError: It cannot.
    """
    if not callable(function):
        raise HookError(f"a hook function is {function!r:.80}; expected a function of (activation, hook)")
    kind = _kind(function)
    if kind in _FITTING:
        return
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except ValueError:
        return  # some of C have none, and say so themselves when they are called
    try:
        signature.bind(None, hook=None)
    except TypeError:
        name = getattr(function, "__qualname__", None) or repr(function)
        raise HookError(
            f"the hook function {name:.80} takes {signature}; expected (activation, hook): the hook point is passed by "
            "that name, and nothing else is; functools.partial gives a function the rest"
        ) from None
    if kind is not None:
        _FITTING.add(kind)


def _kind(function: Any) -> Any:
    """What decides alone, where something does, which arguments a function takes."""
    if hasattr(function, "__signature__"):
        return None
    if isinstance(function, FunctionType):
        return None if function.__defaults__ or function.__kwdefaults__ else function.__code__
    return type(function) if isinstance(vars(type(function)).get("__call__"), FunctionType) else None
