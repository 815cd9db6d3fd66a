"""Interventions: ablate, re-route, patch and attribute experts."""

from moe_lens import checked as _checked
from moe_lens.interventions.attribution import expert_attribution as expert_attribution
from moe_lens.interventions.attribution_result import ExpertAttribution as ExpertAttribution
from moe_lens.interventions.causal_tracing import trace as trace
from moe_lens.interventions.clean_run import CleanRun as CleanRun
from moe_lens.interventions.clean_run import Variant as Variant
from moe_lens.interventions.expert_means import ExpertMeans as ExpertMeans
from moe_lens.interventions.intervention import Intervention as Intervention
from moe_lens.interventions.metrics import KLDivergence as KLDivergence
from moe_lens.interventions.metrics import Logit as Logit
from moe_lens.interventions.metrics import LogitDifference as LogitDifference
from moe_lens.interventions.metrics import LogProb as LogProb
from moe_lens.interventions.metrics import Loss as Loss
from moe_lens.interventions.metrics import Metric as Metric
from moe_lens.interventions.metrics import TokenMetric as TokenMetric
from moe_lens.interventions.patch_result import PatchResult as PatchResult
from moe_lens.interventions.patching import patch as patch
from moe_lens.interventions.sweep import sweep as sweep
from moe_lens.interventions.trace_result import SiteEffects as SiteEffects
from moe_lens.interventions.trace_result import TraceResult as TraceResult

_checked.what_is_offered(__name__)
