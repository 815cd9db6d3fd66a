"""The LogitLens over partial sums of experts: LogitLens_ext(h) = FinalNorm(u + h) W_U (arXiv 2603.05806, section 3)."""

from jaxtyping import Float
from torch import Tensor

from moe_lens.lenses.lens import Lens


class LogitLens(Lens):
    """Reads any point of the residual stream through the model's own final norm and unembedding, as it is.

    Early layers do not write in the basis that the unembedding reads, and where u is large beside what is added to it,
    every sum reads alike: compare with `PartialSum(ranks=[])`, the residual alone.

    Args:
        model: A `HookedMoE`.
    """

    def translate(self, resid: Float[Tensor, "*axes d_model"], layer: int) -> Float[Tensor, "*axes d_model"]:  # noqa: ARG002
        """The point itself: the stream is read as if every layer wrote in the last one's basis."""
        return resid
