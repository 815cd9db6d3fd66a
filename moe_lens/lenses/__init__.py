"""Lenses: points of the residual stream, read as if they were the last."""

from moe_lens.lenses.logit import LensResult as LensResult
from moe_lens.lenses.logit import LogitLens as LogitLens
