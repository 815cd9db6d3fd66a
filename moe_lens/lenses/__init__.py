"""Lenses: points of the residual stream, read as if they were the last."""

from moe_lens.lenses.base import Lens as Lens
from moe_lens.lenses.geometry import RouterGeometry as RouterGeometry
from moe_lens.lenses.geometry import router_geometry as router_geometry
from moe_lens.lenses.logit import LogitLens as LogitLens
from moe_lens.lenses.result import LensResult as LensResult
from moe_lens.lenses.routing_attribution import RouterAttrs as RouterAttrs
from moe_lens.lenses.routing_attribution import router_attrs as router_attrs
from moe_lens.lenses.routing_attribution import router_attrs_hooks as router_attrs_hooks
from moe_lens.lenses.tuned import TunedLens as TunedLens
from moe_lens.lenses.tuning import Tuning as Tuning
from moe_lens.lenses.vocabulary import ExpertVocabulary as ExpertVocabulary
from moe_lens.lenses.vocabulary import Neuron as Neuron
from moe_lens.lenses.vocabulary import StrongInput as StrongInput
from moe_lens.lenses.vocabulary import Writing as Writing
from moe_lens.lenses.vocabulary import expert_vocabulary as expert_vocabulary
