"""Numbers that name experts, ranks, layers and positions, and masks, as people write them: where they are read."""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from moe_lens.checked import Natural
from moe_lens.errors import InputError, a_kind


class Ids(tuple[int, ...]):
    """Numbers from 0, ascending, each once. It remembers the length of the mask that they came from."""

    mask: int | None = None
    """The length of the mask; None if numbers were given."""

    def check(self, name: str, count: Natural) -> None:
        """Nothing, where there are so many of what they name.

        Raises:
            InputError: a number is too large, or the mask has another length.
        """
        if self.mask is not None and self.mask != count:
            raise InputError(f"{name}: got a mask of {self.mask}; expected one of {count}, or numbers")
        if self and self[-1] >= count:
            raise InputError(f"{name}: got {self[-1]}; expected numbers from 0 to {count - 1}")


def ids(name: str, values: Any, *, empty: bool = False, signed: bool = False) -> Ids:
    """Numbers in a list, set, range, array or tensor; or the true places of a mask, an array or tensor of booleans.

    Args:
        name: what they name, for messages.
        values: the numbers or the mask.
        empty: whether there may be none.
        signed: whether they may be negative, where they are positions, which count from the end then.

    Raises:
        InputError: anything else: booleans in a list, fractions, negative numbers, texts, more than one axis.
    """
    if isinstance(values, Tensor | np.ndarray):
        return _of_array(name, torch.as_tensor(values), empty)
    told = isinstance(values, Mapping) and any(value is not None for value in values.values())  # {17: 0.5} says more
    if told or isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise _wrong(name, repr(values))
    given = list(values)
    numbers = [_number(value) for value in given]
    if None in numbers:
        raise _wrong(name, repr(given))
    whole = [number for number in numbers if number is not None]
    if whole and min(whole) < 0 and not signed:
        raise _wrong(name, str(min(whole)))
    found = Ids(sorted(set(whole)))
    if not found and not empty:
        raise _wrong(name, repr(given))
    return found


def in_order(name: str, values: Any, count: Natural) -> tuple[int, ...]:
    """Numbers below `count` in the order in which they were given, negative ones counted from the end; or a mask.

    Args:
        name: what they name, for messages.
        values: the numbers, each as often as it is meant; or a mask.
        count: how many there are of what they name.

    Raises:
        InputError: what `ids` refuses, or a number that is out of range.
    """
    if isinstance(values, Tensor | np.ndarray) and torch.as_tensor(values).dtype != torch.bool:
        values = values.tolist()
    found = ids(name, values, signed=True)
    if found.mask is not None:
        found.check(name, count)
        return tuple(found)
    wrong = [number for number in found if not -count <= number < count]
    if wrong:
        raise InputError(
            f"{name}: got {wrong[0]}; expected numbers from 0 to {count - 1}, or from the end {-count} to -1"
        )
    return tuple(operator.index(value) % count for value in values)


def one_id(name: str, value: Any, count: int | None = None) -> int:
    """A single number from 0, below `count` where that is known.

    Raises:
        InputError: a boolean, a fraction, a negative or too large number, or no number.
    """
    number = _number(value)
    if number is None or number < 0:
        raise InputError(f"{name}: got {value!r}; expected a whole number from 0")
    if count is not None and number >= count:
        raise InputError(f"{name}: got {number}; expected numbers from 0 to {count - 1}")
    return number


def as_mask(name: str, values: Tensor) -> Bool[Tensor, "*shape"]:
    """A mask of booleans, or of numbers that are all 1 and 0, as booleans.

    Args:
        name: what it is called, for messages.
        values: the mask.

    Raises:
        InputError: no tensor, or other numbers, as in a mask that is added to attention's scores, where 0 means what is
            real.
    """
    if not isinstance(values, Tensor):
        raise InputError(f"{name} is {a_kind(values)}; expected a tensor of ones and zeros, or of booleans")
    if values.is_meta or bool(((values == 0) | (values == 1)).all()):
        return values.bool()
    raise InputError(f"{name} holds other numbers than 1 (a real token) and 0 (padding)")


def _number(value: Any) -> int | None:
    """A whole number; None for booleans, which count as 0 and 1 in Python, for fractions and for anything else."""
    if isinstance(value, bool | np.bool_) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _of_array(name: str, values: Tensor, empty: bool) -> Ids:
    if values.ndim != 1 or values.is_floating_point() or values.is_complex():
        raise _wrong(name, f"{values.dtype} of shape {tuple(values.shape)}")
    is_mask = values.dtype == torch.bool
    numbers = (values.nonzero()[:, 0] if is_mask else values).tolist()
    if numbers and min(numbers) < 0:
        raise _wrong(name, str(min(numbers)))
    found = Ids(sorted(set(numbers)))
    if len(found) < len(numbers):
        raise InputError(f"{name}: got {numbers}; expected each number once. A mask is a tensor of booleans")
    if not found and not empty:
        raise _wrong(name, "a mask that is nowhere true" if is_mask else "an empty tensor")
    found.mask = len(values) if is_mask else None
    return found


def _wrong(name: str, came: str) -> InputError:
    return InputError(f"{name}: got {came}; expected whole numbers from 0, in a list that is not empty, or a mask")
