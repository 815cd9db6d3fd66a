"""Arguments that are held against their annotations: words of a `Literal`, numbers and their ranges, flags, lists.

Annotations are not looked at when Python runs, so that a mistyped word would choose a default in silence, 1.5 would
count as 1, and a text would be read letter by letter where texts were meant. A package checks all that it offers, by
`what_is_offered(__name__)` at the end of its `__init__`; what is imported by its module is decorated, by `@checked`.
"""

import functools
import inspect
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeVar, get_args

from moe_lens.argument_checks import ModelWith, Within, argument_checks, hints_of
from moe_lens.checked_tensors import came, check_together
from moe_lens.errors import InputError

Target = TypeVar("Target")
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
    waiting = [hints_of(function).get("return")]
    while waiting:
        annotation = waiting.pop()
        if isinstance(annotation, type):
            yield annotation
        waiting += get_args(annotation)


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    checks = [] if "__checked__" in vars(function) else argument_checks(function)
    if not checks:
        return function  # as it is: one frame more would hide the caller from warnings
    tensors = [(place, name, found) for place, name, _, found in checks if found]

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for place, name, check, tensor in checks:
            if place < len(args):
                value = args[place]
            elif name in kwargs:
                value = kwargs[name]
            else:
                continue
            wanted = check(value)
            if wanted is not None:
                raise InputError(f"{name} is {came(value)}; expected {wanted}")
            plain = _plain(value, bool(tensor))
            if plain is not value and place < len(args):
                args = (*args[:place], plain, *args[place + 1 :])
            elif plain is not value:
                kwargs[name] = plain
        if len(tensors) > 1:
            given = ((name, found, args[at] if at < len(args) else kwargs.get(name)) for at, name, found in tensors)
            check_together(given)
        return function(*args, **kwargs)

    wrapper.__dict__["__checked__"] = True
    return wrapper


def _plain(value: Any, tensor: bool) -> Any:
    """A number of numpy, or of torch where no tensor is meant, as Python's: random generators and JSON take no other.

    In lists and tuples, too.
    """
    if type(value) in (list, tuple):
        plain = [_plain(each, tensor) for each in value]
        return value if all(map(operator.is_, plain, value)) else type(value)(plain)
    home = type(value).__module__.partition(".")[0]
    if getattr(value, "shape", None) != ():
        return value
    return value.item() if home == "numpy" or (home == "torch" and not tensor and not value.requires_grad) else value
