"""A live model's routing is what `model.routing` says, in every family; and what an untrained router would choose."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import names
from moe_lens.routing import Routing
from moe_lens.stats import RoutedBatch, RoutingStats, TopExamples, VocabularyStats, observe, random_router
from tests.wrapped import untouched, wrapped


@dataclass(frozen=True)
class Text:
    tokens: Tensor
    mask: Tensor
    counted: Tensor
    sources: tuple[str, ...]


def text(tokens: Tensor) -> Text:
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1:, -3:] = False
    counted = mask.clone()
    counted[:, 0] = False
    return Text(tokens, mask, counted, tuple(f"s{i}" for i in range(len(tokens))))


@pytest.mark.parametrize("name", ["deepseek", "mixtral", "deepseek_v3", "gpt_oss"])
def test_observed_routing_is_the_models(name):
    case = wrapped(name)
    model: Any = case.model
    batch = text(case.tokens)
    with untouched(model):
        seen = observe(model, batch, predicted=True)
    expected = model.routing(batch.tokens, attention_mask=batch.mask.long())
    unembedded = []
    model.add_hook("unembed.hook_in", lambda value, hook: unembedded.append(value.shape[1]))
    fewer = observe(model, batch)
    model.reset_hooks()
    assert unembedded == [] and fewer.predicted is None
    assert torch.equal(fewer.routing.indices, seen.routing.indices)
    assert torch.equal(fewer.routing.weights, seen.routing.weights)
    kept = batch.mask[None, ..., None]
    assert seen.routing.layers == expected.layers
    for field in ("indices", "weights", "logits", "probs"):
        ours, theirs = getattr(seen.routing, field), getattr(expected, field)
        assert torch.equal(ours * kept, theirs * kept), field
    with torch.no_grad():
        logits = model(batch.tokens, attention_mask=batch.mask.long())
    assert seen.predicted is not None and torch.equal(seen.predicted[batch.mask], logits.argmax(-1)[batch.mask])
    assert torch.equal(seen.mask, batch.counted)
    # And exported, without the model: the same counts.
    sizes = (model.moe_layers, model.n_experts, model.top_k)
    exported = Routing.from_arrays(
        expected.indices.numpy(),
        expected.weights.detach().numpy(),
        model.n_experts,
        layers=model.moe_layers,
        mask=batch.mask.numpy(),
    )
    again = RoutedBatch(routing=exported, tokens=batch.tokens, counted=batch.counted, sources=batch.sources)
    for made in (lambda: RoutingStats(*sizes), lambda: VocabularyStats(*sizes, model.cfg.d_vocab)):
        ours, theirs = made().update(seen).result().to_frame(), made().update(again).result().to_frame()
        assert ours.drop(columns="weight", errors="ignore").equals(theirs.drop(columns="weight", errors="ignore"))
    examples = TopExamples(model.n_experts, 2, before=2, after=0).update_routing(seen, model.moe_layers[-1]).result()
    assert bool((examples.score[1:] <= examples.score[:-1]).logical_or(examples.target.diff() > 0).all())


def test_untrained_router_reads_what_the_models_own_reads():
    model: Any = wrapped("deepseek").model
    batch = text(wrapped("deepseek").tokens)
    with untouched(model):
        null = random_router(model, batch, seed=1)
    assert torch.equal(null.routing.indices, random_router(model, batch, seed=1).routing.indices)
    assert not torch.equal(null.routing.indices, random_router(model, batch, seed=2).routing.indices)
    layer = model.moe_layers[-1]
    with torch.no_grad():
        _, cache = model.run_with_cache(batch.tokens, names_filter=[names.mlp(names.MLP_IN, layer)])
    x = cache[names.mlp(names.MLP_IN, layer)][batch.mask]
    logits = null.routing.layer(layer).logits
    assert logits is not None
    # Linear in what the router reads, with rows as long as the model's own, and not the model's own.
    rows = torch.linalg.lstsq(x.double(), logits[batch.mask].double()).solution
    assert torch.allclose(x.double() @ rows, logits[batch.mask].double(), atol=1e-4)
    assert torch.equal(logits.topk(model.top_k).indices, null.routing.layer(layer).indices)
    own = observe(model, batch).routing.layer(layer).indices
    assert (own != null.routing.layer(layer).indices).float().mean() > 0.5
