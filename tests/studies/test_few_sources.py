"""Texts of few sources, one domain or two, models with one active expert: what is said of them is true of them."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from moe_lens import HookedMoE
from moe_lens.data import Domain, Reading
from moe_lens.errors import MoELensError
from moe_lens.resampling import MIN_SOURCES
from moe_lens.studies import (
    AblationStudy,
    ExpertsPerToken,
    Explain,
    LensStudy,
    Localisation,
    PruningStudy,
    RoutingStudy,
    SingleExpertStudy,
    Study,
    StudyResult,
    judge,
    run,
)
from tests.studies.tiny import domain, tiny_model

READING = Reading(tokens=None, context=24, shard_tokens=10**6)
STUDIES: dict[str, Callable[[], Study]] = {
    "routing": lambda: RoutingStudy(nulls=True),
    "single_expert": SingleExpertStudy,
    "lens": LensStudy,
    "ablate": lambda: AblationStudy(experts={1: [0]}, matched=3),
    "localisation": lambda: Localisation(matched=3),
    "pruning": lambda: PruningStudy(random=3),
    "experts_per_token": lambda: ExpertsPerToken(k=(1, 2), mass=(0.5,)),
    "explain": Explain,
}
ENDS = re.compile(r"(^|_)(low|high)$")
NOT_SAID = re.compile(r"\bnan\b|\bNone\b|<NA>|\binf\b")


@pytest.fixture(scope="module", params=[3, 1], ids=["three active", "one active"])
def model(request: pytest.FixtureRequest) -> HookedMoE:
    return tiny_model(num_experts_per_tok=request.param)


def texts(sources: int, domains: int) -> list[Domain]:
    return [domain(name, n=12, sources=sources, seed=seed) for seed, name in enumerate("ab"[:domains])]


def found(name: str, model: Any, sources: int, domains: int) -> StudyResult | None:
    """The study's result; None where it refuses such texts, or such a model, in one line."""
    try:
        return run(STUDIES[name](), model, texts(sources, domains), reading=READING)
    except MoELensError as error:
        assert "\n" not in str(error)
        return None


@pytest.mark.parametrize(("sources", "domains"), [(1, 2), (3, 2), (9, 1)])
@pytest.mark.parametrize("name", STUDIES)
def test_below_ten_sources_nothing_is_told_that_they_cannot_tell(name, model, sources, domains):
    result = found(name, model, sources, domains)
    if result is None:
        return
    together = sources * domains if name == "explain" else sources  # one explanation of all domains
    for table, frame in result.tables.items():
        ends = [column for column in frame if ENDS.search(str(column))]
        assert together >= MIN_SOURCES or frame[ends].isna().to_numpy().all(), (table, ends)
        if {"p_value", "smallest_p"} <= set(frame):
            p_value, smallest = frame[["p_value", "smallest_p"]].to_numpy().T
            assert (p_value >= smallest - 1e-12).all(), table
    assert not NOT_SAID.search(text := str(result.findings())), text
    if name in ("routing", "single_expert", "lens", "pruning", "localisation"):
        rows = judge({result.manifest["plan"]["study"]: result}).rows
        assert {row.inference() for row in rows} == {row.number() for row in rows if row.has_number} == {"undecided"}
