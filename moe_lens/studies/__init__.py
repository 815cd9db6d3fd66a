"""The paper's experiments: a model and domains in, a frozen result out; nothing is drawn or printed here."""

from moe_lens.studies.collect import Collected as Collected
from moe_lens.studies.collect import collect as collect
from moe_lens.studies.compare import Comparison as Comparison
from moe_lens.studies.compare import compare as compare
from moe_lens.studies.ensemble import TREATMENTS as TREATMENTS
from moe_lens.studies.ensemble import SingleExpertStudy as SingleExpertStudy
from moe_lens.studies.lens import LensStudy as LensStudy
from moe_lens.studies.lens_table import LensExample as LensExample
from moe_lens.studies.lens_table import lens_table as lens_table
from moe_lens.studies.result import StudyResult as StudyResult
from moe_lens.studies.routing import RoutingStudy as RoutingStudy
from moe_lens.studies.single_expert import SingleExpert as SingleExpert
from moe_lens.studies.single_expert import single_expert as single_expert
from moe_lens.studies.specialisation import Specialisation as Specialisation
from moe_lens.studies.specialisation import specialisation as specialisation
from moe_lens.studies.study import Study as Study
from moe_lens.studies.study import run as run
