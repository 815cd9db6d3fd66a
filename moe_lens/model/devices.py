"""Devices that people name: there, and usable, or refused in a line."""

from typing import Any

import torch

from moe_lens.errors import InputError


def usable_device(device: Any, what: str = "device", *, meta: bool = False) -> torch.device:
    """The device that is meant, if torch can put numbers there.

    Args:
        device: What came.
        what: What it is called, for messages.
        meta: Whether the meta device will do, which holds shapes alone.

    Raises:
        InputError: It names no device, or none that is here.
    """
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{what} is {device!r}; expected one such as 'cpu', 'cuda' or 'cuda:1'") from error
    if place.type == "meta":
        if meta:
            return place
        raise InputError(f"{what} is '{place}', which holds shapes and no numbers; expected one such as 'cpu'")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{what} is '{place}', but torch finds no CUDA device here")
    try:
        torch.empty(0, device=place)
    except (AssertionError, ImportError, RuntimeError) as error:  # a build without it, no extension of it, no kernel
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{what} is '{place}', which torch cannot use here ({reason:.120})") from error
    return place


def check_kept(device: Any, dtype: Any) -> None:
    """Nothing, where activations can be kept there and so.

    Args:
        device: Of what is kept; None for where it is computed.
        dtype: Of what is kept; None for what is computed.

    Raises:
        InputError: No device that can keep numbers, or no floating-point dtype: whole numbers would cut off what comes
            behind the point.
    """
    if device is not None:
        usable_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype is {dtype!r}; expected a floating-point one, such as torch.float16")
