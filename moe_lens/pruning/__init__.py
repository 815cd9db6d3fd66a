"""Smaller models: scores of experts, plans of what stays, previews, and checkpoints that plain transformers loads."""

from moe_lens import checked as _checked
from moe_lens.pruning.export import export as export
from moe_lens.pruning.frontier import Frontier as Frontier
from moe_lens.pruning.frontier import Point as Point
from moe_lens.pruning.frontier import frontier as frontier
from moe_lens.pruning.frontier import halved as halved
from moe_lens.pruning.merging import merge as merge
from moe_lens.pruning.plan_from_scores import plan as plan
from moe_lens.pruning.plans import Plan as Plan
from moe_lens.pruning.scores import METHODS as METHODS
from moe_lens.pruning.scores import Scores as Scores
from moe_lens.pruning.scoring import score as score
from moe_lens.pruning.scoring import super_experts as super_experts

_checked.what_is_offered(__name__)
