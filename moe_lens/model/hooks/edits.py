"""What hooks are on a model, said by value: what is done under other hooks is other work."""

import functools
from typing import Any

from transformer_lens.hook_points import HookPoint

from moe_lens.by_value import digest_of
from moe_lens.errors import InputError
from moe_lens.model.cache.caching_hook import CachingHook

_KNOWN = ("moe_lens.", "transformer_lens.", "accelerate.", "transformers.")
"""Packages whose functions torch calls around the modules of every model."""


def edits(model: Any, exactly: bool = True) -> list[str]:
    """A line for each function that is called while a `HookedMoE` runs, at a hook point or around a module.

    A line holds the place, the name of the function, or of the intervention that it is of, and a digest of what it
    holds. Whether a function changes anything, nobody can know: those that only look have lines too.

    Args:
        model: The model.
        exactly: Whether to refuse a function that cannot be told from others, instead of leaving out the digest.

    Raises:
        InputError: A function holds what cannot be told from something else.
    """
    recipes = _recipes(model)
    found = []
    for point in dict.fromkeys(model.hook_dict.values()):
        for direction, handles in (("forward", point.fwd_hooks), ("backward", point.bwd_hooks)):
            for handle in handles:
                made = recipes.get(id(handle))
                what = handle.user_hook if made is None else (made.make, made.arguments)
                name = _name(handle.user_hook if made is None else made.make)
                found.append(_line(f"{point.name}, {direction}", name, what, exactly))
    for name, module in model.original_model.named_modules():
        for function in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if not isinstance(module, HookPoint) and not _home(function).startswith(_KNOWN):
                place = name.replace("._original_component", "")
                found.append(_line(f"module {place}", _name(function), function, exactly))
    return found


def hooked_by_hand(model: Any) -> bool:
    """Whether functions are called at hook points in a forward pass that are neither interventions' nor caches'.

    Args:
        model: The model.
    """
    handles = [handle for point in model.hook_dict.values() for handle in point.fwd_hooks]
    known = _recipes(model) if handles else {}
    return any(id(handle) not in known and not isinstance(handle.user_hook, CachingHook) for handle in handles)


def _recipes(model: Any) -> dict[int, Any]:
    """How the interventions are made that handles are of, by the handles' ids."""
    return {id(handle): scope.recipe for scope in model.owner.scopes() for handle in scope.handles if scope.recipe}


def _line(where: str, name: str, what: Any, exactly: bool) -> str:
    try:
        return f"{where}: {name} {digest_of(what)}"
    except InputError as error:
        if not exactly:
            return f"{where}: {name}"
        raise InputError(
            f"the hook {name} at {where} holds something that cannot be noted with what is saved: {error}. Remove it, "
            "or use an intervention"
        ) from None


def _name(function: Any) -> str:
    inner = function.func if isinstance(function, functools.partial) else function
    return getattr(inner, "__qualname__", type(inner).__qualname__)


def _home(function: Any) -> str:
    inner = function.func if isinstance(function, functools.partial) else function
    return getattr(inner, "__module__", None) or type(inner).__module__
