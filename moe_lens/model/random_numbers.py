"""Passes that draw random numbers, as dropout and jitter do in training: no two of them compute the same."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moe_lens.errors import InputError


@contextmanager
def nothing_drawn(model: Any) -> Generator[None]:
    """A forward pass that is compared with others, or stands for the model.

    Args:
        model: A `HookedMoE`.

    Raises:
        InputError: It is in training, and the pass drew random numbers.
    """
    inner = model.original_model
    if not any(module.training for module in inner.modules()):
        yield
        return
    before = _states(inner)
    yield
    if any(not torch.equal(*pair) for pair in zip(before, _states(inner), strict=True)):
        raise InputError(
            "the model is in training, where dropout or jitter make every forward pass another one: what two passes "
            "differ by would be noise. Call model.eval()"
        )


def _states(model: Any) -> list[Tensor]:
    places = {parameter.device for parameter in model.parameters()}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(at) for at in places if at.type == "cuda")]
