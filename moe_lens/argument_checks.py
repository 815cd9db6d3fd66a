"""From an annotation to the check of an argument: words, numbers and their ranges, flags, lists, tensors, classes."""

import functools
import inspect
import operator
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from moe_lens.checked_tensors import expected, is_tensor, tensors_in
from moe_lens.errors import a_kind

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


def argument_checks(function: Callable[..., Any]) -> list[tuple[int, str, Check, list[Any]]]:
    """The arguments of a function that can be checked: place, name and check of each, and which tensors it may be."""
    hints, found = hints_of(function), []
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
    if origin is Mapping:
        return functools.partial(_each_value, _check_of(inner[1]))
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
    if {str, Path} <= set(members):
        others = [member for member in members if member not in (str, Path, type(None))]
        if all(_is_own(member) or get_origin(member) is Annotated for member in others):  # no text is meant
            known = [found for found in map(_check_of, others) if found is not None]
            return functools.partial(_path, known, type(None) in members)
    checks = [
        (member, None if _is_own(member) or _is_anything_by_key(member) else _check_of(member)) for member in members
    ]
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
        return ", or ".join(dict.fromkeys([*wanted, *others]))

    return check


def _is_anything_by_key(annotation: Any) -> bool:
    """Whether it is a dictionary of what cannot be checked: among other classes, its class is all there is to see."""
    return get_origin(annotation) is Mapping and _check_of(get_args(annotation)[1]) is None


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


def _path(others: Sequence[Check], optional: bool, value: Any) -> str | None:
    """What the system can look for: an empty name would be the working directory's, which nobody means by it."""
    if optional and value is None:
        return None
    if not isinstance(value, str | os.PathLike):
        wanted = [check(value) for check in others]
        return None if None in wanted else ", or ".join([*map(str, wanted), "a path"])
    name = os.fspath(value)
    if not name:
        return "a path that is not empty"
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return "a path without half of a character (a lone surrogate)"
    if b"\0" in encoded:
        return "a path without a NUL character"
    longest = max(map(len, re.split(rb"[/\\]", encoded)))
    return f"a path of names of at most {_LONGEST} bytes" if longest > _LONGEST else None


_LONGEST = 255
"""Bytes that file systems give a name."""


def _instance(kind: type, value: Any) -> str | None:
    if isinstance(value, kind):
        return None
    made = f": an instance, {kind.__name__}(…)" if value is kind else ""
    return ("a text" if kind is str else a_kind(kind)) + made


def _model(attribute: str, value: Any) -> str | None:
    if hasattr(value, attribute) and not isinstance(value, type):
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


def _each_value(check: Check | None, values: Any) -> str | None:
    if not isinstance(values, Mapping):
        return "a dictionary"
    for key, value in values.items():
        wanted = None if check is None else check(value)
        if wanted is not None:
            return f"{wanted} at {key!r:.100}, not {value!r:.100}"
    return None


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Its annotations, read where all their names are known; as written otherwise."""
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError:  # a name that only type checkers import, or that comes later
        return dict(getattr(function, "__annotations__", {}))
