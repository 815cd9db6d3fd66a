"""The paper's experiments: a model and domains in, a frozen result out; nothing is drawn or printed here."""

from moe_lens import checked as _checked
from moe_lens.studies.ablation_study import AblationStudy as AblationStudy
from moe_lens.studies.atlas import Atlas as Atlas
from moe_lens.studies.checkpoint_overlap import Checkpoints as Checkpoints
from moe_lens.studies.collect_activations import collect as collect
from moe_lens.studies.collected import Collected as Collected
from moe_lens.studies.comparison import Comparison as Comparison
from moe_lens.studies.comparison import compare as compare
from moe_lens.studies.contrast import ContrastStudy as ContrastStudy
from moe_lens.studies.contrast import contrast_prompts as contrast_prompts
from moe_lens.studies.experts_per_token import ExpertsPerToken as ExpertsPerToken
from moe_lens.studies.explain import Explain as Explain
from moe_lens.studies.facts import FactStudy as FactStudy
from moe_lens.studies.facts import localise_facts as localise_facts
from moe_lens.studies.facts import read_facts as read_facts
from moe_lens.studies.lens import LensStudy as LensStudy
from moe_lens.studies.lens_examples import LensExample as LensExample
from moe_lens.studies.localisation import Localisation as Localisation
from moe_lens.studies.probe import Probe as Probe
from moe_lens.studies.prompt_pairs import Pair as Pair
from moe_lens.studies.prompt_pairs import read_pairs as read_pairs
from moe_lens.studies.pruning_study import PruningStudy as PruningStudy
from moe_lens.studies.routing import NULLS as NULLS
from moe_lens.studies.routing import RoutingStudy as RoutingStudy
from moe_lens.studies.run_study import run as run
from moe_lens.studies.single_expert_study import TREATMENTS as TREATMENTS
from moe_lens.studies.single_expert_study import SingleExpertStudy as SingleExpertStudy
from moe_lens.studies.study import Study as Study
from moe_lens.studies.study_result import StudyResult as StudyResult
from moe_lens.studies.token_features import read_features as read_features
from moe_lens.studies.token_labels import by_pattern as by_pattern
from moe_lens.studies.token_labels import label_tokens as label_tokens
from moe_lens.studies.token_labels import read_spans as read_spans
from moe_lens.studies.verdicts import Verdicts as Verdicts
from moe_lens.studies.verdicts import judge as judge

_checked.what_is_offered(__name__)
