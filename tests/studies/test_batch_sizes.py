"""What is found does not depend on how many texts are read at the same time, whatever is drawn at random."""

from typing import Any

import pytest
import torch

from moe_lens import HookedMoE
from moe_lens.data import Reading
from moe_lens.studies import (
    AblationStudy,
    ExpertsPerToken,
    LensStudy,
    RoutingStudy,
    SingleExpertStudy,
    Study,
    experts_per_token,
    lens,
    routing,
    run,
    single_expert_study,
)
from tests.studies.tiny import assert_same, domain, tiny_model

READING = Reading(tokens=None, context=24, shard_tokens=400)
STUDIES: dict[str, tuple[Study, Any]] = {
    "routing": (RoutingStudy(nulls=True), routing),
    "lens": (LensStudy(), lens),
    "experts_per_token": (ExpertsPerToken(k=(2,), mass=(0.5,)), experts_per_token),
    "single_expert": (SingleExpertStudy(k=(1,)), single_expert_study),
}


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return tiny_model()


def assert_sizes_do_not_matter(study: Study, model: HookedMoE) -> None:
    """Few texts at once give what all at once give."""
    few, many = (run(study, model, [domain("d", n=12)], reading=READING, batch_tokens=size) for size in (50, 10**6))
    assert_same(few, many, 2e-6)


@pytest.mark.typed
@pytest.mark.parametrize("name", STUDIES)
def test_draws_belong_to_tokens_and_not_to_batches(model: HookedMoE, name: str) -> None:
    assert_sizes_do_not_matter(STUDIES[name][0], model)


@pytest.mark.parametrize("name", STUDIES)
def test_draws_that_belonged_to_batches_would_be_seen(
    model: HookedMoE, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_batch(batch: Any, seed: object, before: int = 1, after: int = 1) -> torch.Tensor:  # noqa: ARG001
        return torch.rand(before, *batch.tokens.shape, after, generator=torch.Generator().manual_seed(0))

    study, module = STUDIES[name]
    monkeypatch.setattr(module, "drawn_by_place", by_batch)
    with pytest.raises(AssertionError):
        assert_sizes_do_not_matter(study, model)


def test_experts_that_are_taken_out_are_the_same_too(model: HookedMoE) -> None:
    assert_sizes_do_not_matter(AblationStudy({1: [0, 1], 2: [3]}, matched=3), model)
