"""Whether a library has everything that moe_lens uses of it below its public surface."""

import pkgutil
from collections.abc import Iterable, Sequence
from importlib.metadata import version

from moe_lens.errors import IncompatibleVersionError


def missing(touchpoints: Iterable[str]) -> list[str]:
    """Those that are not there.

    Args:
        touchpoints: `"module:name"`, `"module:Class.method"`, or `"module:Class.attribute="` for an attribute that
            only instances have: some method of the class (or of one that it inherits from) must speak of it, or the
            function that is named in the class's place, of which it may be an argument.
    """
    return [point for point in touchpoints if not _is_there(point)]


def _is_there(point: str) -> bool:
    try:
        if not point.endswith("="):
            pkgutil.resolve_name(point)
            return True
        owner, _, attribute = point.removesuffix("=").rpartition(".")
        setter = pkgutil.resolve_name(owner)
    except (ImportError, AttributeError):
        return False
    methods = (
        [method for cls in setter.__mro__ for method in vars(cls).values()] if isinstance(setter, type) else [setter]
    )
    codes = (getattr(method, "__code__", None) for method in methods)
    return any(attribute in (*code.co_names, *code.co_varnames) for code in codes if code is not None)


def require(library: str, touchpoints: Iterable[str], tested: Sequence[str]) -> None:
    """Refuse a release of a library that lacks some of them.

    Args:
        library: name of the distribution.
        touchpoints: see `missing`.
        tested: the oldest and the newest minor release that are tested.

    Raises:
        IncompatibleVersionError: with the names of what is missing.
    """
    if absent := missing(touchpoints):
        names = ", ".join(point.removesuffix("=").replace(":", ".") for point in absent)
        raise IncompatibleVersionError(
            f"{library} {version(library)} has no {names}, which moe_lens uses; it is tested with "
            f"{' to '.join(tested)}: pip install '{library}=={tested[-1]}.*'"
        )
