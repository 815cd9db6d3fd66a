"""Studies of a model that is on disk, embedding and unembedding too, end with the very numbers of one in memory."""

from typing import Any

import pytest

from moe_lens import HookedMoE
from moe_lens.data import Reading
from moe_lens.model.loading import batch_sizes
from moe_lens.model.loading.streamed_weights import streamed_weights
from moe_lens.studies import LensStudy, Localisation, PruningStudy, RoutingStudy, SingleExpertStudy, run
from tests.studies.tiny import assert_same, domain, save_checkpoint

READING = Reading(tokens=60, context=16)
ALL = {"model": "disk", "lm_head": "disk"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[HookedMoE, HookedMoE]:
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder)
    away = HookedMoE.from_pretrained(folder, device_map=ALL).requires_grad_(False)
    assert streamed_weights(away.original_model) is not None
    return HookedMoE.from_pretrained(folder).requires_grad_(False), away


STUDIES = {
    "routing": RoutingStudy(nulls=True),
    "single-expert": SingleExpertStudy(k=(1,)),
    "lens": LensStudy(),
    "pruning": PruningStudy(random=2),
    "localisation": Localisation(experts=1, matched=2),
}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_that_of_the_model_in_memory(pair, monkeypatch, name):
    # The same batches: with others, the last bits differ.
    monkeypatch.setattr(batch_sizes, "FEW_PASSES_TOKENS", batch_sizes.BATCH_TOKENS)
    if name == "single-expert":
        monkeypatch.setattr(batch_sizes, "places", lambda _: {})
    texts = [domain(each, n=12, sources=12, seed=seed) for seed, each in enumerate(("one", "two"))]
    found: list[Any] = [run(STUDIES[name], model, texts, reading=READING, name="tiny") for model in pair]
    assert_same(*found)
    for table, frame in found[0].tables.items():
        assert frame.equals(found[1].tables[table]), table
    assert [set(of.manifest["bytes_in"]) for of in found] == [{"cpu"}, {"disk"}]
    assert found[0].manifest["plan"] == found[1].manifest["plan"], "so that one can go on where the other was stopped"
    assert all(parameter.is_meta for parameter in pair[1].original_model.parameters()), "nothing stays behind"
