"""Names of a package that are imported when they are first asked for, so that importing the package costs nothing."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def resolved_late(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The functions `__getattr__` and `__dir__` of a package.

    Type checkers are to see the same names as imports under TYPE_CHECKING, and these functions only in the other
    branch: a `__getattr__` that they saw would allow every name.

    Args:
        package: Its `__name__`.
        names: By module, what it offers.
    """
    modules = {name: module for module, held in names.items() for name in held}

    def look_up(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return look_up, lambda: sorted({*vars(sys.modules[package]), *modules})
