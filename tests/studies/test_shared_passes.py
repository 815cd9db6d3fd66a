"""Versions that share a pass over weights on disk have the losses of versions run alone."""

from typing import Any

import pytest
import torch

from moe_lens import HookedMoE
from moe_lens.data import Reading, batch_windows, shards
from moe_lens.model.loading import batch_sizes
from moe_lens.stats import LossStats, observation, observe
from moe_lens.studies import SingleExpertStudy, run, shared_passes
from moe_lens.studies.forward_passes import losses, token_losses
from tests.studies.tiny import domain, tiny_model


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return tiny_model()


@pytest.mark.parametrize("packed", [None, 24])
def test_versions_on_disk_share_passes_and_have_their_own_losses(model, monkeypatch, packed):
    study = SingleExpertStudy(layers="both", k=(0, 1, 2))
    reading = Reading(tokens=None, context=24, shard_tokens=10**6, packed=packed is not None)
    how = {"reading": reading, "batch_tokens": 150}
    texts = [domain("d", n=10, sources=10)]
    alone: Any = run(study, model, texts, **how).results["d"]["losses"]
    passes: list[int] = []

    def counted(model: HookedMoE, batch: Any, hooks: Any) -> torch.Tensor:
        passes.append(len(batch.tokens))
        return losses(model, batch, hooks)

    monkeypatch.setattr(shared_passes, "losses", counted)
    run(study, model, texts, **how)
    one_by_one = len(passes)
    passes.clear()
    monkeypatch.setattr(batch_sizes, "places", lambda _: {"disk": 1})
    monkeypatch.setattr(batch_sizes, "FEW_PASSES_TOKENS", 1000)
    monkeypatch.setitem(batch_sizes.TOKENS, "cpu", 0)
    together: Any = run(study, model, texts, **how).results["d"]["losses"]
    assert len(passes) < one_by_one / 4
    assert together.variants == alone.variants
    assert torch.allclose(together.nats, alone.nats, rtol=1e-5)
    assert not torch.allclose(alone.nats[:, :1], alone.nats[:, 1:], rtol=1e-3), "and versions differ"


def test_a_model_in_4_bits_is_unpacked_as_rarely_as_one_on_disk_is_read():
    whole, packed = (HookedMoE.from_pretrained("tiny-deepseekmoe", quantize=how) for how in (None, "nf4"))
    cpu = torch.device("cpu")
    few, many = ([batch_sizes.tokens_at_once(m, cpu), batch_sizes.batch_tokens(m, kept=False)] for m in (packed, whole))
    assert few == [batch_sizes.FEW_PASSES_TOKENS] * 2 and many == [batch_sizes.TOKENS["cpu"], batch_sizes.BATCH_TOKENS]


def test_losses_of_few_rows_at_a_time_are_those_of_all_at_once(model, monkeypatch):
    (shard,) = shards(domain("d", n=10, sources=10), model, Reading(tokens=None, context=24, shard_tokens=10**6))
    batch = next(iter(batch_windows(shard.windows, model, batch_tokens=150, packed=None)))
    whole = losses(model, batch, [])
    seen: list[int] = []
    best: Any = observe(model, batch, predicted=True).predicted
    monkeypatch.setattr(observation, "WHOLE", 0)
    monkeypatch.setattr(observation, "LOGITS", 70 * model.cfg.d_vocab)
    with model.hooks([("unembed.hook_out", lambda value, hook: seen.append(value.shape[1]))]):
        found = losses(model, batch, [])
    assert len(seen) > 1 and max(seen) <= 70, "no more rows' logits are there at once"
    assert torch.allclose(found, whole, atol=1e-5)
    again: Any = observe(model, batch, predicted=True).predicted
    assert torch.equal(again, best)


@pytest.mark.typed
def test_packed_rows_that_are_repeated_are_read_as_the_first(model):
    reading = Reading(tokens=None, context=24, shard_tokens=10**6, packed=True)
    (shard,) = shards(domain("d", n=10, sources=10), model, reading)
    batch = next(iter(batch_windows(shard.windows, model, batch_tokens=150, packed=24)))
    values = torch.rand(batch.tokens.shape)
    packed = batch.pack(values)
    assert batch.packing is not None and len(packed) < len(values)
    assert torch.equal(batch.packing.unpack(packed)[batch.mask], values[batch.mask])
    twice = shared_passes.repeated(batch, 2)
    assert torch.equal(twice.pack(values.repeat(2, 1)), packed.repeat(2, 1))
    assert torch.allclose(losses(model, twice, []), losses(model, batch, []).repeat(2, 1), atol=1e-5)


def test_what_is_computed_of_logits_in_bfloat16_is_as_in_float64():
    """The model gives logits in its dtype; losses, softmax and KL of them are computed in float32 or better."""
    logits = (torch.randn(3, 9, 3000) * 4).bfloat16()
    tokens = torch.randint(3000, (3, 9))
    exact = logits.double()[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0].neg()
    found = token_losses(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).view_as(exact)
    assert (found - exact).abs().max() < 1e-5
    rounded = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0].neg()
    assert (rounded - exact).abs().max() > 1e-2

    sums = LossStats()
    values = torch.rand(50, 1000).bfloat16().float()
    for row in values:  # a running sum in float32 loses digits, in bfloat16 everything
        sums.update(row[None], torch.ones(1, 1000, dtype=torch.bool), ["s"])
    assert abs(float(sums.result().nats.sum()) - float(values.double().sum())) < 1e-6
    assert abs(float(values.bfloat16().sum(0).sum()) - float(values.double().sum())) > 1
