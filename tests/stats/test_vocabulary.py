"""Vocabulary counts against plain loops; information about the domain beyond the token; routing that means nothing."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.calibrate_given_token import SCENARIOS, Scenario, draw
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
from moe_lens.stats.conditional_distance import PairOfDomains, Units
from moe_lens.stats.null_routing import systematic_sample
from tests.stats.routed import random_batch, routed

F64 = 1e-12
"""Both sides are float64 and of size 1: sums of up to some thousand terms in another order, each rounded by 1e-16."""

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
                assert summary[name] == pytest.approx(expected, abs=F64)
            joint = counts[0, i, kept] / counts[0, i, kept].sum()
            with np.errstate(divide="ignore", invalid="ignore"):
                terms = joint * np.log(joint / (joint.sum(0) * joint.sum(1, keepdims=True)))
            assert summary["information"] == pytest.approx(np.where(joint > 0, terms, 0).sum(), abs=F64)
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


def counted(batches: list[RoutedBatch], groups: int = 64) -> VocabularyResult:
    stats = VocabularyStats(LAYERS, EXPERTS, TOP_K, VOCABULARY, groups=groups)
    for batch in batches:
        stats.update(batch)
    return stats.result()


def named(batches: list[RoutedBatch], name: str) -> list[RoutedBatch]:
    return [replace(batch, sources=(name.format(i),)) for i, batch in enumerate(batches)]


@pytest.mark.parametrize("name", ["{:02d}.txt", "book{}.txt", "{}"])
def test_sources_are_as_many_as_there_are_whatever_they_are_called(name):
    """Numbered names are alike; a checksum puts ten of them into six of 64 places."""
    generator = torch.Generator().manual_seed(3)
    of = {domain: texts(generator, domain, shift, sources=10) for domain, shift in (("a", 0), ("b", 1))}
    plain, found = (
        conditional_information({domain: counted(make(batches)) for domain, batches in of.items()}, permutations=200)
        for make in (list, partial(named, name=name))
    )
    assert found.n_sources == plain.n_sources == (10, 10)
    for what in ("excess", "low", "high", "shared"):
        torch.testing.assert_close(getattr(found, what), getattr(plain, what), atol=F64, rtol=0, equal_nan=True)
    assert not found.low.isnan().any(), "intervals, of ten sources"


@pytest.mark.typed
def test_more_sources_than_groups_are_folded_onto_them_however_they_came():
    """Merged parts, of which some had too many sources and some had not, are the whole."""
    batches = named(texts(torch.Generator().manual_seed(4), "a", 0, sources=9), "{}.txt")
    whole = counted(batches, groups=4)
    group = whole.cells()[0]
    assert 1 < len(group.unique()) <= 4 and int(group.max()) < 4
    for parts in (batches[:2], batches[2:]), (batches[:7], batches[7:]), (batches[4:], batches[:4]):
        first, second = (VocabularyStats(LAYERS, EXPERTS, TOP_K, VOCABULARY, groups=4) for _ in parts)
        for stats, some in ((first, parts[0]), (second, parts[1])):
            for batch in some:
                stats.update(batch)
        merged = first.merge(second).result()
        assert torch.equal(merged.keys, whole.keys) and torch.equal(merged.assigned, whole.assigned)
        assert torch.equal(merged.top1, whole.top1)
    every: dict[str, Any] = {"sources": [batch.sources[0] for batch in batches], "n_experts": EXPERTS, "layers": LAYERS}
    every["tokens"] = torch.cat([batch.require_tokens() for batch in batches])
    at_once = routed(torch.cat([batch.routing.indices for batch in batches], 1), **every)
    folded, own = (VocabularyStats(LAYERS, EXPERTS, TOP_K, VOCABULARY, groups=8) for _ in range(2))
    keys = folded.update(at_once).result().keys  # nine sources at once, which leave some of the eight groups empty
    assert torch.equal(folded.merge(own.update(batches[0])).result().keys, keys), "also of the one that came by itself"
    alone = counted(batches, groups=1)
    assert torch.equal(alone.keys, whole.keys.remainder(VOCABULARY * len(LAYERS) * EXPERTS).unique())
    few = counted(batches[:4], groups=4)
    assert few.cells()[0].unique().tolist() == [0, 1, 2, 3], "a control: they fit"


def test_distance_given_the_token_against_plain_loops():
    """The distance, what it is without a source, and what signs make of it, pair of sources by pair of sources."""
    generator = torch.Generator().manual_seed(3)
    results = [counted(texts(generator, name, shift, sources=4)) for name, shift in (("a", 0), ("b", 1))]
    units = Units.of(results)
    pair = PairOfDomains.of(units, 0, 1)
    signs = np.sign(np.random.default_rng(0).normal(size=(3, units.n_sources)))
    found, without, null = pair.measure(units.counts(1), signs)
    c = np.zeros((units.n_sources, VOCABULARY, EXPERTS))
    for unit, expert, count in zip(*units.cells[1], strict=True):
        c[units.source[unit], units.token[unit], expert] = count
    second = units.domain_of.numpy()
    every = np.ones(units.n_sources)
    n = c.sum(-1, keepdims=True) / TOP_K
    share = np.nanmean(np.where(n, c / np.maximum(n, 1), np.nan), 0)  # of the token: what residuals are taken from
    assert found == pytest.approx(plain_distance(c, second, share, every), abs=F64)
    for source in range(units.n_sources):
        left = every * (np.arange(units.n_sources) != source)
        assert without[source] == pytest.approx(plain_distance(c, second, share, left), abs=F64)
    for row, value in zip(signs, null, strict=True):
        assert value == pytest.approx(plain_distance(c, second, share, every, row), abs=F64)
    assert abs(null[0] - null[1]) > 1e-3  # signs do something


def plain_distance(c, second, share, kept, signs=None) -> float:
    """Of counts [source, token, expert]; with signs, of residuals that are corrected for leverage."""
    n = c.sum(-1) / TOP_K
    above = below = 0.0
    for x in range(VOCABULARY):
        sources = [s for s in range(len(c)) if n[s, x]]
        held, shares = len(sources), [c[s, x] / n[s, x] for s in sources]
        of_mean = np.var(shares, axis=0, ddof=1).sum() / held
        # of a share: E ‖c_s / n_s − p‖² is its variance (1 − 2 / S) and that of p
        own = {
            s: (np.square(one - share[x]).sum() - of_mean) / (1 - 2 / held)
            for s, one in zip(sources, shares, strict=True)
        }
        n_x, p = n[:, x] * kept, share[x]
        sums = [n_x[second == d].sum() for d in (0, 1)]
        pairs = [sums[d] ** 2 - (n_x[second == d] ** 2).sum() for d in (0, 1)]
        if min(pairs) < 0.5:
            continue
        weight, value = 2 * sums[0] * sums[1] / sum(sums), 0.0
        for s in range(len(c)):
            for t in range(len(c)):
                if s != t and n_x[s] and n_x[t]:
                    product = (c[s, x] - n_x[s] * p) @ (c[t, x] - n_x[t] * p)
                    product += n_x[s] * n_x[t] * ((own[s] + own[t]) / held - of_mean)
                    if signs is not None:
                        product *= signs[s] * signs[t] / (1 - 1 / held)
                    value += product / (pairs[second[s]] if second[s] == second[t] else -sums[0] * sums[1])
        above, below = above + weight * value, below + weight
    return above / below


def test_nothing_is_found_beyond_the_token_where_there_is_nothing():
    """Sources with tastes of their own, domains with other tokens, and a vocabulary whose tokens are mostly rare."""
    p_values, excess, plain = [], [], []
    for i in range(20):
        results = draw(np.random.default_rng(i), 300, 10, SCENARIOS["unigram + sources"])
        found = conditional_information(dict(zip("ab", results, strict=True)), permutations=99, seed=i)
        p_values.append(float(found.p_values[0]))
        excess.append(float(found.excess[0]))
        tables = [result.table(1) for result in results]
        both = np.intersect1d(tables[0][0].numpy(), tables[1][0].numpy())
        n, shares = zip(*(per_token(*table, both) for table in tables), strict=True)
        weight = 2 * n[0] * n[1] / (n[0] + n[1])
        plain.append((weight * np.square(shares[0] - shares[1]).sum(1)).sum() / weight.sum())
    # 20 draws of a uniform share: a twentieth is 1 ± 1, a half 10 ± 2.2
    assert sum(p <= 0.05 for p in p_values) <= 4 and 4 <= sum(p <= 0.5 for p in p_values) <= 16
    error = np.std(excess) / len(excess) ** 0.5
    assert abs(np.mean(excess)) < 3 * error < np.mean(plain) / 2  # shares as they are differ, in whatever is rare


def test_one_long_source_beside_short_ones_is_not_taken_for_its_domain():
    """Were residuals taken from the mean over tokens, which it holds most of, 10 of the first 40 would be found."""
    book = SCENARIOS["book"]
    found = {}
    for how, draws in ((book, 40), (replace(book, domain=0.3), 5)):
        found[how] = 0
        for i in range(draws):
            results = draw(np.random.default_rng(i), 5, 20, how)
            one = conditional_information(dict(zip("ab", results, strict=True)), permutations=39, seed=i)
            found[how] += float(one.p_values[0]) <= 0.05
    nothing, effect = found.values()
    assert nothing <= 5 and effect == 5  # a twentieth of 40 is 2 ± 1.4


def per_token(tokens, table, wanted) -> tuple[np.ndarray, np.ndarray]:
    """How often each of the wanted tokens occurs, and its shares."""
    counts = table[:, torch.isin(tokens, torch.as_tensor(wanted))].double().numpy()
    return counts[1].sum(-1), counts[0] / counts[1].sum(-1, keepdims=True)


def test_what_the_domain_decides_beyond_the_token_is_found():
    effect = Scenario(token=1, source=0.3, domain=0.3, unequal=True)
    results = draw(np.random.default_rng(0), 300, 20, effect)
    two = conditional_information(dict(zip("ab", results, strict=True)), permutations=99)
    assert float(two.p_values[0]) == 0.01 and float(two.low[0]) > 0
    assert list(two.to_frame()["finding"]) == ["depends on the domain"]
    # whose interval has the degrees of freedom that sources have of what they hold of the text that was tested
    tested, sizes = (
        PairOfDomains.of(Units.of(results), 0, 1).tokens,
        [torch.bincount(of.cells()[0], of.top1.double()) for of in results],
    )
    assert (tested <= torch.cat(sizes)).all()
    assert float(tested.sum()) == pytest.approx(float(two.shared) * sum(of.n_tokens for of in results), abs=1e-6)
    # a third domain changes nothing about the first two
    third = draw(np.random.default_rng(9), 300, 20, effect)[0]
    three = conditional_information({**dict(zip("ab", results, strict=True)), "c": third}, permutations=99)
    assert three.pairs == (("a", "b"), ("a", "c"), ("b", "c"))
    for name in ("excess", "low", "high"):
        assert float(getattr(three, f"pair_{name}")[0, 0]) == pytest.approx(float(getattr(two, name)[0]), abs=F64)
    assert float(three.excess[0]) == pytest.approx(float(three.pair_excess[0].mean()), abs=F64)
    assert (three.low < three.excess).all() and (three.excess < three.high).all()
    table: Any = three.per_pair()
    assert (table["p_holm"] >= table["p_value"]).all() and table["smallest_p"].eq(0.01).all()
    # by default there are draws enough for every pair and layer to be found after correction for all
    many = conditional_information({f"{name}{i}": of for i in range(6) for name, of in zip("ab", results, strict=True)})
    assert len(many.pairs) == 66 and many.permutations == 40 * 66 - 1


def test_tokens_of_one_domain_say_nothing():
    def text(token: int, chosen: list[int], source: str) -> RoutedBatch:
        indices = torch.tensor([[[chosen] * 4]] * 2)
        ids = torch.full((1, 4), token)
        return routed(indices, sources=[source], n_experts=EXPERTS, layers=LAYERS, tokens=ids)

    first = [text(1, [0, 1], "s0"), text(1, [0, 1], "s1")]
    second = [text(0, [2, 3], "s0"), text(0, [2, 3], "s1")]
    found = conditional_information({"a": counted(first), "b": counted(second)}, permutations=5)
    assert found.excess.isnan().all() and found.p_values.eq(1).all() and found.shared.tolist() == [0]
    assert set(found.to_frame()["finding"]) == {"cannot be told"}
    # a token that one source alone has cannot be told from the source
    common = [*second, text(1, [2, 3], "s0")]
    assert conditional_information({"a": counted(first), "b": counted(common)}).shared.tolist() == [0]
    common.append(text(1, [2, 3], "s1"))
    tested = conditional_information({"a": counted(first), "b": counted(common)}, permutations=99)
    assert tested.shared.tolist() == [16 / 24] and tested.excess.tolist() == [4, 4]
    assert tested.smallest_p == 1 / 8 and (tested.p_values >= 1 / 8).all()
    assert set(tested.to_frame()["finding"]) == {"not rejected"} and tested.low.isnan().all()
    # signs count of the sources that hold what is tested, of each pair and, of the mean over pairs, of all of them
    alone = text(3, [0, 1], "s2")
    mine, others = counted([*first, alone]), counted([text(1, [2, 3], f"s{i}") for i in range(4)])
    three = {"a": mine, "b": counted(second), "c": others}
    most = conditional_information(three, permutations=999)
    assert most.n_sources == (3, 2, 4) and most.pair_smallest_p.tolist() == [1, 1 / 32, 1]
    assert most.smallest_p == 1 / 32 and most.p_values.ge(1 / 32).all()
    assert most.per_pair()["smallest_p"].tolist() == [1, 1 / 32, 1] * 2
    more = conditional_information({**three, "b": counted(common)}, permutations=999)
    assert more.pair_smallest_p.tolist() == [1 / 8, 1 / 32, 1 / 32] and more.smallest_p == 1 / 128
    assert (more.pair_p_values >= more.pair_smallest_p).all() and more.p_values.ge(1 / 128).all()
    few = conditional_information(three, permutations=9)  # and so many are drawn
    assert few.pair_smallest_p.tolist() == [1, 0.1, 1] and few.smallest_p == 0.1
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
    order, mark = torch.rand(40_000, 6, generator=generator).split([5, 1], -1)
    drawn = systematic_sample(share.expand(40_000, 5), 2, order, mark)
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
