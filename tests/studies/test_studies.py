"""The studies on a tiny random model: every number against what the model gives when asked directly."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

from moe_lens import HookedMoE, names
from moe_lens.data import TokenBatch, Tokens
from moe_lens.stats import ActivationMeans
from moe_lens.studies import single_expert, specialisation
from moe_lens.studies.forward_passes import each_layer, losses, predicted, token_losses
from moe_lens.studies.report_single_expert import _CrossFit, passes
from tests.families import build, tokens

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


PADDED = Tokens("padded", (batch_of([0, 1, 2]), batch_of([3, 4, 5])))
ALONE = Tokens("alone", tuple(batch_of([row]) for row in range(len(LENGTHS))))


def test_token_losses_are_the_definition_whatever_the_chunks(monkeypatch):
    logits, ids = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    expected = -log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    for chunk in (2**24, 1):
        monkeypatch.setattr("moe_lens.studies.forward_passes.LOSS_CHUNK", chunk)
        found = token_losses(logits, ids)
        assert torch.allclose(found[:, 1:], expected, atol=1e-6, rtol=0)
        assert (found[:, 0] == 0).all()


def test_layers_are_handed_on_complete_and_equal_to_a_cache(model):
    wanted = [names.RESID_MID, names.EXPERT_INDICES, names.EXPERT_WEIGHTED]
    seen = {}
    losses(model, PADDED.batches[0], each_layer(model, wanted, lambda layer, of: seen.update({layer: of})))
    cached = [
        names.block(name, layer) if name == names.RESID_MID else names.mlp(name, layer)
        for layer in model.moe_layers
        for name in wanted
    ]
    batch = PADDED.batches[0]
    _, cache = model.run_with_cache(batch.tokens, names_filter=cached, attention_mask=batch.mask.long())
    assert list(seen) == list(model.moe_layers)
    for layer, parts in seen.items():
        assert torch.equal(parts[names.RESID_MID], cache["resid_mid", layer])
        assert torch.equal(parts[names.EXPERT_INDICES], cache["expert_indices", layer])
        assert torch.equal(parts[names.EXPERT_WEIGHTED], cache["expert_weighted", layer])


def test_specialisation_counts_what_the_model_routes(model):
    calls = []
    result = specialisation(model, [PADDED, ALONE], on_batch=lambda: calls.append(1))
    assert len(calls) == len(PADDED) + len(ALONE)
    counts = torch.zeros(len(model.moe_layers), model.n_experts)
    for batch in ALONE:
        routing = model.routing(batch.tokens)
        for i, layer in enumerate(routing.layers):
            counts[i] += torch.bincount(
                routing.layer(layer).indices[batch.counted].flatten(), minlength=model.n_experts
            )
    for name in ("padded", "alone"):  # padding changes nothing
        found = result.domains[name]
        assert torch.equal(found.assignments.sum(0), counts.long())
        assert found.n_tokens == sum(LENGTHS) - len(LENGTHS)
        assert found.sources == ("a", "b", "c", "d")
    frame = result.to_frame()
    counts = ["assigned", "top1", "weight", "share", "low", "high", "tokens"]
    assert list(frame.columns) == ["domain", "layer", "expert", *counts]
    assert len(frame) == 2 * len(model.moe_layers) * model.n_experts
    assert set(result.coverage()["experts"]) <= set(range(1, model.n_experts + 1))


@pytest.mark.parametrize("k", [0, 2])
def test_replacing_puts_the_other_half_s_means_in_the_place_of_each_expert(model, k):
    crossfit, batch = _CrossFit(model, PADDED, lambda: None), PADDED.batches[0]
    means = crossfit.of_rows(batch)
    chosen = {}

    def note(indices, hook):
        chosen[hook.name.split(".")[1]] = indices

    def by_hand(outputs, hook):
        layer = int(hook.name.split(".")[1])
        for row in range(3):
            for position in range(outputs.shape[1]):
                for rank in range(k, model.top_k):
                    expert = int(chosen[str(layer)][row, position, rank])
                    outputs[row, position, rank] = means[row].experts[means[row].layers.index(layer), expert]
        return outputs

    plainly: Any = [(names.mlp(names.EXPERT_INDICES, layer), note) for layer in model.moe_layers]
    plainly += [(names.mlp(names.EXPERT_OUT, layer), by_hand) for layer in model.moe_layers]
    ours, theirs = losses(model, batch, crossfit.replaced(model, batch, k)), losses(model, batch, plainly)
    real = predicted(batch)
    assert torch.allclose(ours[real], theirs[real], atol=1e-5, rtol=0)
    dropped = losses(model, batch, model.keep_top(k).fwd_hooks)
    assert not torch.allclose(ours[real], dropped[real], atol=1e-3, rtol=0)


def test_means_come_from_the_other_half(model):
    crossfit = _CrossFit(model, ALONE, lambda: None)
    assert crossfit.apart and set(crossfit.half) == set("abcd") and sum(crossfit.half.values()) == 2
    layer = model.moe_layers[-1]
    wanted = [names.block(names.RESID_MID, layer)]
    wanted += [names.mlp(n, layer) for n in (names.EXPERT_INDICES, names.ROUTING_WEIGHTS, names.EXPERT_OUT)]
    for batch in ALONE:
        others = ActivationMeans([layer], model.n_experts, model.top_k, model.cfg.d_model)
        for other in ALONE:
            if crossfit.half[other.sources[0]] != crossfit.half[batch.sources[0]]:
                _, cache = model.run_with_cache(other.tokens, names_filter=wanted)
                routing = cache.routing(layer)
                others.update(
                    layer,
                    cache["resid_mid", layer],
                    cache["expert_out", layer],
                    routing.weights,
                    routing.indices,
                    other.counted,
                )
        (means,) = crossfit.of_rows(batch)
        expected = others.result()
        assert torch.allclose(means.resid[-1], expected.resid[0], atol=1e-5)
        assert torch.allclose(means.weighted[-1], expected.weighted[0], atol=1e-5)
        assert torch.allclose(means.experts[-1], expected.experts[0], atol=1e-5)


def test_single_expert_as_a_whole(model):
    calls = []
    result = single_expert(model, [PADDED, ALONE], on_batch=lambda: calls.append(1))
    assert len(calls) == passes(model.top_k) * (len(PADDED) + len(ALONE))
    nats = sum(float(losses(model, batch, [])[predicted(batch)].sum()) for batch in ALONE)
    count = sum(LENGTHS) - len(LENGTHS)
    for name in ("padded", "alone"):
        assert result.apart[name]
        for by_k in (result.dropped[name], result.replaced[name]):
            assert len(by_k) == model.top_k + 1
            assert by_k[-1].loss == pytest.approx(nats / count, abs=1e-6)
            assert len({round(of_k.loss, 6) for of_k in by_k}) == model.top_k + 1  # every k is another model
    for k in range(model.top_k):  # padding changes nothing
        assert result.dropped["padded"][k].loss == pytest.approx(result.dropped["alone"][k].loss, abs=1e-5)
        assert result.replaced["padded"][k].loss == pytest.approx(result.replaced["alone"][k].loss, abs=1e-5)
    padded, alone = result.similarity["padded"], result.similarity["alone"]
    assert torch.allclose(padded.sums, alone.sums, atol=1e-4, rtol=0)
    frame = result.perplexity_frame()
    assert len(frame) == 2 * 2 * (model.top_k + 1)
    assert {row["ratio"] for row in frame.to_dict("records") if row["k"] == model.top_k} == {1}
    assert set(frame["ratio_low"]) == {None}  # four sources are too few
    assert set(result.similarity_frame()["domain"]) == {"padded", "alone"}


def test_one_source_gives_its_own_means_and_says_so(model):
    one = Tokens("one", (replace(PADDED.batches[0], sources=("a", "a", "a")),))
    result = single_expert(model, [one])
    assert result.apart == {"one": False}
    assert result.replaced["one"][0].loss != result.dropped["one"][0].loss
