"""Vocabulary counts against plain loops; information about the domain beyond the token; routing that means nothing."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.errors import InputError
from moe_lens.stats import (
    PairStats,
    RoutedBatch,
    RoutingStats,
    VocabularyResult,
    VocabularyStats,
    conditional_information,
    token_unigram_routing,
    uniform_routing,
)
from moe_lens.stats.information_given_token import _units
from moe_lens.stats.null_routing import systematic_sample
from tests.stats.routed import random_batch, routed

LAYERS, EXPERTS, TOP_K, VOCABULARY = (1, 3), 5, 2, 7


@pytest.mark.parametrize("by", ["input", "next", "predicted"])
@settings(max_examples=8)
@given(seed=st.integers(0, 10**6))
def test_counts_equal_a_plain_loop(by, seed):
    generator = torch.Generator().manual_seed(seed)
    stats = VocabularyStats(LAYERS, EXPERTS, TOP_K, VOCABULARY, by=by)
    counts = np.zeros((2, 2, VOCABULARY, EXPERTS), int)
    total = 0
    for _ in range(3):
        batch = random_batch(generator, width=5)
        stats.update(batch)
        assert batch.tokens is not None and batch.predicted is not None
        for row, pos in batch.mask.nonzero().tolist():
            if by == "next" and pos == 4:
                continue  # nothing follows the last token of a row
            token = {"input": batch.tokens[row, pos], "predicted": batch.predicted[row, pos]}.get(by)
            token = int(batch.tokens[row, pos + 1] if token is None else token)
            total += 1
            for i in range(2):
                chosen = batch.routing.indices[i, row, pos].tolist()
                counts[0, i, token, chosen] += 1
                counts[1, i, token, chosen[0]] += 1
    if not total:
        return
    result = stats.result()
    assert result.n_tokens == total
    for i, layer in enumerate(LAYERS):
        tokens, table = result.table(layer)
        occurred = counts[1, i].sum(-1)
        assert tokens.tolist() == occurred.nonzero()[0].tolist()
        assert table.numpy().tolist() == counts[:, i, occurred > 0].tolist()
        kept = occurred >= 2
        if kept.any():
            summary: Any = result.per_layer(at_least=2).set_index("layer").loc[layer]
            for j, name in enumerate(("specialisation", "specialisation_top1")):
                expected = (counts[j, i, kept].max(-1) / occurred[kept] * occurred[kept]).sum() / occurred[kept].sum()
                assert summary[name] == pytest.approx(expected, abs=1e-12)
            joint = counts[0, i, kept] / counts[0, i, kept].sum()
            with np.errstate(divide="ignore", invalid="ignore"):
                terms = joint * np.log(joint / (joint.sum(0) * joint.sum(1, keepdims=True)))
            assert summary["information"] == pytest.approx(np.where(joint > 0, terms, 0).sum(), abs=1e-12)
    frame: Any = result.to_frame()
    assert frame.groupby(["layer", "token"])["specialisation"].sum().to_numpy() == pytest.approx(TOP_K)
    assert frame.groupby(["layer", "token"])["specialisation_top1"].sum().to_numpy() == pytest.approx(1)


def test_the_token_after_the_last_real_one_is_not_padding():
    batch = random_batch(torch.Generator().manual_seed(0), rows=1, width=3)
    mask = torch.tensor([[True, True, False]])
    routing = type(batch.routing)(**{**vars(batch.routing), "mask": mask})
    padded = RoutedBatch(routing=routing, tokens=torch.tensor([[3, 4, 6]]))
    result = VocabularyStats(LAYERS, EXPERTS, TOP_K, VOCABULARY, by="next").update(padded).result()
    assert result.table(1)[0].tolist() == [4]


def texts(generator: torch.Generator, name: str, shift: int, *, sources: int = 12) -> list[RoutedBatch]:
    """Experts follow the token; `shift` is how much the domain changes that. Domains differ in their tokens."""
    made = []
    for i in range(sources):
        weights = torch.arange(1.0, VOCABULARY + 1) if name == "a" else torch.arange(VOCABULARY, 0, -1.0)
        tokens = weights.multinomial(60, replacement=True, generator=generator)[None]
        logits = torch.nn.functional.one_hot((tokens + shift) % EXPERTS, EXPERTS) * 2.0
        logits = logits + torch.randn(len(LAYERS), 1, 60, EXPERTS, generator=generator)
        logits = logits + 0.7 * torch.randn(len(LAYERS), 1, 1, EXPERTS, generator=generator)  # a source's own taste
        indices = logits.topk(TOP_K).indices
        made.append(routed(indices, sources=[f"{name}{i}"], n_experts=EXPERTS, layers=LAYERS, tokens=tokens))
    return made


def counted(batches: list[RoutedBatch], groups: int = 12) -> VocabularyResult:
    stats = VocabularyStats(LAYERS, EXPERTS, TOP_K, VOCABULARY, groups=groups)
    for batch in batches:
        stats.update(batch)
    return stats.result()


def plain_information(results: list[VocabularyResult], layer: int) -> float:
    tables = np.zeros((len(results), VOCABULARY, EXPERTS))
    for d, result in enumerate(results):
        tokens, table = result.table(layer)
        tables[d, tokens] = table[0].numpy()
    p = tables / tables.sum((1, 2), keepdims=True) / len(results)
    value = 0.0
    for x in range(VOCABULARY):
        joint = p[:, x]
        if joint.sum():
            with np.errstate(divide="ignore", invalid="ignore"):
                terms = joint * np.log(joint * joint.sum() / (joint.sum(0) * joint.sum(1, keepdims=True)))
            value += np.where(joint > 0, terms, 0).sum()
    return value


def test_information_beyond_the_token():
    generator = torch.Generator().manual_seed(0)
    alike = [counted(texts(generator, name, 0)) for name in "ab"]
    found = conditional_information(dict(zip("ab", alike, strict=True)), permutations=60)
    other = counted(texts(generator, "b", 1))
    planted = conditional_information({"a": alike[0], "b": other}, permutations=60)
    for i, layer in enumerate(LAYERS):
        assert float(found.information[i]) == pytest.approx(plain_information(alike, layer), abs=1e-12)
    assert float(planted.information[0]) == pytest.approx(plain_information([alike[0], other], LAYERS[0]), abs=1e-12)
    # Nothing beyond the token: no more than the null gives now and then; experts that depend on the domain stand out.
    assert (found.p_values > 0.05).all() and (planted.p_values == 1 / 61).all()
    assert (planted.information > 3 * planted.null).all()
    assert found.shared == 1.0
    assert list(found.to_frame()["layer"]) == list(LAYERS)


def test_conditional_information_is_calibrated():
    generator = torch.Generator().manual_seed(5)
    p_values, excess = [], []
    for _ in range(25):
        results = {name: counted(texts(generator, name, 0)) for name in "ab"}
        found = conditional_information(results, permutations=39)
        p_values.append(float(found.p_values[0]))
        excess.append(float((found.information - found.null)[0]))
    assert abs(np.mean(excess)) < 3 * np.std(excess) / 25**0.5
    # 25 draws of a uniform share: half of them are 12.5 ± 2.5
    assert 5 <= sum(p <= 0.5 for p in p_values) <= 20 and sum(p <= 0.1 for p in p_values) <= 8


@pytest.mark.slow
def test_domains_may_differ_in_how_much_text_there_is():
    generator = torch.Generator().manual_seed(7)
    p_values: dict[str, list[float]] = {"scaled": [], "plain": []}
    nulls, information = {"scaled": 0.0, "plain": 0.0}, 0.0
    for i in range(40):
        results = {
            name: counted([cut(batch, length) for batch in texts(generator, name, 0)])
            for name, length in (("a", 6), ("b", 60))
        }
        found = conditional_information(results, permutations=39, seed=i)
        observed = float(found.information[0])
        information += observed
        p_values["scaled"].append(float(found.p_values[0]))
        nulls["scaled"] += float(found.null[0])
        # the counts themselves dealt to others' places: a domain then has more text than it has, or less
        units = _units(list(results.values()), LAYERS[0])
        plain = [float(units.information(units.counts[units.permuted(generator)])) for _ in range(39)]
        p_values["plain"].append((1 + sum(value >= observed for value in plain)) / 40)
        nulls["plain"] += sum(plain) / 39
    found_at = {name: sum(p <= 0.05 for p in values) for name, values in p_values.items()}
    excess = {name: (information - null) / information for name, null in nulls.items()}
    # 40 draws of a uniform share: a twentieth is 2 ± 1.4
    assert found_at["scaled"] <= 5 < found_at["plain"]
    assert abs(excess["scaled"]) < 0.15 < 0.25 < excess["plain"]


def cut(batch: RoutedBatch, length: int) -> RoutedBatch:
    return replace(batch, counted=torch.arange(batch.mask.shape[1])[None] < length)


def test_tokens_of_one_domain_say_nothing():
    first = [
        routed(torch.tensor([[[[0, 1]] * 4]] * 2), n_experts=EXPERTS, layers=LAYERS, tokens=torch.ones(1, 4).long())
    ]
    second = [
        routed(torch.tensor([[[[2, 3]] * 4]] * 2), n_experts=EXPERTS, layers=LAYERS, tokens=torch.zeros(1, 4).long())
    ]
    found = conditional_information({"a": counted(first), "b": counted(second)}, permutations=5)
    assert found.information.tolist() == [0, 0] and found.shared == 0
    with pytest.raises(InputError, match="one group"):
        conditional_information({"a": counted(first, 1), "b": counted(second, 1)})
    with pytest.raises(InputError, match="in different ways"):
        conditional_information({"a": counted(first, 2), "b": counted(second, 3)})


@pytest.mark.typed
def test_uniform_routing_keeps_everything_but_the_names():
    batch = random_batch(torch.Generator().manual_seed(1), rows=2, width=2000)
    null = uniform_routing(batch, torch.Generator().manual_seed(2))
    assert torch.equal(null.routing.weights, batch.routing.weights)
    assert torch.allclose(null.routing.margin(), batch.routing.margin())
    assert null.routing.logits is not None and batch.routing.logits is not None
    assert torch.equal(null.routing.logits.sort().values, batch.routing.logits.sort().values)
    assert torch.equal(null.routing.logits.topk(TOP_K).indices, null.routing.indices)
    before = RoutingStats(LAYERS, EXPERTS, TOP_K).update(batch).result()
    after = RoutingStats(LAYERS, EXPERTS, TOP_K).update(null).result()
    assert torch.equal(before.measured, after.measured) and torch.allclose(before.sums, after.sums, rtol=1e-5)
    assert torch.allclose(
        after.specialisation, torch.full((2, EXPERTS), TOP_K / EXPERTS, dtype=torch.float64), atol=0.05
    )


def test_systematic_sampling_has_exact_frequencies():
    generator = torch.Generator().manual_seed(0)
    share = torch.tensor([1.0, 0.7, 0.25, 0.05, 0.0], dtype=torch.float64)
    drawn = systematic_sample(share.expand(40_000, 5), 2, generator)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    found = torch.bincount(drawn.flatten(), minlength=5) / 40_000
    assert found[0] == 1 and found[4] == 0
    assert torch.allclose(found.double(), share, atol=0.01)  # standard error 0.0023


@pytest.mark.typed
def test_token_unigram_routing_knows_the_token_and_nothing_else():
    generator = torch.Generator().manual_seed(3)
    batches = texts(generator, "a", 0, sources=40) + texts(generator, "b", 1, sources=40)
    together = counted(batches)
    nulls = [token_unigram_routing(batch, together, generator) for batch in batches]
    again = counted(nulls)
    for layer in LAYERS:
        tokens, table = together.table(layer)
        assert torch.equal(tokens, again.table(layer)[0])
        share, drawn = (t[0] / t[1].sum(-1, keepdim=True) for t in (table, again.table(layer)[1]))
        assert torch.allclose(share, drawn, atol=0.1)
        first, drawn = (t[1] / t[1].sum(-1, keepdim=True) for t in (table, again.table(layer)[1]))
        assert torch.allclose(first, drawn, atol=0.15)
    # By construction nothing is left beyond the token, where the real routing has much; and domains still differ.
    found = {n: counted([b for b in nulls if b.sources[0].startswith(n)]) for n in "ab"}
    real = {n: counted([b for b in batches if b.sources[0].startswith(n)]) for n in "ab"}
    assert (conditional_information(found, permutations=40).p_values > 0.05).all()
    assert (conditional_information(real, permutations=40).p_values < 0.05).all()
    # Neighbours: planted persistence is gone.
    stats = PairStats(LAYERS, EXPERTS, TOP_K)
    for batch in nulls:
        stats.update(batch)
    table: Any = stats.result().persistence()
    assert table["value"].to_numpy() == pytest.approx(table["expected"].to_numpy(), abs=0.03)
    with pytest.raises(InputError, match="token 6 does not occur"):
        other = routed(torch.tensor([[[[0, 1]]]] * 2), n_experts=EXPERTS, layers=LAYERS, tokens=torch.tensor([[6]]))
        small = routed(torch.tensor([[[[0, 1]]]] * 2), n_experts=EXPERTS, layers=LAYERS, tokens=torch.tensor([[2]]))
        token_unigram_routing(other, counted([small]), generator)


@pytest.mark.untyped
def test_what_does_not_fit_is_refused():
    batch = random_batch(torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="by is .x."):
        VocabularyStats(LAYERS, EXPERTS, TOP_K, VOCABULARY, by="x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="tokens from .* expected ids from 0 to 0"):
        VocabularyStats(LAYERS, EXPERTS, TOP_K, 1).update(batch)
    with pytest.raises(InputError, match="predicted=True"):
        none = RoutedBatch(routing=batch.routing, tokens=batch.tokens)
        VocabularyStats(LAYERS, EXPERTS, TOP_K, VOCABULARY, by="predicted").update(none)
    with pytest.raises(InputError, match="tokens="):
        VocabularyStats(LAYERS, EXPERTS, TOP_K, VOCABULARY).update(RoutedBatch(routing=batch.routing))
