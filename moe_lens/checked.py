"""Arguments that are held against their annotations: words of a `Literal`, numbers and their ranges, flags, lists.

Annotations are not looked at when Python runs, so that a mistyped word would choose a default in silence, 1.5 would
count as 1, and a text would be read letter by letter where texts were meant. A package checks all that it offers, by
`what_is_offered(__name__)` at the end of its `__init__`; what is imported by its module is decorated, by `@checked`.
"""

import functools
import inspect
import operator
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from moe_lens.checked_tensors import came, check_together, expected, is_tensor, tensors_in
from moe_lens.errors import InputError, a_kind

Target = TypeVar("Target")
Check = Callable[[Any], str | None]
"""From a value to what was expected; None if the value is that."""


@dataclass(frozen=True)
class ReadByItself:
    """For `Annotated`: what a function reads in several ways, and says more of than an annotation could."""


@dataclass(frozen=True)
class Within:
    """A range, for `Annotated`: both ends belong to it."""

    least: float | int
    most: float | int = float("inf")

    def __str__(self) -> str:
        if self.least == float("-inf"):
            return f"to {self.most}" if self.most < float("inf") else ""
        return f"from {self.least}" if self.most == float("inf") else f"from {self.least} to {self.most}"


@dataclass(frozen=True)
class ModelWith:
    """For `Annotated`: a `HookedMoE`, or what stands in for one: it has an attribute that no other model has."""

    attribute: str


AnyModel = Annotated[Any, ModelWith("moe_layers")]
"""A `HookedMoE`."""
Natural = Annotated[int, Within(0)]
"""A whole number from 0."""
Positive = Annotated[int, Within(1)]
"""A whole number from 1."""
FromEnd = Annotated[int, Within(float("-inf"))]
"""A whole number; negative ones count from the end."""
Seed = Annotated[int, Within(0, 2**63 - 1)]
"""What torch and numpy both take as a seed."""


def what_is_offered(package: str) -> None:
    """Check all that a package offers: its functions, its classes, and the classes of what these return.

    Args:
        package: Its `__name__`; called when all names are there.
    """
    here = sys.modules[package]
    waiting: list[Any] = [value for name, value in vars(here).items() if not name.startswith("_")]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if not str(getattr(value, "__module__", "")).startswith("moe_lens.") or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, type):
            checked(value)
            waiting += [each for function in _functions(value) for each in _returned(function)]
        elif inspect.isfunction(value):
            waiting += _returned(value)
            home, name = sys.modules[value.__module__], value.__name__
            if getattr(home, name, None) is value:  # and not of a class
                wrapped = checked(value)
                for module in (home, here):
                    setattr(module, name, wrapped)


def checked(target: Target) -> Target:
    """Check arguments at every call: of a function, or of the making and the public methods of a class and its bases.

    Raises:
        InputError: when it is called: names the argument, what came and what was expected.
    """
    if not isinstance(target, type):
        return _checked(target)  # pyright: ignore[reportArgumentType]
    for base in target.__mro__:
        if not base.__module__.startswith("moe_lens.") or getattr(base, "_is_protocol", False):
            continue
        for name, member in list(vars(base).items()):
            if name.startswith("_") and name != "__init__":
                continue
            if isinstance(member, classmethod | staticmethod):
                setattr(base, name, type(member)(_checked(member.__func__)))
            elif inspect.isfunction(member):
                setattr(base, name, _checked(member))
    return target


def _functions(kind: type) -> Iterator[Callable[..., Any]]:
    """The public methods and properties of a class."""
    for name in dir(kind):
        member = inspect.getattr_static(kind, name)
        function = getattr(member, "fget", None) or getattr(member, "func", None) or getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(function):
            yield function


def _returned(function: Callable[..., Any]) -> Iterator[type]:
    """The classes that a function's result is made of, as its annotation says."""
    waiting = [_hints(function).get("return")]
    while waiting:
        annotation = waiting.pop()
        if isinstance(annotation, type):
            yield annotation
        waiting += get_args(annotation)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError:  # a name that only type checkers import, or that comes later
        return dict(getattr(function, "__annotations__", {}))


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    checks = [] if "__checked__" in vars(function) else argument_checks(function)
    if not checks:
        return function  # as it is: one frame more would hide the caller from warnings
    tensors = [(place, name, found) for place, name, _, found in checks if found]

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for place, name, check, _ in checks:
            if place < len(args):
                value = args[place]
            elif name in kwargs:
                value = kwargs[name]
            else:
                continue
            wanted = check(value)
            if wanted is not None:
                raise InputError(f"{name} is {came(value)}; expected {wanted}")
        if len(tensors) > 1:
            given = ((name, found, args[at] if at < len(args) else kwargs.get(name)) for at, name, found in tensors)
            check_together(given)
        return function(*args, **kwargs)

    wrapper.__dict__["__checked__"] = True
    return wrapper


def argument_checks(function: Callable[..., Any]) -> list[tuple[int, str, Check, list[Any]]]:
    """The arguments of a function that can be checked: place, name and check of each, and which tensors it may be."""
    hints, found = _hints(function), []
    for place, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
        kind = parameter.kind
        if kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name not in hints:
            continue
        check = _check_of(hints[name])
        if check is not None:
            by_name_only = kind is parameter.KEYWORD_ONLY
            found.append((10**9 if by_name_only else place, name, check, tensors_in(hints[name])))
    return found


def _check_of(annotation: Any) -> Check | None:
    """The check of an annotation; None where there is nothing to check."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation in _PLAIN:
        return functools.partial(_plain, *_PLAIN[annotation])
    if _is_own(annotation):
        return functools.partial(_instance, annotation)
    if is_tensor(annotation):
        return functools.partial(expected, annotation)
    if origin is Literal:
        return functools.partial(_word, inner)
    if Callable in (annotation, origin):
        return functools.partial(_plain, callable, "a function")
    if origin is Annotated:
        base, *extras = inner
        if any(isinstance(extra, ReadByItself) for extra in extras):
            return None
        models = [extra for extra in extras if isinstance(extra, ModelWith)]
        if models:
            return functools.partial(_model, models[0].attribute)
        ranges = [extra for extra in extras if isinstance(extra, Within)]
        if not ranges:
            return _check_of(base)
        kind = _PLAIN.get(base, _PLAIN[float])[1]
        return functools.partial(_in_range, _check_of(base), kind, ranges[0])
    if origin in (typing.Union, types.UnionType):  # noqa: TID251
        return _check_of_union(inner)
    if origin in _SEVERAL:
        alike = len(set(inner) - {Ellipsis}) == 1
        if alike and origin in _ABSTRACT and _counts(inner[0]):
            return None  # read by `ids`, which takes arrays and masks too, and says more
        return functools.partial(_each, _check_of(inner[0]) if alike else None, inner[0] if alike else None)
    if origin is Mapping and (of_values := _check_of(inner[1])) is not None:
        return functools.partial(_each_value, of_values)
    return None


_ABSTRACT = (Sequence, Iterable, Collection)
_SEVERAL = (list, tuple, set, frozenset, *_ABSTRACT)


def _is_own(annotation: Any) -> bool:
    """Whether it is a text, or a class of this package whose instances `isinstance` knows."""
    if annotation is str:
        return True
    own = isinstance(annotation, type) and annotation.__module__.startswith("moe_lens.")
    return own and not getattr(annotation, "_is_protocol", False)


def _counts(annotation: Any) -> bool:
    """Whether it means whole numbers, or pairs of them."""
    inner = get_args(annotation)
    return annotation is int or (get_origin(annotation) in (Annotated, tuple) and inner[0] is int)


def _check_of_union(members: tuple[Any, ...]) -> Check | None:
    """Any member will do; a member that cannot be checked lets values of its class pass."""
    if Path in members and set(members) <= {str, Path, type(None)}:
        known: tuple[type, ...] = (str, os.PathLike, *((type(None),) if type(None) in members else ()))
        return functools.partial(_plain, lambda value: isinstance(value, known), "a path")
    checks = [(member, None if _is_own(member) else _check_of(member)) for member in members]
    optional = len(members) == 2 and type(None) in members and any(map(_is_own, members))
    if not optional and not any(check for _, check in checks):
        return None  # several classes: read by the function itself, which says more
    classes = [_class_of(member) for member, check in checks if check is None]
    if any(kind is None for kind in classes):
        return None  # something is allowed that cannot be told apart
    others_known = tuple(kind for kind in classes if kind is not None)

    def check(value: Any) -> str | None:
        if isinstance(value, others_known) and not isinstance(value, bool):
            return None
        wanted = [said for member_check in checks if member_check[1] and (said := member_check[1](value))]
        if len(wanted) < sum(one is not None for _, one in checks):
            return None
        others = ["None" if kind is type(None) else a_kind(kind) for kind in others_known]
        return ", or ".join([*wanted, *others])

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
    if _is_flag(value):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _is_number(value: Any) -> bool:
    """Whether it is a real number: Python's, numpy's, or a tensor's of no axes."""
    if _is_flag(value):
        return False
    return isinstance(value, Real) or (getattr(value, "shape", None) == () and hasattr(value, "__float__"))


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")  # numpy's, which is not imported here


_PLAIN = {int: (_is_whole, "a whole number"), float: (_is_number, "a number"), bool: (_is_flag, "True or False")}


def _plain(fits: Callable[[Any], bool], expected: str, value: Any) -> str | None:
    return None if fits(value) else expected


def _instance(kind: type, value: Any) -> str | None:
    if isinstance(value, kind):
        return None
    made = f": an instance, {kind.__name__}(…)" if value is kind else ""
    return ("a text" if kind is str else a_kind(kind)) + made


def _model(attribute: str, value: Any) -> str | None:
    if hasattr(value, attribute):
        return None
    return "a HookedMoE, as HookedMoE.from_pretrained(name) and HookedMoE.from_hf(model, tokenizer) give it"


def _word(words: tuple[Any, ...], value: Any) -> str | None:
    if any(value is word or (type(value) is type(word) and value == word) for word in words):
        return None
    close = get_close_matches(value, [w for w in words if isinstance(w, str)], 1) if isinstance(value, str) else []
    said = repr(words[0]) if len(words) == 1 else f"one of {words}"
    return said + (f"; did you mean {close[0]!r}?" if close else "")


def _in_range(base: Check | None, kind: str, within: Within, value: Any) -> str | None:
    wrong = None if base is None else base(value)
    if wrong is None:
        try:
            wrong = None if not isinstance(value, bool) and within.least <= value <= within.most else kind
        except (TypeError, ValueError, RuntimeError):
            wrong = kind
    return None if wrong is None else f"{wrong} {within}".rstrip()


def _each(check: Check | None, kind: Any, values: Any) -> str | None:
    if isinstance(values, str | bytes) or (_is_own(kind) and isinstance(values, kind)):
        return "several: put a single one in a list"
    if isinstance(values, Mapping):
        return "several, in a list and no dictionary"  # whose keys alone would be read
    if not (isinstance(values, Iterable) or hasattr(values, "__getitem__")):
        return "several, in a list"
    if check is None or not isinstance(values, list | tuple | set | frozenset):
        return None  # an array is read by `ids`; an iterator would be used up
    for value in values:
        wanted = check(value)
        if wanted is not None:
            return f"{wanted} in it, not {value!r:.100}"
    return None


def _each_value(check: Check, values: Any) -> str | None:
    if not isinstance(values, Mapping):
        return "a dictionary"
    for key, value in values.items():
        wanted = check(value)
        if wanted is not None:
            return f"{wanted} at {key!r:.100}, not {value!r:.100}"
    return None
