"""Telling the domain: found where it is there, from the side where it is, and never through the document."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_lens.errors import InputError
from moe_lens.resampling import folds, units
from moe_lens.stats import PassageResult, PassageSample, predict_domain
from moe_lens.stats.domain_prediction import fit_logistic
from moe_lens.stats.parallel_sources import parallel_key
from tests.stats.routed import routed

EXPERTS, TOP_K, LAYERS, VOCABULARY = 6, 2, (1, 3), 30


def sample(
    generator: torch.Generator, *, tokens: int = 0, routing: float = 0, own: float = 0, sources: int = 12
) -> PassageResult:
    """Texts of a domain: `tokens` shifts its vocabulary, `routing` its experts, `own` is each source's own taste."""
    stats = PassageSample(LAYERS, EXPERTS, TOP_K, length=16, n=100)
    for i in range(sources):
        ids = (torch.randint(10, (1, 70), generator=generator) + tokens) % VOCABULARY
        logits = torch.randn(2, 1, 70, EXPERTS, generator=generator)
        logits[..., 0] += routing
        logits = logits + own * torch.randn(2, 1, 1, EXPERTS, generator=generator)
        counted = torch.ones(1, 70, dtype=torch.bool)
        counted[:, 0] = False  # BOS
        ids[:, 0] = 29
        stats.update(
            routed(logits.topk(TOP_K).indices, counted, [f"s{i}"], n_experts=EXPERTS, layers=LAYERS, tokens=ids)
        )
    return stats.result()


def test_passages_have_equal_lengths_and_no_bos():
    found = sample(torch.Generator().manual_seed(0))
    assert found.tokens.shape == (12 * 4, 16)  # 69 tokens of text are four passages of 16
    assert not (found.tokens == 29).any()
    assert (found.assigned.sum(-1) == 16 * TOP_K).all()
    assert len(found.to_frame()) == 48


@pytest.mark.typed
def test_the_domain_is_found_where_it_is():
    generator = torch.Generator().manual_seed(1)
    by_routing = predict_domain({"a": sample(generator), "b": sample(generator, routing=1.5)})
    by_tokens = predict_domain({"a": sample(generator), "b": sample(generator, tokens=5)})
    nowhere = predict_domain({"a": sample(generator, own=1), "b": sample(generator, own=1)})
    assert by_routing.accuracy("routing") > 0.95 and abs(by_routing.accuracy("unigram") - 0.5) < 0.2
    assert by_tokens.accuracy("unigram") > 0.95 and abs(by_tokens.accuracy("routing") - 0.5) < 0.2
    # Each source has a taste of its own: a classifier that met the source before would do better than chance.
    assert abs(nowhere.accuracy("routing") - 0.5) < 0.25
    for found, low in ((by_routing, 0.2), (by_tokens, -1.0)):
        table: Any = found.to_frame().set_index("from")
        assert table.loc["routing − unigram", "low"] > low
        assert set(table["sources"]) == {24}
    assert by_tokens.interval("routing", "unigram").high < -0.2  # pyright: ignore[reportOptionalMemberAccess]


def test_sources_are_never_on_both_sides():
    # Routing tells the source perfectly and the domain not at all: every source has an expert of its own, which other
    # sources use in either domain.
    generator = torch.Generator().manual_seed(2)
    results = {name: sample(generator, own=6, sources=5) for name in "ab"}
    assert predict_domain(results).accuracy("routing") < 0.75
    # The same with sources mixed up between the sides: now the document gives the domain away.
    leaky = {
        name: PassageResult(r.layers, r.n_experts, tuple(f"{i}" for i in range(len(r.source))), r.tokens, r.assigned)
        for name, r in results.items()
    }
    assert predict_domain(leaky).accuracy("routing") > 0.9


def test_parallel_sources_are_held_out_together():
    """A book in two languages, routed alike: nothing tells them, and its twin must not say that it is the other."""
    r = sample(torch.Generator().manual_seed(7), own=6, sources=8)
    twins = {
        name: PassageResult(r.layers, r.n_experts, tuple(f"book/{name}/{s}" for s in r.source), r.tokens, r.assigned)
        for name in ("de", "fr")
    }
    together = predict_domain(twins, parallel=parallel_key())
    assert together.accuracy("routing") == together.accuracy("unigram") == 0.5  # both of a pair are called the same
    assert set(together.to_frame()["sources"]) == {8}
    assert len({(name, unit) for name, unit in zip(together.source, together.unit.tolist(), strict=True)}) == 16
    apart = predict_domain(twins)  # a control: a twin that was trained on gives the wrong language
    assert apart.accuracy("routing") < 0.3 and set(apart.to_frame()["sources"]) == {16}
    few = {name: sample(torch.Generator().manual_seed(8), sources=3) for name in ("de", "fr")}
    few["fr"] = PassageResult(
        few["fr"].layers,
        EXPERTS,
        tuple(f"x/{s}/1" for s in ("de", "fr", "en") * 4),
        few["fr"].tokens,
        few["fr"].assigned,
    )
    with pytest.raises(InputError, match="too few sources .*'fr': 1"):
        predict_domain(few, parallel=parallel_key())


def test_names_of_domains_and_sources_may_hold_anything():
    """A domain is its whole name: paper/english and paper/code are dealt evenly into the folds each by itself."""
    names, sources = ["paper/english"] * 10 + ["paper/code"] * 5, [f"s/{i}" for i in [*range(10), *range(5)]]
    dealt = folds(units(sources, names), names, 5, seed=0)
    for name in set(names):
        of = torch.tensor([one == name for one in names])
        assert torch.bincount(dealt[of], minlength=5).unique().numel() == 1
    one = ["paper"] * 15  # a control: as one stratum, code is not dealt evenly
    mixed = folds(units(sources, one), one, 5, seed=0)
    assert torch.bincount(mixed[10:], minlength=5).unique().numel() > 1
    generator = torch.Generator().manual_seed(6)
    found = predict_domain(
        {"paper/a": sample(generator, sources=3), "paper/b": sample(generator, sources=3)}, n_folds=2
    )
    assert set(found.to_frame()["sources"]) == {6}  # a name is another source in another domain


def test_logistic_regression_is_at_its_minimum():
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(60, 4, generator=generator), torch.randint(3, (60,), generator=generator)
    model = fit_logistic(x, y, 0.01, 3)
    z = ((x - model.mean) / model.scale).double()
    w, b = model.weight.double().requires_grad_(), model.bias.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(z @ w + b, y) + 0.01 * w.square().sum()
    assert all(g.abs().max() < 1e-4 for g in torch.autograd.grad(loss, [w, b]))


def test_what_cannot_be_told_apart_is_refused():
    generator = torch.Generator().manual_seed(4)
    one = sample(generator)
    with pytest.raises(InputError, match="expected at least two"):
        predict_domain({"a": one})
    with pytest.raises(InputError, match="too few sources .*'b': 2"):
        predict_domain({"a": one, "b": sample(generator, sources=2)})
    other = sample(generator, sources=3)
    cut = replace(other, source=(*["s0"] * 11, "s1"))  # as many passages as `other` has, of two sources
    long = replace(one, source=(*cut.source, *one.source[12:]))
    for of in (cut, long):
        with pytest.raises(InputError, match=r"too few sources .* in the 12 passages .*'b': 2"):
            predict_domain({"a": other, "b": of})
    assert predict_domain({"a": other, "b": replace(one, source=other.source + one.source[12:])}).source
    with pytest.raises(InputError, match="fill a row of 16"):
        PassageSample(LAYERS, EXPERTS, TOP_K, length=16).result()
