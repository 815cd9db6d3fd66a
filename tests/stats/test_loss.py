"""Losses by source: two ways to average, ratios paired by source."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.errors import InputError
from moe_lens.stats import LossStats

EVERY = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.typed
def test_by_hand():
    losses = torch.tensor([[1.0, 2.0, 3.0], [5.0, torch.nan, torch.inf]])
    counted = torch.tensor([[True, True, True], [True, False, False]])
    result = LossStats().update(losses, counted, ["a", "b"]).result()
    assert result.n_tokens == 4
    assert result.loss == 11 / 4
    assert result.perplexity == pytest.approx(math.exp(11 / 4), rel=1e-12)
    assert result.geometric_perplexity == pytest.approx(math.exp((2 + 5) / 2), rel=1e-12)  # every row counts the same


@given(st.integers(0, 10**6), st.integers(0, 5))
def test_merging_parts_in_any_order_equals_the_whole(seed, cut):
    generator = torch.Generator().manual_seed(seed)
    whole, left, right = LossStats(), LossStats(), LossStats()
    for i in range(5):
        losses = torch.rand(3, 4, generator=generator)
        counted = torch.rand(3, 4, generator=generator) < 0.5
        counted[:, 0] = True
        part = losses, counted, [f"s{j}" for j in torch.randint(4, (3,), generator=generator).tolist()]
        whole.update(*part)
        (left if i < cut else right).update(*part)
    merged, expected = right.merge(left).result(), whole.result()
    assert merged.sources == expected.sources
    assert torch.equal(merged.tokens, expected.tokens) and torch.equal(merged.rows, expected.rows)
    assert torch.allclose(merged.nats, expected.nats, rtol=0, atol=1e-12)
    assert torch.allclose(merged.row_losses, expected.row_losses, rtol=0, atol=1e-12)


def test_ratio_is_paired_by_source():
    # Sources differ wildly in difficulty, and the change is the same in all: the ratio is certain, perplexity is not.
    easy, hard = LossStats(), LossStats()
    for i in range(12):
        losses = torch.full((1, 4), float(i))
        easy.update(losses, torch.ones(1, 4).bool(), [f"s{i}"])
        hard.update(losses + 0.1, torch.ones(1, 4).bool(), [f"s{i}"])
    a, b = easy.result(), hard.result()
    assert b.ratio(a) == pytest.approx(math.exp(0.1), rel=1e-6)
    interval = b.ratio_interval(a)
    assert interval is not None
    assert interval.low == pytest.approx(interval.high, rel=1e-6) == pytest.approx(math.exp(0.1), rel=1e-6)
    alone = b.interval()
    assert alone is not None and alone.high > 5 * alone.low


def test_different_tokens_cannot_be_compared():
    a = LossStats().update(torch.ones(2, 3), EVERY, ["a", "b"]).result()
    b = LossStats().update(torch.ones(2, 3), EVERY, ["a", "c"]).result()
    c = LossStats().update(torch.ones(2, 3), torch.tensor([[True] * 3, [True, False, True]]), ["a", "b"]).result()
    for other in (b, c):
        with pytest.raises(InputError, match="same tokens of the same sources"):
            a.ratio(other)


def test_counted_losses_must_be_finite():
    with pytest.raises(InputError, match="not finite"):
        LossStats().update(torch.tensor([[1.0, torch.nan]]), torch.tensor([[True, True]]), ["a"])
    with pytest.raises(InputError, match="no tokens"):
        LossStats().update(torch.zeros(1, 2), torch.zeros(1, 2).bool(), ["a"]).result()
