"""Forward passes of studies on a tiny random model, against what the model gives when asked directly."""

from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

from moe_lens import HookedMoE, names
from moe_lens.data import Reading, TokenBatch
from moe_lens.errors import InputError
from moe_lens.report import sections
from moe_lens.stats import compare_domains
from moe_lens.stats.parallel_sources import LANGUAGE
from moe_lens.studies import RoutingStudy, SingleExpertStudy, run
from moe_lens.studies.forward_passes import each_layer, losses, token_losses
from tests.families import build, tokens
from tests.planted import planted_domains, planted_model
from tests.studies.tiny import domain as tiny_domain
from tests.studies.tiny import tiny_model

LENGTHS = (12, 9, 12, 5, 11, 7)
SOURCES = ("a", "b", "c", "a", "d", "b")


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return HookedMoE.from_hf(build("deepseek"))


def batch_of(rows: list[int]) -> TokenBatch:
    width = max(LENGTHS[row] for row in rows)
    mask = torch.arange(width) < torch.tensor([LENGTHS[row] for row in rows])[:, None]
    ids = tokens(len(LENGTHS), 12)[rows, :width] * mask
    counted = mask.clone()
    counted[:, 0] = False  # as if it were BOS
    return TokenBatch(ids, mask, counted, tuple(SOURCES[row] for row in rows))


def test_token_losses_are_the_definition_and_0_where_nothing_follows():
    logits, ids = torch.randn(5, 7), torch.tensor([3, 0, 6, -1, 2])
    expected = -log_softmax(logits, -1).gather(-1, ids.clamp(min=0)[:, None])[:, 0]
    found = token_losses(logits, ids)
    assert torch.allclose(found, expected.masked_fill(ids < 0, 0), atol=1e-6, rtol=0)


def test_layers_are_handed_on_complete_and_equal_to_a_cache(model):
    wanted = [names.RESID_MID, names.EXPERT_INDICES, names.EXPERT_WEIGHTED]
    seen = {}
    losses(model, batch_of([0, 1, 2]), each_layer(model, wanted, lambda layer, of: seen.update({layer: of})))
    cached = [
        names.block(name, layer) if name == names.RESID_MID else names.mlp(name, layer)
        for layer in model.moe_layers
        for name in wanted
    ]
    batch = batch_of([0, 1, 2])
    _, cache = model.run_with_cache(batch.tokens, names_filter=cached, attention_mask=batch.mask.long())
    assert list(seen) == list(model.moe_layers)
    for layer, parts in seen.items():
        assert torch.equal(parts[names.RESID_MID], cache["resid_mid", layer])
        assert torch.equal(parts[names.EXPERT_INDICES], cache["expert_indices", layer])
        assert torch.equal(parts[names.EXPERT_WEIGHTED], cache["expert_weighted", layer])


@pytest.mark.typed
def test_parallel_sources_are_compared_as_such():
    texts = planted_domains(shuffled=True, words=12)
    found = run(RoutingStudy(parallel=LANGUAGE), planted_model(), texts, reading=Reading(tokens=None, context=24))
    pairs = found.tables["domain_pairs"]
    assert set(pairs["sources"]) == {12} and set(pairs["dropped"]) == {0}
    counts: Any = {name: of["model routing"] for name, of in found.results.items()}
    by_hand = compare_domains(counts, parallel=lambda name: name.split("/")[-1]).per_pair()
    assert pairs["p_value"].tolist() == by_hand["p_value"].tolist()
    assert pairs["p_value"].tolist() != compare_domains(counts).per_pair()["p_value"].tolist()
    near: Any = found.tables["domain_nearer"]
    assert len(near) == 3 * 3  # each domain and the other two, in two layers and over both
    compared = compare_domains(counts, parallel=lambda name: name.split("/")[-1])
    for (domain, one, other), rows in near.groupby(["domain", "one", "other"]):
        expected = compared.nearer(domain, one, other)
        for column in ("to_one", "to_other", "difference", "low", "high"):
            assert rows[column].tolist() == expected[column].tolist()
    (said,) = (line for line in found.findings().lines if "nearest" in line)
    assert all(f"{domain} to " in said for domain in found.domains) and "domain_nearer" in said
    with pytest.raises(InputError, match="no regular expression"):
        run(RoutingStudy(parallel="("), planted_model(), texts)


def test_what_was_done_layer_by_layer_has_no_picture_of_all_layers():
    study = SingleExpertStudy(k=(2,), layers="each")
    found = run(study, tiny_model(), [tiny_domain("d")], reading=Reading(tokens=60, context=12))
    table: Any = found.tables["perplexity"]
    assert set(table["layer"].dropna()) == {1, 2}
    with pytest.raises(InputError, match="one layer at a time"):
        found.figure("perplexity_by_k")
    assert sections.perplexity({"single_expert": found}) is None
    one = SingleExpertStudy(k=(1,), treatments=("renormalised",))
    found = run(one, tiny_model(), [tiny_domain("d")], reading=Reading(tokens=60, context=12))
    shown = sections.perplexity({"single_expert": found})
    assert shown is not None and "weights rescaled" in shown.body and "<td>perplexity, others dropped" not in shown.body
