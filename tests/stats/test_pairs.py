"""Pairs of experts against plain loops; independent choices show nothing, planted ones are found."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.stats import PairResult, PairStats
from tests.stats.routed import random_batch, routed

LAYERS, EXPERTS, TOP_K = (1, 3), 5, 2


@given(st.integers(0, 10**6))
def test_counts_equal_a_plain_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [random_batch(generator) for _ in range(3)]
    stats = PairStats(LAYERS, EXPERTS, TOP_K)
    together, onwards = torch.zeros(2, EXPERTS, EXPERTS).long(), torch.zeros(1, EXPERTS, EXPERTS).long()
    kept: dict[str, list[list[int]]] = {}
    neighbours: dict[str, int] = {}
    left, right = torch.zeros(2, 2, EXPERTS).long(), torch.zeros(2, 2, EXPERTS).long()
    for batch in parts:
        stats.update(batch)
        for row, source in enumerate(batch.sources):
            if batch.mask[row].any():
                kept.setdefault(source, [[0, 0], [0, 0]])
                neighbours.setdefault(source, 0)
            for pos in batch.mask[row].nonzero()[:, 0].tolist():
                sets = [batch.routing.indices[i, row, pos].tolist() for i in range(2)]
                for i in range(2):
                    for a in sets[i]:
                        for b in sets[i]:
                            together[i, a, b] += 1
                for a in sets[0]:
                    for b in sets[1]:
                        onwards[0, a, b] += 1
                if pos + 1 < batch.mask.shape[1] and batch.mask[row, pos + 1]:
                    neighbours[source] += 1
                    for i in range(2):
                        after = batch.routing.indices[i, row, pos + 1].tolist()
                        kept[source][i][0] += len(set(sets[i]) & set(after))
                        kept[source][i][1] += sets[i][0] == after[0]
                        left[i, 0, sets[i]] += 1
                        left[i, 1, sets[i][0]] += 1
                        right[i, 0, after] += 1
                        right[i, 1, after[0]] += 1
    result = stats.result()
    assert torch.equal(result.together, together) and torch.equal(result.onwards, onwards)
    assert result.sources == tuple(sorted(kept))
    assert result.kept.tolist() == [kept[source] for source in result.sources]
    assert result.neighbours.tolist() == [neighbours[source] for source in result.sources]
    assert torch.equal(result.left, left) and torch.equal(result.right, right)


def counted(indices: torch.Tensor, n_experts: int, sources: list[str]) -> PairResult:
    layers, top_k = range(len(indices)), indices.shape[-1]
    return PairStats(layers, n_experts, top_k).update(routed(indices, sources=sources, n_experts=n_experts)).result()


def test_independent_choices_show_nothing():
    indices = torch.rand(2, 12, 2000, 8).topk(3).indices
    result = counted(indices, 8, [f"s{i}" for i in range(12)])
    assert torch.allclose(result.transition.sum(-1), torch.full((1, 8), 3.0, dtype=torch.float64))
    assert torch.allclose(result.transition_lift, torch.ones(1, 8, 8, dtype=torch.float64), atol=0.05)
    off = ~torch.eye(8, dtype=torch.bool)
    lift = torch.full((2, 56), 2 * 8 / (3 * 7), dtype=torch.float64)  # (k − 1) E / (k (E − 1))
    assert torch.allclose(result.coactivation_lift[:, off], lift, atol=0.05)
    table: Any = result.persistence()
    assert ((table["low"] < table["expected"]) & (table["expected"] < table["high"])).all()
    assert table["value"].to_numpy() == pytest.approx(table["expected"].to_numpy(), abs=0.01)
    assert table[table["measure"] == "top1"]["expected"].to_numpy() == pytest.approx(1 / 8, abs=0.01)
    assert table[table["measure"] == "overlap"]["expected"].to_numpy() == pytest.approx(3 / 8, abs=0.01)


def test_planted_pairs_transitions_and_persistence_are_found():
    first = torch.randint(4, (12, 50)).repeat_interleave(10, 1)  # ten tokens on end choose alike
    pair = torch.stack([first, first + 4], -1)  # e always with e + 4
    indices = torch.stack([pair, (pair + 1) % 8])  # and the next layer chooses the neighbours
    result = counted(indices, 8, [f"s{i}" for i in range(12)])
    assert torch.equal(result.coactivation, torch.eye(8).double().expand(2, 8, 8) + torch.eye(8).roll(4, 0).double())
    share = result.transition[0]
    for expert in range(8):
        assert share[expert, (expert + 1) % 8] == share[expert, (expert + 5) % 8] == 1
    table: Any = result.persistence()
    assert list(table.columns)[2:5] == ["value", "low", "high"], "an interval stands behind its number"
    assert (table["low"] > table["expected"] + 0.4).all()
    frame: Any = result.to_frame()
    assert len(frame) == 2 * 28 + 64
    best = frame[frame["kind"] == "coactivation"].nlargest(8, "lift")
    assert (best["other"] - best["expert"] == 4).all()


def test_rows_and_padding_part_tokens():
    # Two rows of the same expert: no pair reaches from one row to the next, nor across a token that does not count.
    indices = torch.zeros(1, 2, 3, 1, dtype=torch.long)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    result = PairStats([0], 2, 1).update(routed(indices, mask, ["a", "b"], n_experts=2)).result()
    assert result.neighbours.tolist() == [0, 1]
    assert result.n_tokens == 4
