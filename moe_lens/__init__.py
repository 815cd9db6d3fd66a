"""moe_lens: look into the experts of Mixture-of-Experts language models."""

from moe_lens import _moved as _moved
from moe_lens.errors import MoELensError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.lenses.logit_lens import LogitLens
from moe_lens.lenses.tuned_lens import TunedLens
from moe_lens.model.cache.moe_cache import MoECache
from moe_lens.partial_sum import PartialSum
from moe_lens.routing import Routing
from moe_lens.selection import Selection

__all__ = [
    "HookedMoE",
    "LogitLens",
    "MoECache",
    "MoELensError",
    "PartialSum",
    "Routing",
    "Selection",
    "TunedLens",
    "__version__",
]

__version__ = "0.1.0"
