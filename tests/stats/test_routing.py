"""Routing counts: against arrays counted by hand, and whatever the batching."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.errors import InputError
from moe_lens.stats import RoutingStats, bootstrap, halves

LAYERS, EXPERTS, TOP_K = (1, 3), 5, 2


def selected(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, EXPERTS).topk(TOP_K).indices


@st.composite
def batches(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    made = []
    for _ in range(draw(st.integers(1, 4))):
        rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
        indices = torch.rand(2, rows, width, EXPERTS, generator=generator).topk(TOP_K).indices
        counted = torch.rand(rows, width, generator=generator) < 0.7
        counted[0, 0] = True
        made.append((indices, counted, draw(st.lists(st.sampled_from("abc"), min_size=rows, max_size=rows))))
    return made


def test_by_hand():
    # One layer, three tokens of which the last is padding.
    indices = torch.tensor([[[[0, 1], [0, 2], [4, 3]]]])
    counted = torch.tensor([[True, True, False]])
    result = RoutingStats([2], EXPERTS, TOP_K).update(indices, counted, ["a"]).result()
    assert result.n_tokens == 2
    assert result.specialisation.tolist() == [[1.0, 0.5, 0.5, 0.0, 0.0]]
    assert result.baseline == 0.4
    assert result.experts_covering(0.5).tolist() == [1]
    assert result.experts_covering(0.75).tolist() == [2]
    assert result.experts_covering(1.0).tolist() == [3]
    row = result.most_specialised().iloc[0]
    assert (row["layer"], row["expert"], row["share"], row["sources"]) == (2, 0, 1.0, 1)
    assert row["low"] is None and row["picked_apart"] is None


def test_uniform_routing_needs_half_of_the_experts():
    indices = torch.arange(64).view(1, 1, 16, 4)
    result = RoutingStats([0], 64, 4).update(indices, torch.ones(1, 16, dtype=torch.bool), ["a"]).result()
    assert result.experts_covering().tolist() == [32]
    assert torch.allclose(result.specialisation, torch.full((1, 64), result.baseline, dtype=torch.float64))


@given(batches(), st.integers(0, 4))
def test_merging_parts_in_any_order_equals_the_whole(parts, cut):
    whole, left, right = (RoutingStats(LAYERS, EXPERTS, TOP_K) for _ in range(3))
    for i, part in enumerate(parts):
        whole.update(*part)
        (left if i < cut else right).update(*part)
    merged = right.merge(left).result()
    assert merged.sources == whole.result().sources
    assert torch.equal(merged.tokens, whole.result().tokens)
    assert torch.equal(merged.assignments, whole.result().assignments)
    assert not merged.assignments.is_floating_point()


@given(batches())
def test_counts_equal_a_plain_loop(parts):
    stats = RoutingStats(LAYERS, EXPERTS, TOP_K)
    plain: dict[tuple[str, int, int], int] = {}
    tokens: dict[str, int] = {}
    for indices, counted, sources in parts:
        stats.update(indices, counted, sources)
        for row, source in enumerate(sources):
            tokens[source] = tokens.get(source, 0) + int(counted[row].sum())
            for position in counted[row].nonzero()[:, 0].tolist():
                for layer in range(2):
                    for expert in indices[layer, row, position].tolist():
                        plain[source, layer, expert] = plain.get((source, layer, expert), 0) + 1
    result = stats.result()
    assert dict(zip(result.sources, result.tokens.tolist(), strict=True)) == tokens
    for s, source in enumerate(result.sources):
        for layer in range(2):
            for expert in range(EXPERTS):
                assert int(result.assignments[s, layer, expert]) == plain.get((source, layer, expert), 0)
    assert torch.allclose(result.specialisation.sum(-1), torch.full((2,), float(TOP_K), dtype=torch.float64))


@given(batches())
def test_padding_changes_nothing(parts):
    short, padded = RoutingStats(LAYERS, EXPERTS, TOP_K), RoutingStats(LAYERS, EXPERTS, TOP_K)
    for indices, counted, sources in parts:
        short.update(indices, counted, sources)
        wider = torch.cat([indices, selected(2, len(sources), 3)], 2)
        padded.update(wider, torch.nn.functional.pad(counted, (0, 3)), sources)
    assert torch.equal(short.result().assignments, padded.result().assignments)
    assert torch.equal(short.result().tokens, padded.result().tokens)


def test_interval_resamples_sources_and_not_tokens():
    # 20 sources of 50 tokens that always agree within a source: as many independent facts as there are sources.
    stats = RoutingStats([0], 2, 1)
    for source in range(20):
        stats.update(torch.full((1, 1, 50, 1), source % 2), torch.ones(1, 50, dtype=torch.bool), [f"s{source:02d}"])
    result = stats.result()
    interval = result.interval(0, 0)
    assert interval is not None
    width = 2 * 1.96 * 0.5 / 20**0.5
    assert interval.high - interval.low == pytest.approx(width, rel=0.15)
    flat = bootstrap(lambda times: (times @ (torch.arange(1000) % 2).double()) / 1000, 1000)
    assert flat is not None and flat.high - flat.low < 0.2 * width  # what resampling tokens would have claimed


def test_expert_picked_on_one_half_is_measured_on_the_other():
    stats = RoutingStats([0], EXPERTS, TOP_K)
    names = [f"s{i}" for i in range(8)]
    half = halves(names)
    for name in names:  # experts 0, 1 in one half, 2, 3 in the other: what is picked here is never chosen there
        indices = torch.tensor([0, 1] if half[name] == 0 else [2, 3]).view(1, 1, 1, 2)
        stats.update(indices, torch.ones(1, 1, dtype=torch.bool), [name])
    result = stats.result()
    assert result.picked_and_measured_apart() is not None
    assert result.picked_and_measured_apart().tolist() == [0.0]  # pyright: ignore[reportOptionalMemberAccess]
    assert float(result.specialisation.max()) == 0.5


def test_random_routing_looks_specialised_only_to_those_who_pick_and_measure_at_once():
    stats = RoutingStats([0], 64, 6)
    for i in range(20):
        stats.update(torch.rand(1, 1, 40, 64).topk(6).indices, torch.ones(1, 40, dtype=torch.bool), [f"s{i}"])
    result = stats.result()
    apart = result.picked_and_measured_apart()
    assert apart is not None
    assert float(result.specialisation.max()) > 1.2 * result.baseline
    assert float(apart[0]) == pytest.approx(result.baseline, abs=0.02)


def test_what_does_not_fit_is_refused():
    stats = RoutingStats(LAYERS, EXPERTS, TOP_K)
    with pytest.raises(InputError, match="no tokens"):
        stats.result()
    with pytest.raises(InputError, match="1 layers and top-2; expected 2 and top-2"):
        stats.update(selected(1, 1, 3), torch.ones(1, 3, dtype=torch.bool), ["a"])
    with pytest.raises(InputError, match="from 5 to 5; there are 5"):
        stats.update(torch.full((2, 1, 3, 2), 5), torch.ones(1, 3, dtype=torch.bool), ["a"])


def test_frame_has_a_row_per_layer_and_expert():
    result = (
        RoutingStats(LAYERS, EXPERTS, TOP_K).update(selected(2, 3, 4), torch.ones(3, 4).bool(), list("aab")).result()
    )
    frame = result.to_frame()
    assert len(frame) == 10
    assert set(frame["layer"]) == {1, 3}
    assert set(frame["tokens"]) == {12}
    assert frame["share"].to_numpy() == pytest.approx(result.specialisation.flatten().numpy(), abs=1e-15)
