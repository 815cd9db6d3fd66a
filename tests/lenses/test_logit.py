"""The lens against its definition on a tiny random model: final norm and unembedding written out by hand."""

from typing import Any

import pytest
import torch

from moe_lens import HookedMoE, PartialSum, names
from moe_lens.errors import HookError, InputError
from moe_lens.lenses import LogitLens
from tests.families import build, tokens

SUMS = (PartialSum(shared=True), PartialSum(), PartialSum(ranks=[]), PartialSum(ranks=[0]), PartialSum(ranks=[2, 1]))
TOKENS = tokens()


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return HookedMoE.from_hf(build("deepseek"))


@pytest.fixture(scope="module")
def cache(model):
    wanted = [*LogitLens(model).hooks(), *(names.mlp(names.ROUTED_OUT, layer) for layer in model.moe_layers)]
    return model.run_with_cache(TOKENS, names_filter=wanted)[1]


def by_hand(model: HookedMoE, resid: torch.Tensor) -> torch.Tensor:
    hf: Any = model.original_model
    scale = resid.square().mean(-1, keepdim=True).add(hf.config.rms_norm_eps).rsqrt()
    return (resid * scale * hf.model.norm.weight) @ hf.lm_head.weight.T


def test_logits_are_the_definition(model, cache):
    resid = cache["resid_mid", 1]
    logits = LogitLens(model).logits(resid, 1)
    assert torch.allclose(logits.detach(), by_hand(model, resid), atol=1e-5, rtol=0)
    # Controls: without the norm, or without its gain, it is far off (0.1 is 10,000 times the tolerance above).
    weight = model.original_model.lm_head.weight.T
    assert not torch.allclose(logits, resid @ weight, atol=0.1)
    assert not torch.allclose(logits, torch.nn.functional.rms_norm(resid, resid.shape[-1:]) @ weight, atol=0.1)


def test_layer_output_of_the_last_layer_reads_as_the_model(model, cache):
    logits = model(TOKENS)
    result = LogitLens(model).decode(cache, SUMS, top=101)
    probs = torch.softmax(logits, -1)
    assert torch.allclose(result.top_probs[-1, 0], probs.sort(-1, descending=True).values, atol=1e-5, rtol=0)
    assert torch.equal(result.top_tokens[-1, 0, ..., 0], logits.argmax(-1))
    assert not torch.equal(result.top_tokens[-1, 2, ..., 0], logits.argmax(-1))  # the residual alone does not


def test_every_cell_is_the_definition(model, cache):
    positions = [0, 7]
    result = LogitLens(model).decode(cache, SUMS, positions=positions, top=3)
    assert result.layers == (0, 1, 2) and result.dense == (0,)
    assert result.top_tokens.shape == (3, len(SUMS), 2, 2, 3)
    for layer in (1, 2):
        u, parts = cache["resid_mid", layer], cache["expert_weighted", layer]
        sums = [
            u + parts.sum(-2) + cache["shared_out", layer],
            u + parts.sum(-2),
            u,
            u + parts[:, :, 0],
            u + parts[:, :, 1] + parts[:, :, 2],
        ]
        for j, resid in enumerate(sums):
            expected = by_hand(model, resid[:, positions]).topk(3)
            assert torch.equal(result.top_tokens[layer, j], expected.indices)
            assert torch.allclose(result.top_logits[layer, j], expected.values, atol=1e-5, rtol=0)
        routing = cache.routing(layer)
        assert torch.equal(result.experts[layer], routing.indices[:, positions])
        assert torch.equal(result.weights[layer], routing.weights[:, positions])


def test_dense_layer_reads_as_a_whole_and_has_no_ranks(model, cache):
    result = LogitLens(model).decode(cache, SUMS, layers=[0], top=2)
    whole = cache["resid_mid", 0] + cache["mlp_out", 0]
    assert torch.equal(result.top_tokens[0, 0], by_hand(model, whole).topk(2).indices)
    assert torch.equal(result.top_tokens[0, 0], result.top_tokens[0, 1])
    assert (result.top_tokens[0, 2:] == -1).all() and result.top_probs[0, 2:].isnan().all()
    assert (result.experts == -1).all() and result.weights.isnan().all()
    assert set(result.to_frame()["sum"]) == {SUMS[0].label, SUMS[1].label}


def test_chunks_change_nothing(model, cache, monkeypatch):
    whole = LogitLens(model).decode(cache, SUMS)
    monkeypatch.setattr("moe_lens.lenses.base.CHUNK", 101 * 5)  # five rows at a time, 24 do not divide by it
    parts = LogitLens(model).decode(cache, SUMS)
    assert torch.equal(whole.top_tokens, parts.top_tokens)
    assert torch.allclose(whole.top_probs, parts.top_probs, atol=1e-6, rtol=0, equal_nan=True)


def test_frame_is_aligned(model, cache):
    result = LogitLens(model).decode(cache, SUMS, positions=[3, 5], top=2)
    frame = result.to_frame().set_index(["layer", "sum", "batch", "pos", "place"])
    assert len(frame) == 2 * len(SUMS) * 2 * 2 * 2 + 2 * 2 * 2 * 2
    assert frame.loc[(2, SUMS[3].label, 1, 5, 1), "token"] == int(result.top_tokens[2, 3, 1, 1, 1])


def test_what_is_missing_is_named(model, cache):
    lens = LogitLens(model)
    _, poor = model.run_with_cache(TOKENS, names_filter=[names.block(names.RESID_MID, 1)])
    with pytest.raises(HookError, match="hook_expert_indices"):
        lens.decode(poor, SUMS, layers=[1])
    with pytest.raises(InputError, match=r"positions are \[12\]; the cache holds 0 to 11"):
        lens.decode(cache, SUMS, positions=[12])
    with pytest.raises(InputError, match="at least one sum"):
        lens.decode(cache, [])
