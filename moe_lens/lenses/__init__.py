"""Lenses: points of the residual stream, read as if they were the last."""

from moe_lens.lenses.base import Lens as Lens
from moe_lens.lenses.logit import LogitLens as LogitLens
from moe_lens.lenses.result import LensResult as LensResult
from moe_lens.lenses.router_attrs import RouterAttrs as RouterAttrs
from moe_lens.lenses.router_attrs import router_attrs as router_attrs
from moe_lens.lenses.router_attrs import router_attrs_hooks as router_attrs_hooks
from moe_lens.lenses.tuned import TunedLens as TunedLens
from moe_lens.lenses.tuning import Tuning as Tuning
