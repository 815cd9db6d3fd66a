"""Tensors that are held against their annotations: their kind, their axes, and sizes that several must share.

torch broadcasts what another shape allows, and counts booleans as numbers, so that a wrong tensor often gives a number.
"""

import os
from collections.abc import Iterator
from typing import Any, get_args

from moe_lens.errors import InputError, a_kind

_KINDS = {"Int": "whole numbers", "Float": "floating-point numbers", "Bool": "True and False"}


def is_tensor(annotation: Any) -> bool:
    """Whether it is a jaxtyping annotation."""
    return isinstance(annotation, type) and hasattr(annotation, "array_type") and hasattr(annotation, "dims")


def fits(annotation: Any, value: Any) -> bool:
    """Whether a value has the class, the kind of numbers and the number of axes."""
    return (
        isinstance(value, annotation.array_type)
        and _is_kind(annotation.dtype.__name__, value.dtype)
        and _sizes(annotation, value.shape) is not None
    )


def expected(annotation: Any, value: Any) -> str | None:
    """What was expected; None if the value is that."""
    return None if fits(annotation, value) else in_words(annotation)


def in_words(annotation: Any) -> str:
    """An annotation, for a message."""
    axes = "" if annotation.dim_str == "..." else f" [{', '.join(annotation.dim_str.split())}]"
    kind = _KINDS.get(annotation.dtype.__name__)
    return "a tensor" + (f" of {kind}" if kind else "") + axes


def came(value: Any) -> str:
    """A value, for a message: of arrays, their shapes and not their numbers."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{a_kind(value)} of {str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    said = repr(os.fspath(value) if isinstance(value, os.PathLike) else value)
    return a_kind(value) if "\n" in said else f"{said:.200}"  # a model, a frame


def tensors_in(annotation: Any) -> list[Any]:
    """The jaxtyping annotations that an argument's has: itself, or members of a union."""
    return [each for each in (annotation, *get_args(annotation)) if is_tensor(each)]


def check_together(arguments: Iterator[tuple[str, list[Any], Any]]) -> None:
    """Nothing, where axes of one name have one size.

    Args:
        arguments: Of each argument: its name, its annotations, and its value.

    Raises:
        InputError: Two tensors differ where they have an axis in common.
    """
    seen: dict[str, tuple[Any, str]] = {}
    for argument, annotations, value in arguments:
        found = next((each for each in annotations if fits(each, value)), None)
        for axis, size in (_sizes(found, value.shape) or {}).items() if found is not None else ():
            known, other = seen.setdefault(axis, (size, argument))
            if known != size:
                raise InputError(
                    f"{argument} has shape {tuple(value.shape)}, and {other} has {known} as its {axis!r}; expected "
                    f"{in_words(found)} with the same {axis!r}"
                )


def _is_kind(kind: str, dtype: Any) -> bool:
    is_bool = str(dtype).endswith("bool")
    if kind in ("Float", "Int", "Bool"):
        whole = not (dtype.is_floating_point or dtype.is_complex or is_bool)
        return {"Float": dtype.is_floating_point, "Int": whole, "Bool": is_bool}[kind]
    return True


def _sizes(annotation: Any, shape: Any) -> dict[str, Any] | None:
    """The sizes of named axes; None where their number, or a size that the annotation says, is another."""
    dims, several = annotation.dims, annotation.index_variadic
    many: tuple[Any, ...] = ()
    if several is None:
        if len(dims) != len(shape):
            return None
        pairs = list(zip(dims, shape, strict=True))
    else:
        after = len(dims) - several - 1
        if len(shape) < several + after:
            return None
        pairs = [*zip(dims[:several], shape[:several], strict=True)]
        pairs += zip(dims[several + 1 :], shape[len(shape) - after :], strict=True) if after else ()
        many = tuple(shape[several : len(shape) - after])
    if any(getattr(dim, "size", size) != size for dim, size in pairs):
        return None
    sizes = {dim.name: size for dim, size in pairs if getattr(dim, "name", None)}
    return sizes if several is None or not getattr(dims[several], "name", None) else {**sizes, dims[several].name: many}
