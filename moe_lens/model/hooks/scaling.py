"""What is shown times a factor, and put back without it.

Some families multiply what their experts or layers compute before it is added to the residual stream. Hooks show the
product, which is what the stream gets; what they edit is divided again, because the model multiplies afterwards.
"""

from typing import Any

import torch
from torch import Tensor


class ExactForward(torch.autograd.Function):
    """The value of one computation with the gradient of another that equals it but for rounding."""

    @staticmethod
    def forward(ctx: Any, differentiated: Tensor, value: Tensor) -> Tensor:  # noqa: ARG004
        """The value."""
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        """To the other computation alone."""
        return grads[0], None


def unscaled(seen: Tensor, value: Tensor, factor: float) -> Tensor:
    """What a hook returned that was shown `value * factor`, to be multiplied by the factor later.

    Where it returned the very numbers it was shown, the value keeps its bits.
    """
    if not torch.equal(seen.detach(), (value * factor).detach()):
        return seen / factor
    return ExactForward.apply(seen / factor, value) if seen.requires_grad else value
