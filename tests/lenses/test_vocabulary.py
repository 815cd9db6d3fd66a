"""What an expert writes, against a plain pass over the same texts; and router rows against loops."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from moe_lens import HookedMoE
from moe_lens.errors import HookError, InputError
from moe_lens.lenses import expert_vocabulary, router_geometry
from moe_lens.lenses.expert_writing import writes
from tests.families import build, tokens
from tests.matrix import configs

TOKENS = tokens(batch=7, pos=9)
LAYER, EXPERT = 2, 5


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return HookedMoE.from_hf(build("deepseek"))


@pytest.fixture(scope="module")
def cache(model):
    with torch.no_grad():
        return model.run_with_cache(TOKENS)[1]


def unembedded(direction: torch.Tensor) -> torch.Tensor:
    """FinalNorm(v) W_U by hand, from weights that were never wrapped, less its mean."""
    hf: Any = build("deepseek")
    logits = (direction / direction.square().mean().sqrt() * hf.model.norm.weight) @ hf.lm_head.weight.T
    return (logits - logits.mean()).detach()


def test_a_direction_is_read_by_its_definition(model):
    direction = torch.randn(32) * 0.01
    (found,) = writes(model, direction[None], 4)
    expected = unembedded(direction)
    assert found.promoted_tokens == tuple(expected.topk(4).indices.tolist())
    assert found.suppressed_tokens == tuple(expected.topk(4, largest=False).indices.tolist())
    assert found.promoted_logits == pytest.approx(expected.topk(4).values.tolist(), abs=1e-4)
    assert found.suppressed_logits == pytest.approx(expected.topk(4, largest=False).values.tolist(), abs=1e-4)
    (opposite,) = writes(model, -direction[None], 4)
    assert opposite.promoted_tokens == found.suppressed_tokens
    (longer,) = writes(model, 100 * direction[None], 4)
    assert longer.promoted_logits == pytest.approx(found.promoted_logits, abs=1e-4)


def test_chunks_change_nothing(model, monkeypatch):
    directions = torch.randn(5, 32)
    whole = list(writes(model, directions, 3))
    monkeypatch.setattr("moe_lens.lenses.expert_writing._CHUNK", 2 * 101)
    parts = list(writes(model, directions, 3))
    assert [part.promoted_tokens for part in parts] == [part.promoted_tokens for part in whole]


def test_mean_and_strongest_inputs_are_those_of_a_plain_pass(model, cache):
    found = expert_vocabulary(model, LAYER, EXPERT, TOKENS, inputs=4, batch=3, top=5, window=2)
    rows = cache.expert_out(LAYER, expert=EXPERT)
    assert (found.tokens, found.routed) == (63, int(rows.mask.sum())) and 0 < found.routed < 63
    mean = rows.values[rows.mask].mean(0)
    assert found.mean_out is not None and found.mean is not None
    assert torch.allclose(found.mean_out, mean, atol=1e-6, rtol=0)
    assert found.mean.promoted_tokens == tuple(unembedded(mean).topk(5).indices.tolist())
    added = cache.expert_out(LAYER, expert=EXPERT, weighted=True).values.norm(dim=-1)
    order = added.flatten().argsort(descending=True)[:4].tolist()
    assert [strong.norm for strong in found.inputs] == pytest.approx(added.flatten()[order].tolist(), abs=1e-5)
    for strong, at in zip(found.inputs, order, strict=True):
        row, pos = divmod(at, 9)
        assert strong.token == TOKENS[row, pos]
        assert strong.before == "".join(f"<{token}>" for token in TOKENS[row, max(0, pos - 2) : pos].tolist())
        assert strong.after == "".join(f"<{token}>" for token in TOKENS[row, pos + 1 : pos + 3].tolist())
        rank = cache["expert_indices", LAYER][row, pos].tolist().index(EXPERT)
        assert strong.weight == pytest.approx(cache["routing_weights", LAYER][row, pos, rank].item(), abs=1e-6)
        expected = unembedded(rows.values[row, pos]).topk(5).indices
        assert strong.writing.promoted_tokens == tuple(expected.tolist())
    unweighted = rows.values.norm(dim=-1).flatten().argsort(descending=True)[:4].tolist()
    assert unweighted != order  # the weight matters


def test_neurons_are_the_columns_that_are_used_most(model, cache):
    found = expert_vocabulary(model, LAYER, EXPERT, TOKENS, neurons=3)
    hf: Any = build("deepseek")
    columns = hf.model.layers[LAYER].mlp.experts.down_proj[EXPERT].T.detach()
    chosen = cache["expert_indices", LAYER] == EXPERT
    activations = cache["expert_post", LAYER][chosen]
    used = activations.abs().mean(0) * columns.norm(dim=-1)
    assert [neuron.index for neuron in found.neurons] == used.topk(3).indices.tolist()
    for neuron in found.neurons:
        assert neuron.activation == pytest.approx(activations[:, neuron.index].mean().item(), abs=1e-6)
        assert neuron.size == pytest.approx(activations[:, neuron.index].abs().mean().item(), abs=1e-6)
        expected = unembedded(columns[neuron.index])
        assert neuron.writing.promoted_tokens == tuple(expected.topk(10).indices.tolist())
    alone = expert_vocabulary(model, LAYER, EXPERT, neurons=16)
    norms = [neuron.norm for neuron in alone.neurons]
    assert norms == sorted(norms, reverse=True) and len(norms) == 16
    assert alone.mean is None and not alone.inputs and alone.neurons[0].activation is None


def test_the_result_does_not_depend_on_how_the_corpus_is_cut(model, cache):
    one = expert_vocabulary(model, LAYER, EXPERT, list(TOKENS), inputs=3, batch=1)
    all_at_once = expert_vocabulary(model, LAYER, EXPERT, [TOKENS], inputs=3, batch=100)
    assert one.mean_out is not None and all_at_once.mean_out is not None
    assert torch.allclose(one.mean_out, all_at_once.mean_out, atol=1e-6, rtol=0)
    assert [s.norm for s in one.inputs] == pytest.approx([s.norm for s in all_at_once.inputs], abs=1e-5)
    chosen = cache["expert_indices", LAYER]
    both = min(set(chosen[0, :4].flatten().tolist()) & set(chosen[1].flatten().tolist()))
    ragged = expert_vocabulary(model, LAYER, both, [TOKENS[0, :4], TOKENS[1]], batch=2)
    alone = [expert_vocabulary(model, LAYER, both, [row]) for row in (TOKENS[0, :4], TOKENS[1])]
    assert ragged.tokens == 13 and ragged.routed == sum(part.routed for part in alone)


def test_nothing_is_left_behind(model):
    expert_vocabulary(model, LAYER, EXPERT, TOKENS)
    assert not any(point.has_hooks() for point in model.hook_dict.values())


@pytest.mark.typed
def test_the_frame_holds_every_reading(model):
    found = expert_vocabulary(model, LAYER, EXPERT, TOKENS, inputs=2, neurons=3, top=4)
    frame = found.to_frame()
    assert len(frame) == (1 + 2 + 3) * 2 * 4
    row = frame[(frame["of"] == "neuron") & (frame["number"] == found.neurons[1].index) & (frame["place"] == 2)]
    assert row[row["effect"] == "suppressed"]["token"].item() == found.neurons[1].writing.suppressed_tokens[2]


def test_texts_are_read_in_context_and_special_tokens_are_left_out():
    model = HookedMoE.from_pretrained("tiny-deepseekmoe", dtype=torch.float32)
    text = "The old man looked at the sea and wept."
    ids = model.to_tokens(text)
    expert = int(model.routing(ids).layer(3).indices[0, 4, 0])
    found = expert_vocabulary(model, 3, expert, [text], window=100)
    assert found.tokens == ids.shape[1] - 1  # BOS is no text
    shown = found.inputs[0]
    assert shown.before + shown.text + shown.after == model.tokenizer.decode(ids[0])


def test_bad_input_is_named(model):
    with pytest.raises(HookError, match=r"layer 0 has no experts; MoE layers are \[1, 2\]"):
        expert_vocabulary(model, 0, 0)
    with pytest.raises(HookError, match="expert 8 does not exist; expected 0 to 7"):
        expert_vocabulary(model, 1, 8)
    used = set(model.routing(TOKENS[:1, :1]).layer(LAYER).indices.flatten().tolist())
    idle = min(set(range(8)) - used)
    with pytest.raises(InputError, match=f"expert {idle} of layer 2 was chosen by none of the 1 tokens"):
        expert_vocabulary(model, LAYER, idle, TOKENS[:1, :1])
    with pytest.raises(InputError, match="put a single one in a list"):
        expert_vocabulary(model, LAYER, EXPERT, "a text")
    with pytest.raises(HookError, match="layer 0 has no router"):
        router_geometry(model, 0)
    with pytest.raises(InputError, match="holds no token"):
        router_geometry(model, 1, [])


# Router geometry


def test_geometry_is_what_loops_say(model, cache, monkeypatch):
    monkeypatch.setattr("moe_lens.lenses.router_directions._CHUNK", 30)
    found = router_geometry(model, LAYER, TOKENS, top=4, batch=2)
    assert found.inputs is not None
    hf: Any = build("deepseek")
    block = hf.model.layers[LAYER]
    rows = (block.mlp.gate.weight - block.mlp.gate.weight.mean(0)).detach()
    embedding = hf.model.embed_tokens.weight.detach()
    for expert in range(8):
        logits = torch.stack(
            [
                (token / token.square().mean().sqrt() * block.post_attention_layernorm.weight) @ rows[expert]
                for token in embedding
            ]
        )
        assert found.tokens[expert].tolist() == logits.topk(4).indices.tolist()
        assert torch.allclose(found.attraction[expert], logits.topk(4).values, atol=1e-4, rtol=0)
    read, chosen = cache[f"blocks.{LAYER}.mlp.hook_in"], cache["expert_indices", LAYER]
    gates, ups = block.mlp.experts.gate_up_proj.detach().split(16, dim=1)
    for row in range(8):
        for expert in range(8):
            mean = read[(chosen == expert).any(-1)].mean(0) - read.flatten(0, 1).mean(0)
            assert found.inputs[row, expert] == pytest.approx(
                cosine_similarity(rows[row], mean, dim=0).item(), abs=1e-5
            )
            cosines = cosine_similarity(rows[row], torch.cat([gates[expert], ups[expert]]), dim=-1)
            assert found.neurons[row, expert] == pytest.approx(cosines.square().mean().sqrt().item(), abs=1e-5)
    assert found.random == 32**-0.5


def test_an_expert_s_inputs_are_those_of_tokens_that_use_it(model):
    with model.use_experts(mass=0.5, most=3):
        found = router_geometry(model, LAYER, TOKENS, batch=2).inputs
        _, cache = model.run_with_cache(TOKENS)
    read, chosen = cache[f"blocks.{LAYER}.mlp.hook_in"], cache["expert_indices", LAYER]
    assert found is not None and (chosen < 0).any()
    rows = model.W_router[LAYER] - model.W_router[LAYER].mean(0)
    for expert in range(8):
        mean = read[(chosen == expert).any(-1)].mean(0) - read.flatten(0, 1).mean(0)
        right = cosine_similarity(rows, mean, dim=-1)
        torch.testing.assert_close(found[:, expert], right, atol=1e-5, rtol=0)  # float32: cosines of means of float32


@torch.no_grad()
@pytest.mark.typed
@pytest.mark.parametrize("model_type", ["gpt_oss", "inkling_text", "laguna", "mixtral"])
def test_attraction_is_the_router_logit_of_a_stream_that_holds_an_embedding_alone(model_type):
    """Biases, bounds of logits, and embeddings that are normed before the first layer count; Mixtral has none."""
    model = HookedMoE.from_hf(configs.build(model_type))
    layer, every = model.moe_layers[-1], torch.arange(configs.VOCABULARY)[:, None]
    found = router_geometry(model, layer, top=4)
    mid, read = f"blocks.{layer}.hook_resid_mid", f"blocks.{layer}.mlp.hook_router_logits"
    alone = model.run_with_cache(every, names_filter="blocks.0.hook_resid_pre")[1]["resid_pre", 0]
    with model.hooks([(mid, lambda value, hook: alone)]):
        logits = model.run_with_cache(every, names_filter=read)[1][read][:, 0]
    expected = (logits - logits.mean(-1, keepdim=True)).T.topk(4)
    assert torch.equal(found.tokens, expected.indices)
    assert torch.allclose(found.attraction, expected.values, atol=2e-3, rtol=0)
    rows = model.W_router[layer] - model.W_router[layer].mean(0)
    plain = rows @ model.blocks[layer].ln2(model.W_E[None])[0].T
    agree = torch.allclose(found.attraction, plain.topk(4).values, atol=2e-3, rtol=0)
    assert agree == (model_type == "mixtral")


def test_rows_point_at_the_inputs_of_their_experts_and_others_do_not(model):
    frame = router_geometry(model, LAYER, TOKENS).to_frame()
    inputs = frame[frame["measure"] == "inputs"]
    own, others = (torch.tensor(list(inputs[name])).mean() for name in ("own", "others"))
    assert own > 0.2 > others
    assert len(frame) == 16
    assert router_geometry(model, LAYER).inputs is None
