"""moe_lens: look into the experts of Mixture-of-Experts language models."""

import typing

from moe_lens import _late
from moe_lens import _moved as _moved
from moe_lens.errors import MoELensError

if typing.TYPE_CHECKING:
    from moe_lens.hooked_moe import HookedMoE
    from moe_lens.lenses.logit_lens import LogitLens
    from moe_lens.lenses.tuned_lens import TunedLens
    from moe_lens.model.cache.moe_cache import MoECache
    from moe_lens.partial_sum import PartialSum
    from moe_lens.routing import Routing
    from moe_lens.selection import Selection
else:  # torch and TransformerLens take seconds: they are imported with the first of these
    __getattr__, __dir__ = _late.resolved_late(
        __name__,
        {
            "moe_lens.hooked_moe": ["HookedMoE"],
            "moe_lens.lenses.logit_lens": ["LogitLens"],
            "moe_lens.lenses.tuned_lens": ["TunedLens"],
            "moe_lens.model.cache.moe_cache": ["MoECache"],
            "moe_lens.partial_sum": ["PartialSum"],
            "moe_lens.routing": ["Routing"],
            "moe_lens.selection": ["Selection"],
        },
    )

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
