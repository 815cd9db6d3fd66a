"""Importance scores and experts' likeness: by hand, on a live model, and on experts that were made alike."""

from typing import Any

import pytest
import torch

from moe_lens import names
from moe_lens.errors import InputError
from moe_lens.routing import output_factors
from moe_lens.stats import (
    SCORES,
    ActivationMeans,
    ImportanceStats,
    NeuronStats,
    OutputSimilarityStats,
    expert_similarity,
    weight_similarity,
)
from moe_lens.stats.observation import COMPUTED, each_layer
from tests.wrapped import wrapped

F64 = 1e-12  # sums of few numbers in float64, taken in another order: what rounding there may differ by

D, K, EXPERTS = 6, 2, 5


def activations(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    resid, outputs = torch.randn(2, 4, D, generator=generator), torch.randn(2, 4, K, D, generator=generator)
    weights, indices = torch.rand(2, 4, EXPERTS - 1, generator=generator).topk(K)  # the last expert is never chosen
    return resid, outputs, weights, indices, torch.rand(2, 4, generator=generator) < 0.8


def test_scores_by_their_definitions():
    parts = [activations(seed) for seed in range(3)]
    stats = ImportanceStats([2], EXPERTS)
    for part in parts:
        stats.update(2, *part)
    result = stats.result()
    n = sum(int(part[-1].sum()) for part in parts)
    for expert in range(EXPERTS):
        g, norms, peaks, relative = [], [], [0.0], []
        for resid, outputs, weights, indices, counted in parts:
            for row, pos in counted.nonzero().tolist():
                for rank in range(K):
                    if int(indices[row, pos, rank]) == expert:
                        g.append(float(weights[row, pos, rank]))
                        norms.append(float(outputs[row, pos, rank].norm()))
                        peaks.append(float(outputs[row, pos, rank].abs().max()))
                        relative.append(g[-1] * norms[-1] / float(resid[row, pos].norm()))
        weighted = [a * b for a, b in zip(g, norms, strict=True)]
        expected = {
            "frequency": len(g) / n,
            "summed_weight": sum(g),
            "ean": sum(norms),
            "weighted_ean": sum(weighted),
            "reap": sum(weighted) / max(1, len(g)),
            "mean_norm": sum(norms) / max(1, len(g)),
            "relative_norm": sum(relative) / max(1, len(g)),
            "max_activation": max(peaks),
        }
        assert expected.keys() == SCORES.keys()
        for name, value in expected.items():
            assert float(result.score(name)[0, expert]) == pytest.approx(value, rel=1e-6), name
    assert len(result.to_frame()) == EXPERTS
    with pytest.raises(InputError, match="no score 'x'; expected one of"):
        result.score("x")


def test_super_experts_are_those_far_above_all_others():
    stats = ImportanceStats(range(4), 100)
    generator = torch.Generator().manual_seed(0)
    indices = torch.arange(100).view(1, 100, 1)
    for layer in range(4):
        outputs = torch.rand(1, 100, 1, D, generator=generator)
        if layer == 1:
            outputs[0, 7] *= 100
        stats.update(layer, torch.ones(1, 100, D), outputs, torch.ones(1, 100, 1), indices, torch.ones(1, 100).bool())
    result = stats.result()
    assert result.super_experts().nonzero().tolist() == [[1, 7]]
    assert result.super_experts([1]).sum() == 1 and result.super_experts([0, 2, 3]).sum() == 0
    mask: Any = torch.tensor([False, True, False, False])
    assert torch.equal(result.super_experts(mask), result.super_experts([1]))
    wrongs: list[Any] = [[False, True, False, False], mask[:2], [99], [-1]]
    for wrong in wrongs:
        with pytest.raises(InputError, match="layers: got"):
            result.super_experts(wrong)
    even = ImportanceStats([0], 100)
    even.update(
        0, torch.ones(1, 100, D), torch.ones(1, 100, 1, D), torch.ones(1, 100, 1), indices, torch.ones(1, 100).bool()
    )
    assert not even.result().super_experts().any()  # where all are alike, none is super


@pytest.mark.parametrize("name", ["deepseek", "gpt_oss"])
def test_live_scores_are_those_of_a_cache(name):
    case = wrapped(name)
    model, tokens = case.model, case.tokens
    counted = torch.ones(tokens.shape, dtype=torch.bool)
    counted[0, :3] = False
    stats = ImportanceStats(model.moe_layers, model.n_experts)
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=stats.hooks(model, counted))
        assert torch.equal(logits, model(tokens))  # watching changes nothing
        _, cache = model.run_with_cache(tokens)
    result = stats.result()
    for i, layer in enumerate(model.moe_layers):
        weighted = cache["expert_weighted", layer][counted].norm(dim=-1).double()
        chosen = cache["expert_indices", layer][counted]
        expected = torch.zeros(model.n_experts, dtype=torch.float64).index_add_(0, chosen.flatten(), weighted.flatten())
        assert torch.allclose(result.score("weighted_ean")[i], expected, rtol=1e-5)
        assert torch.equal(result.routed[i], torch.bincount(chosen.flatten(), minlength=model.n_experts))


def leaves_out_odd_ranks(value: torch.Tensor, hook: Any) -> torch.Tensor:
    return value & (torch.arange(value.shape[-1]) % 2 == 0)


LEFT_OUT: dict[str, tuple[Any, Any]] = {
    "keep_top": (lambda model: model.keep_top(1), lambda indices: torch.arange(indices.shape[-1]) < 1),
    "ablate": (
        lambda model: model.ablate({layer: [0, 2] for layer in model.moe_layers}),
        lambda indices: (indices != 0) & (indices != 2),
    ),
    "use_experts": (lambda model: model.use_experts(mass=0.8), lambda indices: indices >= 0),
    "hook": (
        lambda model: model.hooks(
            [(names.mlp(names.EXPERT_KEPT, at), leaves_out_odd_ranks) for at in model.moe_layers]
        ),
        lambda indices: torch.arange(indices.shape[-1]) % 2 == 0,
    ),
    "nothing": (lambda model: model.hooks([]), lambda indices: indices >= 0),
}
"""What leaves experts out, and which slots it leaves in."""


@pytest.mark.typed
@pytest.mark.parametrize("how", LEFT_OUT)
def test_experts_count_where_they_were_computed(how):
    case = wrapped("deepseek")
    model, tokens = case.model, case.tokens
    inside, left_in = LEFT_OUT[how]
    counted = torch.ones(tokens.shape, dtype=torch.bool)
    counted[0, :3] = False
    size = model.moe_layers, model.n_experts
    stats, neurons = ImportanceStats(*size), NeuronStats(*size)
    means = ActivationMeans(*size, model.top_k, model.cfg.d_model)
    wanted = [names.RESID_MID, names.EXPERT_OUT, names.EXPERT_POST, names.ROUTING_WEIGHTS, COMPUTED]
    refused: list[int] = []

    def note(layer: int, of: dict[str, torch.Tensor]) -> None:
        resid, outputs, inner, weights, indices = (of[name] for name in wanted)
        neurons.update(layer, inner, indices, counted)
        if indices.shape[-1] != model.top_k:  # as many ranks as this batch's hungriest token asks for
            refused.append(layer)
            with pytest.raises(InputError, match=f"expected {model.top_k}, as announced"):
                means.update(layer, resid, outputs, weights, indices, counted)
        else:
            means.update(layer, resid, outputs, output_factors(weights, model.family), indices, counted)

    with torch.no_grad(), inside(model):
        model.run_with_hooks(tokens, fwd_hooks=stats.hooks(model, counted) + each_layer(model, wanted, note))
        _, cache = model.run_with_cache(tokens)
    result, by_neuron = stats.result(), neurons.result()
    assert bool(refused) == (how == "use_experts")
    own = None if refused else means.result()
    assert result.n_tokens == int(counted.sum())
    left_out = 0
    for i, layer in enumerate(model.moe_layers):
        read, indices = cache[names.mlp(names.MLP_IN, layer)], cache["expert_indices", layer]
        slots = (left_in(indices) & (indices >= 0)).expand(indices.shape) & counted[..., None]
        left_out += int((indices[counted] >= 0).sum() - slots.sum())
        for expert in range(model.n_experts):
            at, ranks = ((indices == expert) & slots).any(-1), (indices == expert) & slots
            n = int(at.sum())
            assert int(result.routed[i, expert]) == int(by_neuron.routed[i, expert]) == n
            assert float(result.score("frequency")[i, expert]) == pytest.approx(n / result.n_tokens)
            if not n:
                continue
            with torch.no_grad():
                outputs = model.expert_outputs(layer, read[at], torch.full((n, 1), expert))[:, 0].double()
            weights = cache["routing_weights", layer][ranks].double()
            size = outputs.norm(dim=-1)
            u = cache[names.block(names.RESID_MID, layer)][at].double().norm(dim=-1)
            expected = {"mean_norm": size.mean(), "ean": size.sum(), "max_activation": outputs.abs().max()}
            expected |= {"reap": (weights * size).mean(), "relative_norm": (weights * size / u).mean()}
            expected |= {"summed_weight": weights.sum(), "weighted_ean": (weights * size).sum()}
            for name, value in expected.items():
                assert float(result.score(name)[i, expert]) == pytest.approx(float(value), rel=1e-4), name
            inner = cache[names.mlp(names.EXPERT_POST, layer)][ranks].double()
            assert torch.allclose(by_neuron.sizes[i, expert], inner.abs().sum(0), rtol=1e-4)
            if own is not None:
                assert int(own.counts[i, expert]) == n
                assert torch.allclose(own.experts[i, expert].double(), outputs.mean(0), atol=1e-5)
    assert (left_out > 0) == (how in {"keep_top", "ablate", "hook"})  # chosen, and not computed


def test_slots_that_hold_no_expert_are_not_counted_and_other_ids_are_refused():
    resid, outputs, weights, indices, counted = activations(0)
    counted[:] = True
    fewer, means = ImportanceStats([2], EXPERTS), ActivationMeans([2], EXPERTS, K, D)
    gone = torch.cat([indices[..., :1], torch.full_like(indices[..., 1:], -1)], -1)
    fewer.update(2, resid, outputs, weights, gone, counted)
    one = ImportanceStats([2], EXPERTS).update(
        2, resid, outputs[..., :1, :], weights[..., :1], indices[..., :1], counted
    )
    for name in SCORES:
        assert torch.equal(fewer.result().score(name), one.result().score(name)), name
    found = means.update(2, resid, outputs, weights, gone, counted).result()
    assert not found.weighted[0, 1].any() and int(found.counts.sum()) == counted.sum()
    for wrong in (EXPERTS, -2):
        gone[0, 0, 0] = wrong
        with pytest.raises(InputError, match="expected 0 to 4, or −1 where none is computed"):
            ImportanceStats([2], EXPERTS).update(2, resid, outputs, weights, gone, counted)
        with pytest.raises(InputError, match="expected 0 to 4"):
            NeuronStats([2], EXPERTS).update(2, outputs, gone, counted)
        with pytest.raises(InputError, match="expected 0 to 4"):
            ActivationMeans([2], EXPERTS, K, D).update(2, resid, outputs, weights, gone, counted)


@pytest.mark.typed
def test_all_experts_on_a_sample():
    case = wrapped("deepseek", torch.float64)  # how rows are grouped changes the last bits
    model, tokens = case.model, case.tokens
    sample = torch.zeros(tokens.shape, dtype=torch.bool)
    sample[:, ::2] = True
    stats = OutputSimilarityStats(model.moe_layers, model.n_experts)
    with torch.no_grad():
        for some in (sample, torch.zeros_like(sample)):  # a batch may hold no token of a sample
            model.run_with_hooks(tokens, fwd_hooks=stats.hooks(model, some, chunk=5))
        wanted = (names.MLP_IN, names.EXPERT_INDICES, names.EXPERT_OUT)
        only = [names.mlp(name, layer) for layer in model.moe_layers for name in wanted]
        _, cache = model.run_with_cache(tokens, names_filter=only)
        result = stats.result()
        for i, layer in enumerate(model.moe_layers):
            x = cache[names.mlp(names.MLP_IN, layer)][sample]
            ids = torch.arange(model.n_experts).expand(len(x), -1)
            outputs = model.expert_outputs(layer, x, ids).double()
            for a in range(model.n_experts):
                for b in range(model.n_experts):
                    one, other = outputs[:, a], outputs[:, b]
                    cosine = torch.nn.functional.cosine_similarity(one[:, None], other[None], dim=-1)
                    assert float(result.cosine[i, a, b]) == pytest.approx(float(cosine.diagonal().mean()), abs=1e-9)
                    off = cosine[~torch.eye(len(x), dtype=torch.bool)].mean()
                    assert float(result.null[i, a, b]) == pytest.approx(float(off), abs=1e-9)
                    flat = torch.stack([(one - one.mean(0)).flatten(), (other - other.mean(0)).flatten()])
                    correlation = flat[0] @ flat[1] / flat[0].norm() / flat[1].norm()
                    assert float(result.correlation[i, a, b]) == pytest.approx(float(correlation), abs=1e-9)
        # the chosen experts' outputs are the ones the model itself computed
        chosen = cache["expert_indices", model.moe_layers[0]][sample]
        own = model.expert_outputs(
            model.moe_layers[0], cache[names.mlp(names.MLP_IN, model.moe_layers[0])][sample], chosen
        )
        assert torch.allclose(own, cache["expert_out", model.moe_layers[0]][sample], atol=1e-6)
    assert len(result.to_frame()) == len(model.moe_layers) * model.n_experts * (model.n_experts - 1) // 2


def test_a_common_direction_is_not_likeness():
    generator = torch.Generator().manual_seed(0)
    stats = OutputSimilarityStats([0], 3)
    outputs = torch.randn(500, 3, 16, generator=generator)
    outputs[:, 2] = outputs[:, 0]  # two experts that do the same
    outputs += 10 * torch.ones(16)  # and a direction that all add to everything
    result = stats.update(0, outputs).result()
    assert float(result.cosine[0, 0, 1]) > 0.95 and float(result.null[0, 0, 1]) > 0.95
    assert abs(float(result.correlation[0, 0, 1])) < 0.05
    assert float(result.correlation[0, 0, 2]) == pytest.approx(1, abs=1e-9)


FLOAT32 = 1e-5
"""Sums of 480 products and of 1,600 squares in float32."""


class Parameters:
    """What `weight_similarity` reads of a model."""

    moe_layers = (0,)

    def __init__(self, d: int, m: int, n: int):
        self.W_gate, self.W_in, self.W_out = ({0: torch.randn(n, *shape)} for shape in ((d, m), (d, m), (m, d)))


def test_weights_that_are_alike_but_for_the_order_of_neurons():
    model = Parameters(40, 12, 3)
    order = torch.randperm(12)
    model.W_in[0][1] = model.W_in[0][0][:, order]
    model.W_out[0][1] = model.W_out[0][0][order]
    table: Any = weight_similarity(model, 0).set_index(["matrix", "expert", "other"])
    for name in ("W_in", "W_out"):
        assert table.loc[(name, 0, 1), "subspace"] == pytest.approx(1, abs=1e-5)
        assert abs(table.loc[(name, 0, 1), "cosine"]) < 0.5
    others = table.drop([("W_in", 0, 1), ("W_out", 0, 1)])
    assert others["subspace"].mean() == pytest.approx(12 / 53, rel=0.1) and set(others["null"]) == {12 / 53}
    model.W_gate = model.W_in  # experts without a gated branch
    assert set(weight_similarity(model, 0)["matrix"]) == {"W_in", "W_out"}
    live = wrapped("deepseek").model
    pairs = live.n_experts * (live.n_experts - 1) // 2
    assert len(weight_similarity(live, live.moe_layers[0])) == 3 * pairs


def test_subspaces_overlap_as_pair_by_pair_whatever_is_held_at_a_time(monkeypatch):
    model = Parameters(40, 12, 3)
    a = model.W_in[0].double()
    pairs = torch.einsum("edm,fdn->efmn", a, a).square().sum((-1, -2))
    cosines = pairs / (pairs.diagonal().sqrt()[:, None] * pairs.diagonal().sqrt())
    for held in (2**24, 3 * 40 * 7, 1):
        monkeypatch.setattr(expert_similarity, "CHUNK", held)
        table: Any = weight_similarity(model, 0).set_index(["matrix", "expert", "other"])["subspace"]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert table["W_in", i, j] == pytest.approx(float(cosines[i, j]), rel=FLOAT32)


@pytest.mark.typed
def test_neurons_are_summed_by_expert():
    parts = [activations(seed) for seed in range(3)]
    stats = NeuronStats([2], EXPERTS)
    for _, inner, _, indices, counted in parts:
        stats.update(2, inner, indices, counted)
    result = NeuronStats([2], EXPERTS).load_state_dict(stats.state_dict()).result()
    frame = result.to_frame().set_index(["layer", "expert", "neuron"])
    for expert in range(EXPERTS):
        own = [inner[(indices == expert) & counted[..., None]] for _, inner, _, indices, counted in parts]
        values = torch.cat(own).double()
        assert int(result.routed[0, expert]) == len(values)
        assert torch.allclose(result.sums[0, expert], values.sum(0), atol=F64)
        assert torch.allclose(result.sizes[0, expert], values.abs().sum(0), atol=F64)
        if len(values):
            assert frame.loc[(2, expert, 3), "size"] == pytest.approx(float(values[:, 3].abs().mean()))
    with pytest.raises(InputError, match="no tokens were counted"):
        NeuronStats([2], EXPERTS).result()
