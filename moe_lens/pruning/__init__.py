"""Smaller models: scores of experts, plans of what stays, previews, and checkpoints that plain transformers loads."""

from moe_lens.pruning.export import export as export
from moe_lens.pruning.merging import merge as merge
from moe_lens.pruning.plans import Plan as Plan
from moe_lens.pruning.plans import plan as plan
from moe_lens.pruning.scores import METHODS as METHODS
from moe_lens.pruning.scores import Scores as Scores
