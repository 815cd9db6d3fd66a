"""moe_lens: look into the experts of Mixture-of-Experts language models."""

from moe_lens.errors import (
    CheckpointError as CheckpointError,
    HookError as HookError,
    InputError as InputError,
    MoELensError as MoELensError,
    SelfCheckError as SelfCheckError,
    UnsupportedModelError as UnsupportedModelError,
)
from moe_lens.hooked_moe import HookedMoE as HookedMoE
from moe_lens.model.cache import MoECache as MoECache
from moe_lens.partial_sum import PartialSum as PartialSum
from moe_lens.routing import Routing as Routing

__version__ = "0.1.0"
