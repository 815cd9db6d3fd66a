"""Lenses: points of the residual stream, read as if they were the last."""

from moe_lens import checked as _checked
from moe_lens._moved import renamed
from moe_lens.lenses.expert_writing import ExpertVocabulary as ExpertVocabulary
from moe_lens.lenses.expert_writing import Neuron as Neuron
from moe_lens.lenses.expert_writing import StrongInput as StrongInput
from moe_lens.lenses.expert_writing import Writing as Writing
from moe_lens.lenses.expert_writing import expert_vocabulary as expert_vocabulary
from moe_lens.lenses.lens import Lens as Lens
from moe_lens.lenses.lens_result import LensResult as LensResult
from moe_lens.lenses.logit_lens import LogitLens as LogitLens
from moe_lens.lenses.router_attribution import RouterAttrs as RouterAttrs
from moe_lens.lenses.router_attribution import router_attrs as router_attrs
from moe_lens.lenses.router_attribution import router_attrs_hooks as router_attrs_hooks
from moe_lens.lenses.router_directions import RouterGeometry as RouterGeometry
from moe_lens.lenses.router_directions import router_geometry as router_geometry
from moe_lens.lenses.training_summary import TrainingSummary as TrainingSummary
from moe_lens.lenses.tuned_lens import TunedLens as TunedLens

__getattr__ = renamed(__name__, {"Tuning": "TrainingSummary"})

_checked.what_is_offered(__name__)
