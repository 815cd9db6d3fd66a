"""`LensResult`: what a lens read, and tables of it."""

from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.partial_sum import PartialSum


@dataclass(frozen=True, eq=False)
class LensResult:
    """What a lens reads at some layers, sums and positions: the most likely next tokens, best first.

    A dense layer has no ranks: there, sums over some of the experts hold token −1 and NaN, and so does its routing.
    """

    layers: tuple[int, ...]
    sums: tuple[PartialSum, ...]
    positions: tuple[int, ...]
    """Along the position axis of the cache."""
    dense: tuple[int, ...]
    """Those of the layers that have no experts; sums over all experts are the residual plus the whole MLP there."""
    top_tokens: Int[Tensor, "layer sum batch pos top"]
    top_logits: Float[Tensor, "layer sum batch pos top"]
    top_probs: Float[Tensor, "layer sum batch pos top"]
    """Softmax over the whole vocabulary, in [0, 1]."""
    experts: Int[Tensor, "layer batch pos top_k"]
    """The experts that were routed to, by rank."""
    weights: Float[Tensor, "layer batch pos top_k"]
    """Their routing weights."""

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, sum, batch, position and place: token, logit, prob; what does not exist is left out."""
        axes = [self.layers, [which.label for which in self.sums], range(self.top_tokens.shape[2]), self.positions]
        index = pd.MultiIndex.from_product(
            [*axes, range(self.top_tokens.shape[-1])], names=["layer", "sum", "batch", "pos", "place"]
        )
        values = {"token": self.top_tokens, "logit": self.top_logits, "prob": self.top_probs}
        frame = pd.DataFrame({name: value.flatten().numpy() for name, value in values.items()}, index=index)
        return frame[frame["token"] >= 0].reset_index()
