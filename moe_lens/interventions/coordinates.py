"""Coordinates of results: which layer, position or expert each place along an axis of a tensor stands for."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_lens.errors import InputError
from moe_lens.storage import whole_numbers


def check_axes(what: str, shape: Sequence[int], axes: Mapping[str, Sequence[int]]) -> None:
    """Make sure that coordinates are those of a tensor.

    Args:
        what: The tensor, for the message.
        shape: Its own.
        axes: Coordinates by name of the axis, in the order of the tensor's.

    Raises:
        InputError: There are more of them than places along an axis, or fewer, or one is there twice.
    """
    sizes = [len(at) for at in axes.values()]
    if list(shape) != sizes:
        told = " × ".join(f"{size} {name}" for name, size in zip(axes, sizes, strict=True)) or "no axis"
        raise InputError(f"{what} have shape {tuple(shape)}; expected {told}, as axes has it")
    for name, at in axes.items():
        if len(set(at)) < len(at):
            raise InputError(f"axes has {name} {tuple(at)}; expected each once")


def read_axes(pairs: Any) -> dict[str, tuple[int, ...]]:
    """Axes of a header: pairs of a name and its coordinates.

    Raises:
        InputError: They are something else, or an axis is there twice.
    """
    axes = {name: whole_numbers(f"axis {name}", at, least=0) for name, at in pairs}
    if len(axes) < len(pairs):
        raise InputError(f"axes are {', '.join(name for name, _ in pairs)}; expected each once")
    return axes
