"""Accumulators: `update` with a batch, `merge` with another, `result` is frozen. All sums are kept by source."""

from moe_lens.stats.loss import LossResult as LossResult
from moe_lens.stats.loss import LossStats as LossStats
from moe_lens.stats.means import ActivationMeans as ActivationMeans
from moe_lens.stats.means import Means as Means
from moe_lens.stats.resampling import MIN_SOURCES as MIN_SOURCES
from moe_lens.stats.resampling import Interval as Interval
from moe_lens.stats.resampling import bootstrap as bootstrap
from moe_lens.stats.resampling import halves as halves
from moe_lens.stats.routing import RoutingResult as RoutingResult
from moe_lens.stats.routing import RoutingStats as RoutingStats
from moe_lens.stats.similarity import MEASURES as MEASURES
from moe_lens.stats.similarity import SimilarityResult as SimilarityResult
from moe_lens.stats.similarity import SimilarityStats as SimilarityStats
