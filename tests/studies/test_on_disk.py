"""Studies of a model that is on disk, embedding and unembedding too, end with the very numbers of one in memory."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_lens import HookedMoE, PartialSum
from moe_lens.data import Reading
from moe_lens.model.loading import batch_sizes
from moe_lens.model.loading.dispatch import places
from moe_lens.model.loading.streamed_weights import streamed_weights
from moe_lens.studies import LensStudy, Localisation, PruningStudy, RoutingStudy, SingleExpertStudy, run
from moe_lens.studies.lens import unselected_hooks
from tests.model.caches import close, fresh, full
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


EXPERTS = [f"model.layers.{layer}.mlp.experts" for layer in (1, 2)]
MOE = "model.layers.1._original_component.mlp._original_component.experts"
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


@pytest.mark.parametrize("name", STUDIES)
def test_experts_on_disk_are_read_once_in_a_pass(tmp_path, name):
    save_checkpoint(tmp_path)
    away = HookedMoE.from_pretrained(tmp_path, device_map={"": "cpu", **dict.fromkeys(EXPERTS, "disk")})
    away.requires_grad_(False)
    weights, on_disk = streamed_weights(away.original_model), places(away.original_model)["disk"]
    assert weights is not None
    passes = []
    away.original_model.get_submodule(MOE).register_forward_pre_hook(lambda *_: passes.append(1))
    weights.checksums()  # the plan's
    before = weights.settled()
    texts = [domain(each, n=12, sources=12, seed=seed) for seed, each in enumerate(("one", "two"))]
    run(STUDIES[name], away, texts, reading=READING, name="tiny")
    assert passes
    # One more at most: layers are read ahead when the last pass ends, and the first shows in which order they come.
    assert weights.settled() - before <= (len(passes) + 1) * on_disk


@pytest.mark.typed
@pytest.mark.parametrize("model_type", ["deepseek", "gpt_oss"])
def test_a_term_of_unselected_experts_is_the_same_in_the_pass_and_after_it(model_type):
    case, _, kept = full(model_type)
    sums = [PartialSum(residual="none", drawn="unselected", seed=seed, weighted=seed == 0) for seed in (0, 1)]
    terms: dict[tuple[int, PartialSum], torch.Tensor] = {}
    with case.model.hooks(fwd_hooks=unselected_hooks(case.model, sums, terms)):
        fresh(model_type)
    assert terms.keys() == {(layer, which) for layer in case.model.moe_layers for which in sums}
    for (layer, which), term in terms.items():
        assert close(term, kept.partial_sum(layer, which).values)
        assert not close(term, kept.partial_sum(layer, replace(which, seed=2)).values, 1e-3)
