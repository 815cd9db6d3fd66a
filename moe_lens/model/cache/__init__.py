"""Activations that a run kept, and what is computed from them: partial sums, attributions to logits."""

from moe_lens._moved import handed_on

__getattr__ = handed_on(__name__, "moe_lens.model.cache.moe_cache")
