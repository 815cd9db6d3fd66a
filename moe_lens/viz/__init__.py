"""Figures from results: plotly for numbers, rich for the terminal, circuitsvis for tokens.

Those of a study take its `StudyResult`, of a run just now or of a folder.
"""

from moe_lens import checked as _checked
from moe_lens.viz.ablation import ablation_costs as ablation_costs
from moe_lens.viz.attribution import attribution_agreement as attribution_agreement
from moe_lens.viz.attribution import attribution_map as attribution_map
from moe_lens.viz.checkpoints import routing_overlap as routing_overlap
from moe_lens.viz.checkpoints import swapped_router_costs as swapped_router_costs
from moe_lens.viz.circuitsvis_views import attention_beside_routing as attention_beside_routing
from moe_lens.viz.circuitsvis_views import expert_activations as expert_activations
from moe_lens.viz.circuitsvis_views import top_expert_contexts as top_expert_contexts
from moe_lens.viz.circuitsvis_views import top_expert_tokens as top_expert_tokens
from moe_lens.viz.coloured_tokens import expert_tokens as expert_tokens
from moe_lens.viz.coloured_tokens import routing_tokens as routing_tokens
from moe_lens.viz.contrast import contrast_map as contrast_map
from moe_lens.viz.contrast import contrast_steering as contrast_steering
from moe_lens.viz.figures import figures_of as figures_of
from moe_lens.viz.figures import save_figure as save_figure
from moe_lens.viz.held_out import choices_explained as choices_explained
from moe_lens.viz.held_out import probe_accuracy as probe_accuracy
from moe_lens.viz.lens import lens_table as lens_table
from moe_lens.viz.lens import lens_text as lens_text
from moe_lens.viz.lens_study import lens_by_layer as lens_by_layer
from moe_lens.viz.lens_trajectory import lens_trajectory as lens_trajectory
from moe_lens.viz.localisation import localisation_contrast as localisation_contrast
from moe_lens.viz.localisation import localisation_costs as localisation_costs
from moe_lens.viz.patching import patch_map as patch_map
from moe_lens.viz.patching import trace_map as trace_map
from moe_lens.viz.pruning import frontier as frontier
from moe_lens.viz.pruning import pruning_ratios as pruning_ratios
from moe_lens.viz.pruning import specialists as specialists
from moe_lens.viz.single_expert import perplexity_by_k as perplexity_by_k
from moe_lens.viz.single_expert import similarity_by_layer as similarity_by_layer
from moe_lens.viz.specialisation import experts_for_half as experts_for_half
from moe_lens.viz.specialisation import most_specialised as most_specialised
from moe_lens.viz.specialisation import specialisation_map as specialisation_map
from moe_lens.viz.token_losses import token_log_probs as token_log_probs
from moe_lens.viz.token_text import readable as readable
from moe_lens.viz.tokens_html import TokensHTML as TokensHTML
from moe_lens.viz.tokens_html import beside as beside

_checked.what_is_offered(__name__)
