import re
from typing import Any

import pytest
import torch

from moe_lens import HookedMoE, names
from moe_lens.data import TokenBatch, Tokens
from moe_lens.errors import InputError
from moe_lens.pruning import METHODS, merge, plan, score
from moe_lens.pruning.scoring import importance, texts_digest
from tests.families import build, tokens
from tests.matrix import configs


def texts(seed=1, batch=3, pos=12, padded=4, name="a"):
    """Two batches; the last row of each ends in padding; special tokens, a row's first and one within, do not count."""
    batches = []
    for i in range(2):
        ids = tokens(batch, pos, seed=seed + i)
        mask = torch.ones(batch, pos, dtype=torch.bool)
        mask[-1, pos - padded :] = False
        counted = mask.clone()
        counted[:, 0] = False
        counted[1:2, 5:6] = False
        batches.append(TokenBatch(ids, mask, counted, tuple(f"{name}{i}{row}" for row in range(batch)), ()))
    return Tokens(name, tuple(batches))


@pytest.fixture(scope="module")
def model():
    return HookedMoE.from_hf(build("qwen2_moe"), check=False)


def by_loops(model, of):
    """REAP (arXiv 2510.13999, eq. 9), EAN, frequency and summed weight, token by token from their definitions."""
    kept = (names.EXPERT_INDICES, names.ROUTING_WEIGHTS, names.EXPERT_OUT)
    size = len(model.moe_layers), model.n_experts
    g_norm, norm, weight, count = (torch.zeros(size, dtype=torch.float64) for _ in range(4))
    n = 0
    for batch in of:
        _, cache = model.run_with_cache(
            batch.tokens, names_filter=lambda name: name.endswith(kept), attention_mask=batch.mask.long()
        )
        for i, j in batch.counted.nonzero().tolist():
            n += 1
            for row, layer in enumerate(model.moe_layers):
                for rank in range(model.top_k):
                    expert = int(cache["expert_indices", layer][i, j, rank])
                    g = float(cache["routing_weights", layer][i, j, rank])
                    length = float(cache["expert_out", layer][i, j, rank].double().norm())
                    g_norm[row, expert] += g * length
                    norm[row, expert] += length
                    weight[row, expert] += g
                    count[row, expert] += 1
    return {
        "frequency": count / n,
        "summed_weight": weight / n,
        "ean": norm / n,
        "weighted_ean": g_norm / n,
        "reap": g_norm / count.clamp(min=1),
        "selected": (count > 0).double(),
    }


def test_with_any_number_of_experts_those_of_each_token_count(model):
    of = texts()
    method: Any
    with model.use_experts(mass=0.3), torch.no_grad():
        routed = torch.zeros(len(model.moe_layers), model.n_experts, dtype=torch.float64)
        norm, empty = routed.clone(), 0
        for batch in of:
            _, cache = model.run_with_cache(batch.tokens, attention_mask=batch.mask.long())
            for row, layer in enumerate(model.moe_layers):
                ids, out = cache["expert_indices", layer][batch.counted], cache["expert_out", layer][batch.counted]
                empty += int((ids == -1).sum())
                for expert in range(model.n_experts):
                    routed[row, expert] += int((ids == expert).sum())
                    norm[row, expert] += out[ids == expert].double().norm(dim=-1).sum()
        assert empty  # tokens differ in how many experts they take
        expected = {"frequency": routed / of.n_tokens, "ean": norm / of.n_tokens, "selected": (routed > 0).double()}
        for method, values in expected.items():
            assert torch.allclose(score(model, [of], method).values[0], values, rtol=1e-5), method
        merged = merge(plan(score(model, [of], "reap"), keep=0.5), model, [of])
    assert merged.shares is not None and torch.equal(merged.shares.double(), routed)


def test_what_an_intervention_leaves_out_counts_neither_in_scores_nor_in_merging(model):
    of, shares = texts(), []
    for k in (model.top_k, 1):
        with model.keep_top(k):
            scores = score(model, [of], "frequency")
            shares.append(merge(plan(scores, keep=0.5), model, [of]).shares)
            assert torch.allclose(shares[-1].double(), scores.values[0] * of.n_tokens)
    assert [int(of_k.sum(-1)[0]) for of_k in shares] == [model.top_k * of.n_tokens, of.n_tokens]


def test_scores_of_routing_and_outputs_are_their_definitions(model):
    of = texts()
    expected = by_loops(model, of)
    method: Any
    for method, values in expected.items():
        found = score(model, [of], method)
        assert torch.allclose(found.values[0], values, rtol=1e-5, atol=1e-7), method
    assert not torch.allclose(
        expected["reap"] / expected["reap"].sum(), expected["ean"] / expected["ean"].sum(), rtol=0.05
    )


def without(moe, x, gone):
    """Qwen2-MoE's routed experts from their parameters: softmax over all but one, the k largest, not normalised."""
    logits = x @ moe.gate.weight.T
    logits[:, gone] = -torch.inf
    weights, chosen = logits.softmax(-1).topk(3)
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for weight, expert in zip(weights[token], chosen[token], strict=True):
            activated, linear = (moe.experts.gate_up_proj[expert] @ x[token]).chunk(2)
            out[token] += weight * (moe.experts.down_proj[expert] @ (torch.nn.functional.silu(activated) * linear))
    return out


@pytest.mark.typed
@torch.no_grad()
def test_naee_is_how_far_a_layer_moves_without_an_expert(model):
    """‖F(x) − F₋ₑ(x)‖² from the parameters; the shared expert is in both, and cancels."""
    of = texts()
    found = score(model, [of], "naee").values[0]
    layer, moe = model.moe_layers[1], model._moe(model.moe_layers[1])
    for expert in (0, 5):
        total, n = 0.0, 0
        for batch in of:
            _, cache = model.run_with_cache(
                batch.tokens, names_filter=lambda name: name.endswith("mlp.hook_in"), attention_mask=batch.mask.long()
            )
            x = cache[names.mlp(names.MLP_IN, layer)][batch.counted]
            total += float((without(moe, x, []) - without(moe, x, [expert])).double().square().sum())
            n += len(x)
        assert found[1, expert].item() == pytest.approx(total / n, rel=1e-4)
    assert found[1, 0] != found[1, 5]


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["granitemoe", "gemma4_text"])
def test_naee_is_of_what_the_layer_adds_whatever_is_around_its_experts(model_type):
    """A family that multiplies the layer's output (Granite), and one whose router reads another input (Gemma 4)."""
    hooked = HookedMoE.from_hf(configs.build(model_type), check=False)
    ids = configs.tokens(2, 9)
    on = torch.ones(2, 9, dtype=torch.bool)
    of = Tokens("a", (TokenBatch(ids, on, on, ("x", "y"), ()),))
    found = score(hooked, [of], "naee").values[0]
    # In the first of the layers what it reads is as in the whole model, so that its output can be compared as it is.
    layer, expert = hooked.moe_layers[0], 2
    at = names.mlp(names.MLP_OUT, layer)
    _, whole = hooked.run_with_cache(ids, names_filter=at)

    def without(logits, hook):  # noqa: ARG001
        return logits.index_fill(-1, torch.tensor([expert]), -torch.inf)

    with hooked.hooks(fwd_hooks=[(names.mlp(names.ROUTER_LOGITS, layer), without)]):
        _, cache = hooked.run_with_cache(ids, names_filter=at)
    moved = (cache[at] - whole[at]).double().square().sum(-1).mean()
    assert moved > 0 and found[0, expert].item() == pytest.approx(float(moved), rel=1e-6)


def test_a_model_without_a_stream_before_its_experts_lacks_the_score_beside_it_alone():
    hooked = HookedMoE.from_hf(configs.build("cohere2_moe"), check=False)
    on = torch.ones(2, 16, dtype=torch.bool)
    of = Tokens("a", (TokenBatch(configs.tokens(2, 16), on, on, ("x", "y"), ()),))
    expected = by_loops(hooked, of)
    for method in ("frequency", "reap"):
        assert torch.allclose(score(hooked, [of], method).values[0], expected[method], rtol=1e-5, atol=1e-7)
    found = importance(hooked, of)
    missing = found.to_frame().isna().mean().to_dict()
    assert missing.pop("relative_norm") == 1 and not any(missing.values())
    with pytest.raises(InputError, match="no hook_resid_mid"):
        found.score("relative_norm")


@torch.no_grad()
def nats(model, of, hooks):
    total, n = 0.0, 0
    for batch in of:
        logits = model.run_with_hooks(batch.tokens, fwd_hooks=hooks, attention_mask=batch.mask.long()).double()
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none"
        )
        read = batch.counted[:, 1:].flatten()
        total, n = total + float(loss[read].sum()), n + int(read.sum())
    return total / n


@pytest.mark.typed
def test_knock_out_is_the_loss_without_the_expert(model):
    of = texts()
    found = score(model, [of], "knockout").values[0]
    whole = nats(model, of, [])
    for row, expert in ((0, 1), (0, 6), (1, 3)):
        layer = model.moe_layers[row]
        without = nats(model, of, model.ablate({layer: [expert]}).fwd_hooks)
        assert found[row, expert].item() == pytest.approx(without - whole, abs=2e-6)
    assert found.abs().max() > 1e-3


def test_gradient_is_its_first_order():
    """One expert's contribution scaled by 1 ∓ ε: the change of the loss over 2 ε; DeepSeek keeps float64."""
    of = texts()
    double = HookedMoE.from_hf(build("deepseek", torch.float64), check=False)
    found = score(double, [of], "gradient").values[0]
    layer, expert, eps = double.moe_layers[0], 2, 1e-5

    def scaled(factor):
        def hook(weighted, hook):
            chosen = double.experts_in_slots(layer) == expert
            return torch.where(chosen[..., None], weighted * factor, weighted)

        return nats(double, of, [(names.mlp(names.EXPERT_WEIGHTED, layer), hook)])

    slope = (scaled(1 - eps) - scaled(1 + eps)) / (2 * eps)
    assert found[0, expert].item() == pytest.approx(slope, rel=1e-6)
    assert abs(slope) > 1e-4


def test_random_scores_follow_the_seed_and_domains_differ(model):
    a, b = (score(model, [texts(), texts(9, name="b")], "random", seed=seed) for seed in (0, 1))
    again = score(model, [texts(), texts(9, name="b")], "random", seed=0)
    assert torch.equal(a.values, again.values) and not torch.equal(a.values, b.values)
    assert not torch.equal(a.values[0], a.values[1])
    assert a.domains == ("a", "b") and a.tokens == (56, 56)


def test_calibration_data_has_a_fingerprint():
    assert texts_digest([texts()]) == texts_digest([texts()])
    assert texts_digest([texts()]) != texts_digest([texts(2)])
    assert texts_digest([texts()]) != texts_digest([texts(name="b")])
    longer = texts(padded=3)
    assert texts_digest([texts()]) != texts_digest([longer])


def test_too_little_text_and_unknown_methods_are_refused(model):
    with pytest.raises(InputError, match="domain 'a' has 6 tokens, fewer than the 8 experts"):
        score(model, [texts(batch=1, pos=5, padded=1)], "reap")
    with pytest.raises(InputError, match="no texts to score experts on"):
        score(model, [], "reap")


@pytest.mark.untyped
def test_unknown_methods_are_refused(model):
    method: Any = "magic"
    with pytest.raises(InputError, match=r"method is 'magic'; expected one of \('frequency', 'summed_weight', "):
        score(model, [texts()], method)
    assert len(METHODS) == 10


@pytest.mark.typed
def test_super_experts_can_be_protected(model):
    from moe_lens.pruning import plan, super_experts

    experts = model._moe(1).experts
    before = experts.down_proj.data[5].clone()
    experts.down_proj.data[5] *= 50
    try:
        assert super_experts(model, [texts()]) == [(1, 5)]
    finally:
        experts.down_proj.data[5] = before
    worst = int(score(model, [texts()], "random").values.mean(0).argsort(dim=-1)[0, 0])
    made = plan(score(model, [texts()], "random"), 0.5, protect=[(1, worst)])
    assert worst in made.of(1) and worst not in plan(score(model, [texts()], "random"), 0.5).of(1)


@pytest.mark.untyped
def test_what_is_no_list_of_tokens_is_said(model):
    own: Any = texts()
    wrong: list[tuple[Any, str]] = [
        (own, "expected several: put a single one in a list"), (["x"], "expected a Tokens (what tokenize makes"),
        ({"a": own}, "in a list and no dictionary"), ([own, texts(seed=9)], "two domains are called 'a'"),
    ]  # fmt: skip
    for given, message in wrong:
        with pytest.raises(InputError, match=re.escape(message)):
            score(model, given, "frequency")
    with pytest.raises(InputError, match="model is a .*ForCausalLM; expected a HookedMoE"):
        score(model.original_model, [own], "frequency")


def test_a_seed_without_effect_is_refused(model):
    with pytest.raises(InputError, match="seed=0 has no effect on 'frequency', which draws nothing"):
        score(model, [texts()], "frequency", seed=0)
    drawn = [score(model, [texts()], "random", seed=seed).values for seed in (None, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
