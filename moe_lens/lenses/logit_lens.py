"""The LogitLens over partial sums of experts: LogitLens_ext(h) = FinalNorm(u + h) W_U (arXiv 2603.05806, section 3)."""

from jaxtyping import Float
from torch import Tensor

from moe_lens.checked import Natural
from moe_lens.lenses.lens import Lens


class LogitLens(Lens):
    """Reads any point of the residual stream through the model's own final norm and unembedding, without translation.

    Early layers do not use the basis that the unembedding reads. Where u is much larger than what is added to it, all
    sums give the same prediction: compare with `PartialSum(ranks=[])`, u alone.

    Args:
        model: A `HookedMoE`.
    """

    def translate(self, resid: Float[Tensor, "*axes d_model"], layer: Natural) -> Float[Tensor, "*axes d_model"]:
        """The point itself, as if every layer used the basis of the last one.

        Args:
            resid: Any points of the residual stream.
            layer: Their layer; all layers are read in the same way.
        """
        self._check_point(resid, layer)
        return resid
