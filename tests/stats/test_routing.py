"""Routing counts and what is measured from them: against arrays counted by hand, and whatever the batching."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.errors import InputError
from moe_lens.routing import Routing
from moe_lens.stats import LAYER_MEASURES, RoutedBatch, RoutingResult, RoutingStats, bootstrap, halves, load_evenness
from tests.stats.routed import random_batch, routed

LAYERS, EXPERTS, TOP_K = (1, 3), 5, 2


def seen(*batches: RoutedBatch) -> RoutingStats:
    stats = RoutingStats(LAYERS, EXPERTS, TOP_K)
    for batch in batches:
        stats.update(batch)
    return stats


def batches(seed: int) -> list[RoutedBatch]:
    generator = torch.Generator().manual_seed(seed)
    return [random_batch(generator) for _ in range(1 + seed % 4)]


@pytest.mark.typed
def test_by_hand():
    # One layer, three tokens of which the last is padding.
    batch = routed(
        torch.tensor([[[[0, 1], [0, 2], [4, 3]]]]),
        torch.tensor([[True, True, False]]),
        ["a"],
        n_experts=EXPERTS,
        layers=[2],
        weights=torch.tensor([[[[0.5, 0.25], [0.5, 0.125], [9.0, 9.0]]]]),
    )
    result = RoutingStats([2], EXPERTS, TOP_K).update(batch).result()
    assert result.n_tokens == 2
    assert result.specialisation.tolist() == [[1.0, 0.5, 0.5, 0.0, 0.0]]
    assert result.expert_load.tolist() == [[0.5, 0.25, 0.25, 0.0, 0.0]]
    assert result.top1.tolist() == [[[2, 0, 0, 0, 0]]]
    assert result.weights.tolist() == [[[1.0, 0.25, 0.125, 0, 0]]]
    assert result.baseline == 0.4
    assert result.experts_covering(0.5).tolist() == [1]
    assert result.experts_covering(0.75).tolist() == [2]
    assert result.experts_covering(1.0).tolist() == [3]
    row = result.most_specialised().iloc[0]
    assert (row["layer"], row["expert"], row["share"], row["sources"]) == (2, 0, 1.0, 1)
    assert row["low"] is None and row["picked_apart"] is None
    measures: Any = result.per_layer().set_index("measure")
    assert measures.loc["imbalance", "value"] == 2.5
    assert measures.loc["load_entropy", "value"] == pytest.approx(1.5 * math.log(2), abs=1e-12)
    # mean absolute difference of (4, 2, 2, 0, 0) over twice the mean: (2·(2+2+4+4) + 2·(2·4)) / (2·25·1.6)
    assert measures.loc["gini", "value"] == pytest.approx(0.5, abs=1e-12)
    assert measures.loc[["router_entropy", "margin"], "value"].isna().all()  # no logits, so nobody knows
    assert measures["low"].isna().all()  # a single source


def test_intervals_of_evenness_hold_the_true_one_though_chance_makes_loads_uneven():
    """Of ten texts, the plug-in values are off to one side: so are their resamples. Counts of experts have none."""
    generator = torch.Generator().manual_seed(0)
    n, experts, tokens = 10, 64, 360
    true = (0.3 * torch.randn(experts, generator=generator)).softmax(-1).double()
    truth = {
        "gini": float(load_evenness.gini(true)),
        "load_entropy": float(load_evenness.entropy(true)),
        "imbalance": float(load_evenness.imbalance(true)),
    }
    even = {"gini": 0, "load_entropy": math.log(experts), "imbalance": 1}
    held, resampled = dict.fromkeys(truth, 0), 0
    for _ in range(20):
        drawn = torch.multinomial(true, n * tokens, replacement=True, generator=generator).view(n, tokens)
        counts = torch.nn.functional.one_hot(drawn, experts).sum(1)[:, None]
        size, none = torch.full((n,), tokens), torch.zeros(n, 1, 2)
        names = tuple(f"s{number}" for number in range(n))
        result = RoutingResult((0,), 1, names, size, counts, counts, counts.double(), none.double(), none.long())
        rows: Any = result.per_layer().set_index("measure")
        assert rows.loc[["experts_50", "experts_80"], ["low", "high"]].isna().all(axis=None)
        for name in held:
            row = rows.loc[name]
            held[name] += row["low"] <= truth[name] <= row["high"]
            assert not row["low"] <= even[name] <= row["high"], "the control: the load is not even"
        plain = bootstrap(lambda times, of=counts: load_evenness.gini(times @ of[:, 0].double()), size)
        resampled += plain is not None and plain.low <= truth["gini"] <= plain.high
    assert all(times >= 17 for times in held.values())  # of 20: .95, less 2 standard deviations
    assert resampled < 15, "the control: resamples of the plug-in value"


def test_intervals_of_evenness_stay_within_what_it_can_be():
    """Of an even load, of which the jackknife alone would give entropies above ln E."""
    counts = torch.randint(20, 41, (12, 1, 8), generator=torch.Generator().manual_seed(0))
    size, none = counts.sum((1, 2)), torch.zeros(12, 1, 2)
    names = tuple(f"s{number}" for number in range(12))
    result = RoutingResult((0,), 1, names, size, counts, counts, counts.double(), none.double(), none.long())
    rows: Any = result.per_layer().set_index("measure")
    assert rows.loc["load_entropy", "high"] == math.log(8) > rows.loc["load_entropy", "low"]
    assert 0 <= rows.loc["gini", "low"] < rows.loc["gini", "high"] <= 7 / 8
    assert 1 <= rows.loc["imbalance", "low"] < rows.loc["imbalance", "high"] <= 8


def test_uniform_routing_needs_half_of_the_experts():
    batch = routed(torch.arange(64).view(1, 1, 16, 4), n_experts=64)
    result = RoutingStats([0], 64, 4).update(batch).result()
    assert result.experts_covering().tolist() == [32]
    assert torch.allclose(result.specialisation, torch.full((1, 64), result.baseline, dtype=torch.float64))
    measures: Any = result.per_layer().set_index("measure")["value"]
    assert measures["gini"] == pytest.approx(0, abs=1e-12)
    assert measures["load_entropy"] == pytest.approx(math.log(64), abs=1e-12)
    assert measures["imbalance"] == 1


@given(st.integers(0, 10**6))
def test_everything_equals_a_plain_loop(seed):
    parts = batches(seed)
    result = seen(*parts).result()
    plain: dict[Any, float] = {}
    source = ""

    def add(*key: Any, value: float = 1) -> None:
        plain[source, *key] = plain.get((source, *key), 0) + value

    for batch in parts:
        routing, given = batch.routing, batch.routing.logits
        assert given is not None
        for row, source in enumerate(batch.sources):  # noqa: B007  # `add` reads it
            for pos in batch.mask[row].nonzero()[:, 0].tolist():
                add("tokens")
                for i in range(2):
                    chosen, weights = routing.indices[i, row, pos].tolist(), routing.weights[i, row, pos].tolist()
                    for expert, weight in zip(chosen, weights, strict=True):
                        add("assigned", i, expert)
                        add("weight", i, expert, value=weight)
                    add("top1", i, chosen[0])
                    logits = given[i, row, pos].double()
                    p = logits.softmax(-1)
                    add("entropy", i, value=float(-(p * p.log()).sum()))
                    ordered = logits.sort(descending=True).values
                    add("margin", i, value=float(ordered[TOP_K - 1] - ordered[TOP_K]))
    for s, source in enumerate(result.sources):
        assert int(result.tokens[s]) == plain[source, "tokens"]
        for i in range(2):
            for expert in range(EXPERTS):
                assert int(result.assignments[s, i, expert]) == plain.get((source, "assigned", i, expert), 0)
                assert int(result.top1[s, i, expert]) == plain.get((source, "top1", i, expert), 0)
                expected = plain.get((source, "weight", i, expert), 0)
                assert float(result.weights[s, i, expert]) == pytest.approx(expected, abs=1e-6)
            # entropies and margins are computed in float32
            assert float(result.sums[s, i, 0]) == pytest.approx(plain[source, "entropy", i], abs=1e-5)
            assert float(result.sums[s, i, 1]) == pytest.approx(plain[source, "margin", i], abs=1e-5)
            assert result.measured[s, i].tolist() == [plain[source, "tokens"]] * 2
    assert torch.allclose(result.specialisation.sum(-1), torch.full((2,), float(TOP_K), dtype=torch.float64))
    for i, layer in enumerate(LAYERS):
        x = np.sort(result.assignments.sum(0)[i].numpy())[::-1]
        values: Any = result.per_layer().set_index(["layer", "measure"]).loc[layer]["value"]
        assert values["gini"] == pytest.approx(np.abs(x[:, None] - x).sum() / (2 * len(x) * x.sum()), abs=1e-12)
        assert values["imbalance"] == pytest.approx(x.max() / x.mean(), abs=1e-12)
        for share in (50, 80):
            needed = next(n for n in range(1, EXPERTS + 1) if x[:n].sum() >= share / 100 * x.sum() - 1e-9)
            assert values[f"experts_{share}"] == needed
        p = x[x > 0] / x.sum()
        assert values["load_entropy"] == pytest.approx(-(p * np.log(p)).sum(), abs=1e-12)


@given(st.integers(0, 10**6))
def test_padding_changes_nothing(seed):
    parts = batches(seed)
    padded = []
    for batch in parts:
        r = batch.routing
        wide = lambda value: torch.cat([value, torch.full((*value.shape[:2], 3, *value.shape[3:]), 99).to(value)], 2)  # noqa: E731
        routing = Routing(
            layers=r.layers,
            n_experts=EXPERTS,
            indices=wide(r.indices),
            weights=wide(r.weights),
            logits=wide(r.logits),
            probs=wide(r.probs),
            mask=torch.nn.functional.pad(torch.ones_like(batch.mask), (0, 3)),
        )
        counted = torch.nn.functional.pad(batch.mask, (0, 3), value=True)  # what is said of padding does not matter
        padded.append(RoutedBatch(routing=routing, counted=counted, sources=batch.sources))
    short, long = seen(*parts).result(), seen(*padded).result()
    assert short.sources == long.sources
    for name in ("tokens", "assignments", "top1", "measured"):
        assert torch.equal(getattr(short, name), getattr(long, name))
    assert torch.equal(short.weights, long.weights)
    assert torch.allclose(short.sums, long.sums, rtol=0, atol=1e-12)


@pytest.mark.typed
def test_special_tokens_can_be_left_out():
    indices = torch.tensor([[[[0, 1], [2, 3], [2, 3]]]])
    batch = routed(indices, n_experts=EXPERTS, tokens=torch.tensor([[9, 5, 6]]))
    stats = RoutingStats([0], EXPERTS, TOP_K).update(batch.without([9, 77]))
    assert stats.result().tokens.tolist() == [2]
    assert stats.result().specialisation.tolist() == [[0, 0, 1, 1, 0]]
    with pytest.raises(InputError, match="tokens="):
        routed(indices, n_experts=EXPERTS).without([9])


@pytest.mark.typed
def test_interval_resamples_sources_and_not_tokens():
    # 20 sources of 50 tokens that always agree within a source: as many independent facts as there are sources.
    stats = RoutingStats([0], 2, 1)
    for source in range(20):
        stats.update(routed(torch.full((1, 1, 50, 1), source % 2), sources=[f"s{source:02d}"], n_experts=2))
    result = stats.result()
    interval = result.interval(0, 0)
    assert interval is not None
    width = 2 * 1.96 * 0.5 / 20**0.5
    assert interval.high - interval.low == pytest.approx(width, rel=0.15)
    flat = bootstrap(lambda times: (times @ (torch.arange(1000) % 2).double()) / 1000, torch.ones(1000))
    assert flat is not None and flat.high - flat.low < 0.2 * width  # what resampling tokens would have claimed
    ends = result.intervals()
    assert ends is not None
    assert ends[:, 0, 0].tolist() == [interval.low, interval.high]  # all at once is one by one
    assert result.concentrated().tolist() == [[False, False]]  # pyright: ignore[reportOptionalMemberAccess]


def test_intervals_of_layer_measures_bracket_their_values():
    generator = torch.Generator().manual_seed(3)
    stats = seen(*(random_batch(generator, sources=[f"s{i}"], rows=2, width=20) for i in range(12)))
    table: Any = stats.result().per_layer()
    assert set(table["measure"]) == set(LAYER_MEASURES) and len(table) == 2 * len(LAYER_MEASURES)
    means = table[table["measure"].isin(["router_entropy", "margin"])]
    assert (means["low"] < means["value"]).all() and (means["value"] < means["high"]).all()
    table = table[~table["measure"].isin(["experts_50", "experts_80"])]
    assert (table["low"] <= table["high"]).all() and set(table["sources"]) == {12}


def test_expert_picked_on_one_half_is_measured_on_the_other():
    stats = RoutingStats([0], EXPERTS, TOP_K)
    names = [f"s{i}" for i in range(8)]
    half = halves(names)
    for name in names:  # experts 0, 1 in one half, 2, 3 in the other: what is picked here is never chosen there
        indices = torch.tensor([0, 1] if half[name] == 0 else [2, 3]).view(1, 1, 1, 2)
        stats.update(routed(indices, sources=[name], n_experts=EXPERTS))
    result = stats.result()
    assert result.picked_and_measured_apart() is not None
    assert result.picked_and_measured_apart().tolist() == [0.0]  # pyright: ignore[reportOptionalMemberAccess]
    assert float(result.specialisation.max()) == 0.5


def test_random_routing_looks_specialised_only_to_those_who_pick_and_measure_at_once():
    stats = RoutingStats([0], 64, 6)
    for i in range(20):
        stats.update(routed(torch.rand(1, 1, 40, 64).topk(6).indices, sources=[f"s{i}"], n_experts=64))
    result = stats.result()
    apart = result.picked_and_measured_apart()
    assert apart is not None
    assert float(result.specialisation.max()) > 1.2 * result.baseline
    assert float(apart[0]) == pytest.approx(result.baseline, abs=0.02)


def test_exported_routing_is_counted_like_any_other():
    indices = torch.rand(9, 2, EXPERTS).topk(TOP_K).indices  # [tokens, layers, top_k], as inference engines write it
    batch = RoutedBatch(routing=Routing.from_arrays(indices.numpy(), torch.rand(9, 2, TOP_K).numpy(), EXPERTS))
    result = RoutingStats([0, 1], EXPERTS, TOP_K).update(batch).result()
    for layer in range(2):
        expected = torch.bincount(indices[:, layer].flatten(), minlength=EXPERTS)
        assert torch.equal(result.assignments[0, layer], expected)
    with pytest.raises(InputError, match="layer 1 is zero throughout"):
        Routing.from_arrays(torch.cat([indices[:, :1], 0 * indices[:, 1:]], 1), torch.rand(9, 2, TOP_K), EXPERTS)


def test_what_does_not_fit_is_refused():
    stats = RoutingStats(LAYERS, EXPERTS, TOP_K)
    with pytest.raises(InputError, match="no tokens"):
        stats.result()
    indices = torch.rand(1, 1, 3, EXPERTS).topk(TOP_K).indices
    with pytest.raises(InputError, match=r"'layers': \[0\].*expected .*'layers': \[1, 3\]"):
        stats.update(routed(indices, n_experts=EXPERTS))
    with pytest.raises(InputError, match="from 5 to 5; expected ids from 0 to 4"):
        routed(torch.full((2, 1, 3, 2), 5), n_experts=EXPERTS)
    with pytest.raises(InputError, match="from -1 to -1; .*every token needs as many here"):
        routed(torch.full((2, 1, 3, 2), -1), n_experts=EXPERTS)
    with pytest.raises(InputError, match="2 sources for a batch of 1 rows"):
        routed(indices, sources=["a", "b"], n_experts=EXPERTS)
    counted = RoutingStats(LAYERS, EXPERTS, TOP_K).update(random_batch(torch.Generator().manual_seed(0))).result()
    for share in (50, -0.1, math.nan):
        with pytest.raises(InputError, match="share is .*; expected a number from 0 to 1"):
            counted.experts_covering(share)
    for layer, expert in ((0, 1), (1, EXPERTS)):
        with pytest.raises(
            InputError, match=rf"no counts of expert {expert} of layer {layer}; .* layers \[1, 3\], with"
        ):
            counted.interval(layer, expert)
    with pytest.raises(InputError, match=r"tokens has shape \(1, 4\); the routing is of \(1, 3\)"):
        routed(indices, n_experts=EXPERTS, tokens=torch.zeros(1, 4, dtype=torch.long))


def test_frame_has_a_row_per_layer_and_expert(tmp_path):
    generator = torch.Generator().manual_seed(1)
    result = seen(*(random_batch(generator) for _ in range(3))).result()
    frame: Any = result.to_frame()
    assert len(frame) == 10
    assert set(frame["layer"]) == {1, 3}
    assert set(frame["tokens"]) == {result.n_tokens}
    assert frame["share"].to_numpy() == pytest.approx(result.specialisation.flatten().numpy(), abs=1e-15)
    assert (frame.groupby("layer")["top1"].sum() == result.n_tokens).all()
    result.save(tmp_path / "routing.safetensors")
    again = RoutingResult.load(tmp_path / "routing.safetensors")
    assert again.layers == result.layers and again.sources == result.sources and again.top_k == TOP_K
    assert again.to_frame().equals(frame)
