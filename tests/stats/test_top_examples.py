"""The strongest contexts: those that sorting everything would find, in whatever order they come."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.errors import InputError
from moe_lens.stats import TopExamples, TopExamplesResult
from moe_lens.stats.top_rows import TopRows, row_keys
from tests.stats.routed import random_batch

TARGETS, N = 3, 4


def part(seed: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 6, (3, 5, TARGETS), generator=generator).float()  # many ties
    scores[torch.rand(scores.shape, generator=generator) < 0.2] = -torch.inf
    scores[torch.rand(scores.shape, generator=generator) < 0.1] = torch.nan
    tokens = torch.randint(50, (3, 5), generator=generator)
    counted = torch.rand(3, 5, generator=generator) < 0.7
    return scores, tokens, counted, [f"s{seed}{i}" for i in range(3)]


def rows(result: TopExamplesResult) -> list[tuple[Any, ...]]:
    values = (result.target, result.score, result.tokens, result.position)
    return list(zip(*(value.tolist() for value in values), result.source, strict=True))


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.permutations(range(5)), st.integers(0, 5))
def test_any_order_and_grouping_keeps_what_sorting_everything_would(seed, order, cut):
    parts = [part(seed + i) for i in range(5)]
    make = lambda: TopExamples(TARGETS, N, before=2, after=1)  # noqa: E731
    whole, left, right = make(), make(), make()
    for i in range(5):
        whole.update(*parts[i])
    for place, i in enumerate(order):
        (left if place < cut else right).update(*parts[i])
    assert rows(right.merge(left).result()) == rows(whole.result())
    found = rows(whole.result())
    for target in range(TARGETS):
        every = []
        for scores, _, counted, _ in parts:
            for row, pos in counted.nonzero().tolist():
                if scores[row, pos, target] > -torch.inf:
                    every.append(float(scores[row, pos, target]))
        kept = [row for row in found if row[0] == target]
        assert [row[1] for row in kept] == sorted(every, reverse=True)[:N]
        for _, score, context, position, source in kept:  # and each is what it says it is
            scores, tokens, counted, _ = parts[int(source[1:-1]) - seed]
            row = int(source[-1])
            assert float(scores[row, position, target]) == score
            for i, token in enumerate(context):
                at = position - 2 + i
                shown = 0 <= at < 5 and (bool(counted[row, at]) or at == position)
                assert token == (int(tokens[row, at]) if shown else -1)


def test_an_experts_strongest_tokens():
    batch = random_batch(torch.Generator().manual_seed(0), rows=3, width=6)
    result = TopExamples(5, 2, before=1, after=0).update_routing(batch, 3).result()
    weights = batch.routing.layer(3).dense_weights().masked_fill(~batch.mask[..., None], 0)
    for expert in range(5):
        best = weights[..., expert].flatten().sort(descending=True).values[:2]
        assert result.of(expert).score.tolist() == pytest.approx(best[best > 0].tolist(), abs=1e-7)
    frame: Any = result.to_frame()
    assert list(frame["rank"][frame["target"] == 1]) == list(range((frame["target"] == 1).sum()))


def test_row_keys_are_spread():
    keys = row_keys(torch.arange(2000)[:, None].expand(2000, 3))
    assert len(keys.unique()) == 2000
    assert abs(float((keys > 0).double().mean()) - 0.5) < 0.05
    assert abs(float(((keys >> 7) & 1).double().mean()) - 0.5) < 0.05
    assert not torch.equal(row_keys(torch.tensor([[1, 2]])), row_keys(torch.tensor([[2, 1]])))


def test_names_of_sources_that_are_no_longer_kept_are_forgotten():
    best = TopRows(1, 1)
    for i in range(50):
        best.add(torch.tensor([0]), torch.tensor([float(i)]), torch.tensor([[i]]), [f"s{i}"])
    assert best.names() == ("s49",)
    assert len(best._names) == 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="scores of 3 targets; expected 2"):
        TopExamples(2).update(*part(0))
    with pytest.raises(InputError, match="n is 0; expected a whole number from 1"):
        TopExamples(2, 0)
    with pytest.raises(InputError, match="no tokens"):
        TopExamples(2).result()


@pytest.mark.typed
def test_what_is_shown_of_a_context_goes_with_its_tokens():
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(2, 5, 3, generator=generator)
    tokens = torch.arange(10).view(2, 5)
    counted = torch.ones(2, 5, dtype=torch.bool)
    counted[1, 4] = False
    shown = tokens[..., None] * 10.0 + torch.arange(3) + 0.25
    examples = TopExamples(3, 4, before=2, after=1, shows=True)
    examples.update(scores, tokens, counted, ["a", "b"], shown=shown)
    again = TopExamples(3, 4, before=2, after=1, shows=True).load_state_dict(examples.state_dict()).result()
    assert again.shown is not None
    inside = again.tokens >= 0
    assert not inside.all() and torch.equal(again.shown.isnan(), ~inside)
    expected = again.tokens * 10.0 + again.target[:, None] + 0.25
    assert torch.equal(again.shown[inside], expected.float()[inside])
    one = again.of(1)
    assert one.shown is not None and torch.equal(one.shown.nan_to_num(), again.shown[again.target == 1].nan_to_num())
    with pytest.raises(InputError, match="shows is True, and this update is not told what to show"):
        examples.update(scores, tokens, counted, ["a", "b"])
