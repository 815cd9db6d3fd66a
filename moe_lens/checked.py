"""Arguments that are held against their annotations: words of a `Literal`, whole numbers, and ranges.

Annotations are not looked at when Python runs, so that a mistyped word would choose a default in silence, and 1.5 would
count as 1. `@checked` on a function or a class looks at those that can be had for nothing.
"""

import functools
import inspect
import operator
import types
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from moe_lens.errors import InputError

Target = TypeVar("Target")
Check = Callable[[Any], str | None]
"""From a value to what was expected; None if the value is that."""


@dataclass(frozen=True)
class Within:
    """A range, for `Annotated`: both ends belong to it."""

    least: float | int
    most: float | int = float("inf")

    def __str__(self) -> str:
        return f"from {self.least}" if self.most == float("inf") else f"from {self.least} to {self.most}"


Natural = Annotated[int, Within(0)]
"""A whole number from 0."""
Positive = Annotated[int, Within(1)]
"""A whole number from 1."""


def checked(target: Target) -> Target:
    """Check arguments at every call: of a function, or of the public methods and the making of a class.

    `Literal` (in lists too), `int` and `Annotated[…, Within(…)]` are checked, in unions too; everything
    else is left to the function.

    Raises:
        InputError: when it is called: names the argument, what came and what was expected.
    """
    if isinstance(target, type):
        for name, member in list(vars(target).items()):
            if name.startswith("_") and name != "__init__":
                continue
            if isinstance(member, classmethod | staticmethod):
                setattr(target, name, type(member)(_checked(member.__func__)))
            elif inspect.isfunction(member):
                setattr(target, name, _checked(member))
        return target
    return _checked(target)  # pyright: ignore[reportArgumentType]


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    checks = argument_checks(function)
    if not checks:
        return function  # as it is: one frame more would hide the caller from warnings

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for place, name, check in checks:
            if place < len(args):
                value = args[place]
            elif name in kwargs:
                value = kwargs[name]
            else:
                continue
            expected = check(value)
            if expected is not None:
                raise InputError(f"{name} is {value!r:.200}; expected {expected}")
        return function(*args, **kwargs)

    wrapper.__dict__["__checked__"] = True
    return wrapper


def argument_checks(function: Callable[..., Any]) -> list[tuple[int, str, Check]]:
    """The arguments of a function that can be checked: place, name and check of each."""
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError:  # a name that only type checkers import, or that comes later
        hints = dict(getattr(function, "__annotations__", {}))
    found = []
    for place, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
        kind = parameter.kind
        if kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name not in hints:
            continue
        check = _check_of(hints[name])
        if check is not None:
            by_name_only = kind is parameter.KEYWORD_ONLY
            found.append((10**9 if by_name_only else place, name, check))
    return found


def _check_of(annotation: Any) -> Check | None:
    """The check of an annotation; None where there is nothing to check."""
    origin = get_origin(annotation)
    if annotation is int:
        return lambda value: None if _is_whole(value) else "a whole number"
    if origin is Literal:
        return functools.partial(_word, get_args(annotation))
    if origin is Annotated:
        base, *extras = get_args(annotation)
        ranges = [extra for extra in extras if isinstance(extra, Within)]
        return functools.partial(_in_range, _check_of(base), ranges[0]) if ranges else _check_of(base)
    if origin in (typing.Union, types.UnionType):  # noqa: TID251
        return _check_of_union(get_args(annotation))
    if origin in (list, tuple, set, frozenset, Sequence, Iterable, Collection):
        inner = get_args(annotation)
        if len(set(inner) - {Ellipsis}) != 1 or get_origin(inner[0]) is not Literal:
            return None  # lists of numbers are read by `ids`
        return functools.partial(_each, functools.partial(_word, get_args(inner[0])))
    return None


def _check_of_union(members: tuple[Any, ...]) -> Check | None:
    """Any member will do; a member that cannot be checked lets values of its class pass."""
    checks = [(member, _check_of(member)) for member in members]
    if not any(check for _, check in checks):
        return None
    classes = [_class_of(member) for member, check in checks if check is None]
    if any(kind is None for kind in classes):
        return None  # something is allowed that cannot be told apart
    known = tuple(kind for kind in classes if kind is not None)

    def check(value: Any) -> str | None:
        if isinstance(value, known) and not (isinstance(value, bool) and bool not in known):
            return None
        expected = [said for member_check in checks if member_check[1] and (said := member_check[1](value))]
        if len(expected) < sum(one is not None for _, one in checks):
            return None
        others = ["None" if kind is type(None) else f"a {kind.__name__}" for kind in known]
        return ", or ".join([*expected, *others])

    return check


def _class_of(annotation: Any) -> type | None:
    """The class whose instances an annotation means, as far as `isinstance` can tell."""
    if annotation is None or annotation is type(None):
        return type(None)
    origin = get_origin(annotation) or annotation
    if origin is Any or not isinstance(origin, type) or getattr(origin, "_is_protocol", False):
        return None
    return origin


def _is_whole(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _word(words: tuple[Any, ...], value: Any) -> str | None:
    if any(value is word or (type(value) is type(word) and value == word) for word in words):
        return None
    close = get_close_matches(value, [w for w in words if isinstance(w, str)], 1) if isinstance(value, str) else []
    said = repr(words[0]) if len(words) == 1 else f"one of {words}"
    return said + (f"; did you mean {close[0]!r}?" if close else "")


def _in_range(base: Check | None, within: Within, value: Any) -> str | None:
    wrong = None if base is None else base(value)
    if wrong is None:
        try:
            wrong = None if not isinstance(value, bool) and within.least <= value <= within.most else "a number"
        except (TypeError, ValueError, RuntimeError):
            wrong = "a number"
    return None if wrong is None else f"{wrong} {within}"


def _each(check: Check, values: Any) -> str | None:
    if not isinstance(values, list | tuple | set | frozenset):
        return None  # a range holds whole numbers; an iterator would be used up; a Mapping is read by its function
    for value in values:
        expected = check(value)
        if expected is not None:
            return f"{expected} in it, not {value!r:.100}"
    return None
