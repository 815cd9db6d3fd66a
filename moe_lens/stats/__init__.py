"""Statistics of a corpus: accumulators are updated with batches, merged, saved and resumed; results are frozen."""

from moe_lens.stats.accumulator import Accumulator as Accumulator
from moe_lens.stats.accumulator import Result as Result
from moe_lens.stats.batch import RoutedBatch as RoutedBatch
from moe_lens.stats.domains import DomainComparison as DomainComparison
from moe_lens.stats.domains import compare_domains as compare_domains
from moe_lens.stats.live import observe as observe
from moe_lens.stats.loss import LossResult as LossResult
from moe_lens.stats.loss import LossStats as LossStats
from moe_lens.stats.means import ActivationMeans as ActivationMeans
from moe_lens.stats.means import Means as Means
from moe_lens.stats.pairs import PairResult as PairResult
from moe_lens.stats.pairs import PairStats as PairStats
from moe_lens.stats.resampling import MIN_SOURCES as MIN_SOURCES
from moe_lens.stats.resampling import Interval as Interval
from moe_lens.stats.resampling import bootstrap as bootstrap
from moe_lens.stats.resampling import bootstrap_all as bootstrap_all
from moe_lens.stats.resampling import halves as halves
from moe_lens.stats.routing import LAYER_MEASURES as LAYER_MEASURES
from moe_lens.stats.routing import RoutingResult as RoutingResult
from moe_lens.stats.routing import RoutingStats as RoutingStats
from moe_lens.stats.similarity import MEASURES as MEASURES
from moe_lens.stats.similarity import SimilarityResult as SimilarityResult
from moe_lens.stats.similarity import SimilarityStats as SimilarityStats
