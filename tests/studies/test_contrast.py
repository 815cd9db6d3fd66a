"""Pairs of prompts: against the model run pair by pair, a planted expert, and pairs whose sides mean nothing."""

import json
import math
import os
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_lens import HookedMoE
from moe_lens.data import Reading
from moe_lens.data.windows import windows_of
from moe_lens.errors import InputError
from moe_lens.studies import Pair, contrast_prompts, read_pairs
from moe_lens.studies.contrast import ContrastStudy
from moe_lens.studies.contrast_results import ContrastResult, ContrastStats
from moe_lens.studies.prompt_pairs import encode, outcome_tokens, shared_weights
from tests.planted import LAYER, PLANTED, WORDS, planted_model
from tests.studies.tiny import domain, tiny_model

READING = Reading(tokens=None, context=64)
ORDER = 1e-12  # sums of some ten shares in float64, in another order: 1e-15 each


def pairs_of(model: HookedMoE, a: str, b: str, n: int = 24, seed: int = 0) -> list[Pair]:
    """Prompts of words of two domains, two pairs to a template."""
    draw = random.Random(seed)
    prompts = [[" " + " ".join(draw.choices(WORDS[each], k=6)) for _ in range(n)] for each in (a, b)]
    answer, foil = (
        next(f" {word}" for word in WORDS[each] if len(model.to_tokens(f" {word}", prepend_bos=False)[0]) == 1)
        for each in (a, b)
    )
    both = enumerate(zip(*prompts, strict=True))
    return [Pair(one, other, answer=answer, foil=foil, template=f"t{i // 2}") for i, (one, other) in both]


@pytest.fixture(scope="module")
def planted() -> HookedMoE:
    return planted_model()


@pytest.fixture(scope="module")
def found(planted: HookedMoE) -> dict[str, Any]:
    neutral = [domain("neutral", n=12, sources=12)]
    settings: dict[str, Any] = {"experts": 1, "matched": 3, "neutral_matched": 2, "draws": 200}
    result = contrast_prompts(planted, pairs_of(planted, "sea", "law"), neutral, reading=READING, **settings)
    return {**result.tables, "results": result.results["pairs"]}


def test_planted_experts_are_found_with_their_sign(found: dict[str, Any]) -> None:
    experts = found["experts"].head(2).to_dict("records")
    expected = {(LAYER, PLANTED["sea"]): 1, (LAYER, PLANTED["law"]): -1}
    assert {(row["layer"], row["expert"]): round(row["difference"]) for row in experts} == expected
    row, same = found["test"].to_dict("records")
    assert row["experts_found"] >= 2 and row["units"] == 12 and row["pairs"] == 24
    assert row["finding"] == "A and B choose different experts"
    assert row["shuffled"] <= 0.15, "swaps find nothing more often than chance does"
    assert same["units"] == 0 and same["finding"] == "no test: 0 units, ten are needed"


def test_the_answer_hangs_on_the_planted_experts_and_not_on_others(found: dict[str, Any]) -> None:
    steering = {(row["way"], row["kind"]): row for row in found["steering"].to_dict("records")}
    forbid, opposite = steering["forbid", "picked"], steering["forbid", "opposite"]
    assert forbid["low"] > 5 and forbid["beyond_low"] > 5 and forbid["beaten"] == 1
    assert abs(opposite["effect"]) < 1e-3 and abs(steering["forbid", "matched"]["effect"]) < 1e-3
    assert steering["push", "picked"]["low"] > 0 > steering["push", "opposite"]["high"]
    assert steering["push", "matched"]["coalitions"] == 0, "nothing else is as rare in B as the planted expert"
    neutral = [(row["way"], row["kind"]) for row in found["neutral"].to_dict("records")]
    assert neutral == [*[("forbid", kind) for kind in ("picked", "opposite", "matched")],
                       *[("push", kind) for kind in ("picked", "opposite")]]  # fmt: skip


def test_sides_that_mean_nothing_show_nothing(planted: HookedMoE) -> None:
    draw = random.Random(1)
    swapped = [
        replace(pair, a=pair.b, b=pair.a, template=str(i)) if draw.random() < 0.5 else replace(pair, template=str(i))
        for i, pair in enumerate(pairs_of(planted, "sea", "law"))
    ]
    silent = [replace(pair, answer=None, foil=None) for pair in swapped]
    result = contrast_prompts(planted, silent, reading=READING, draws=200)
    assert sorted(result.tables) == ["experts", "test"]
    assert result.tables["test"]["finding"].tolist()[0] == "not rejected"
    # answers that belong to A in half of the pairs and to B in the others: no expert of A's brings them
    neutral = [domain("neutral", n=2, sources=2)]
    settings: dict[str, Any] = {"experts": 1, "matched": 3, "neutral_matched": 1, "draws": 200}
    result = contrast_prompts(planted, swapped, neutral, reading=READING, **settings)
    assert result.tables["test"]["finding"].tolist()[0] == "not rejected"
    for row in result.tables["steering"].query("kind == 'picked'").to_dict("records"):
        # below 0 it may be: what is picked on one half of a balanced set is the wrong side's on the other
        assert row["low"] <= 0 and not row["beyond_low"] > 0


@pytest.mark.typed
def test_sums_are_those_of_the_model_run_pair_by_pair() -> None:
    model = tiny_model()
    pairs = [
        Pair("the old man", "look at the sea", span_b="sea", answer=" the", foil=" and", template="x"),
        Pair("winter comes again", "the man must go there", span_b="there", answer=" the", foil=" and", template="y"),
        Pair("sea", "said before", span_b="before", answer=" the", foil=" and", template="x"),
    ]
    settings: dict[str, Any] = {"experts": 2, "matched": 2, "seed": 3}
    result = contrast_prompts(model, pairs, reading=READING, **settings)
    found: Any = result.results["pairs"]["differences"]
    for at, unit in enumerate("xy"):
        expected = torch.zeros(len(model.moe_layers), model.n_experts, dtype=torch.float64)
        for pair in (pair for pair in pairs if pair.template == unit):
            for sign, text, span in ((1, pair.a, pair.a), (-1, pair.b, pair.span_b)):
                n = len(model.to_tokens(f" {span}" if sign < 0 else span, prepend_bos=False)[0])
                chosen = model.routing(text).indices[:, 0, -n:]
                expected += sign * torch.nn.functional.one_hot(chosen, model.n_experts).sum((1, 2)).double() / n
        assert (found.differences[at] - expected).abs().max() <= ORDER
    frame = found.to_frame().sort_values(["layer", "expert"])
    means = found.by_unit().mean(0).flatten().tolist()
    assert frame["difference"].tolist() == pytest.approx(means, abs=ORDER)
    outcomes: Any = result.results["pairs"]["outcomes"]
    study = ContrastStudy(tuple(pairs), **settings)
    halves = study._halves(found)
    answer, foil = (model.to_single_token(token) for token in (" the", " and"))
    for at, unit in enumerate("xy"):
        members = study.coalitions(found, model.top_k, halves, halves[unit])["a"][0]
        experts = {layer: members[row].nonzero()[:, 0].tolist() for row, layer in enumerate(model.moe_layers)}
        experts = {layer: of for layer, of in experts.items() if of}
        pushed = {layer: dict.fromkeys(of, 2.0) for layer, of in experts.items()}
        changes = model.ablate(experts, how="reroute"), model.steer_experts(pushed)
        for way, (side, change) in enumerate(zip("ab", changes, strict=True)):
            expected = torch.zeros(2, dtype=torch.float64)
            for pair in (pair for pair in pairs if pair.template == unit):
                with torch.no_grad():
                    clean = model(getattr(pair, side))[0, -1]
                    with change:
                        steered = model(getattr(pair, side))[0, -1]
                expected += torch.stack([clean[answer] - clean[foil], steered[answer] - steered[foil]]).double()
            assert (outcomes.sums[at, way, :2] - expected).abs().max() <= 1e-4


def test_prompts_that_spell_their_opening_out_are_those_that_the_tokenizer_opens() -> None:
    model = tiny_model()
    bos = str(model.tokenizer.bos_token)
    pairs = [Pair(f"the old man {word}", f"winter comes {word}", template=word) for word in ("sea", "go")]
    written = [replace(pair, a=bos + pair.a, b=bos + pair.b) for pair in pairs]
    expected, found = (contrast_prompts(model, each, reading=READING, draws=10) for each in (pairs, written))
    assert found.tables["experts"].equals(expected.tables["experts"])
    study = ContrastStudy(tuple(written))
    (window,) = windows_of(0, study.domain().passages[0], model, 64, set())
    rest: Any = SimpleNamespace(windows=[replace(window, written=False)])  # as the second window of a long one
    with pytest.raises(InputError, match="a pair is longer than the window"):
        study._some(rest)


def test_tokens_that_both_have_weigh_the_same_in_both() -> None:
    a, b = torch.tensor([5, 7, 5, 9]), torch.tensor([7, 5, 1, 7])
    in_a, in_b, any_shared = shared_weights(a, b)
    assert any_shared
    assert in_a.tolist() == [0.25, 0.5, 0.25, 0]
    assert in_b.tolist() == [0.25, 0.5, 0, 0.25]
    assert not shared_weights(torch.tensor([1]), torch.tensor([2]))[2]


def test_what_only_rounds_differently_at_common_tokens_is_no_difference() -> None:
    """Expert 0 is always chosen at a token that is once in A and seven times in B; expert 1, a little more in A."""
    *weights, _ = shared_weights(torch.tensor([5]), torch.tensor([5] * 7))
    rounding = float(weights[0].sum() - weights[1].sum())
    assert 0 < abs(rounding) < 1e-15, "in float64"
    stats = ContrastStats([0], 2)
    for unit in range(12):
        same = torch.tensor([[[rounding, 1e-6 + 1e-8 * unit]]], dtype=torch.float64)
        stats.update(same, same, torch.ones(1, dtype=torch.bool), torch.zeros(1, 2, 1, 2), [str(unit)])
    found: Any = stats.result().experts(100, 0).set_index("expert")
    for prefix in ("", "same_"):
        assert found.loc[0, f"{prefix}t"] == 0 and found.loc[0, f"{prefix}p_value"] == 1
        assert found.loc[1, f"{prefix}p_value"] < 0.05, "the control: little, but in every unit"


def test_the_pairs_that_ship_can_be_read_and_answers_are_single_tokens() -> None:
    pairs = read_pairs("german-english")
    assert len(pairs) == 48 and len({pair.template for pair in pairs}) == 24
    ContrastStudy(pairs).check(tiny_model())


def test_pairs_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    good = {"a": "x", "b": "y"}
    wrong: list[tuple[list[Any], str]] = [
        ([], "holds no pair"),
        ([good, {"a": "x"}], ":2: a pair lacks a, b"),
        ([{**good, "answer": "z"}], "one of answer and foil"),
        ([{**good, "label": "z"}], "has label"),
        ([{**good, "b": 3}], "an object of texts"),
        ([good, {**good, "answer": "z", "foil": "w"}], "expected one for all"),
    ]
    for rows, says in wrong:
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        with pytest.raises(InputError, match=says):
            read_pairs(path)
    path.write_text(f"{json.dumps(good)}\n\n{{", encoding="utf-8")
    with pytest.raises(InputError, match=r":3: not JSON .*column 2"):
        read_pairs(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="a pipe or a device"):
        read_pairs(tmp_path / "pipe")
    model = tiny_model()
    with pytest.raises(InputError, match="the pairs have"):
        contrast_prompts(model, [Pair("the sea", "the man")], reading=Reading(tokens=2))
    long = "the sea " * model.cfg.n_ctx
    with pytest.raises(InputError, match="the longest pair has"):
        contrast_prompts(model, [Pair(long, "the man")], reading=Reading(tokens=None, context=10**6))
    with pytest.raises(InputError, match="the model's context is"):
        encode(model, [long], [None])
    with pytest.raises(InputError, match="a single unit"):
        contrast_prompts(model, [Pair("the sea", "the man", answer=" the", foil=" and")], reading=READING)
    same = Pair("a", "b", answer=" the", foil=" the", template="x")
    with pytest.raises(InputError, match="answer and foil of 'a' are the same token"):
        outcome_tokens(model, [same])
    with pytest.raises(InputError, match="'nowhere' is not in the prompt"):
        contrast_prompts(model, [Pair("the sea", "the man", span_a="nowhere")], reading=READING)


def test_what_few_units_cannot_tell_is_one_sentence(planted: HookedMoE) -> None:
    said = str(contrast_prompts(planted, [Pair("the old man", "the old men")]).findings())
    assert "no test: 1 unit, ten are needed (test)" in said
    assert not {"nan", "NA", "source"} & set(re.findall(r"\w+", said))


def test_experts_that_few_units_show_are_not_tested() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(12, 1, 4, generator=generator, dtype=torch.float64)
    ones = torch.ones(12, dtype=torch.long)
    result = ContrastResult((0,), tuple(map(str, range(12))), ones, values, ones, values, torch.zeros(12, 2, 1, 4))
    assert result.test(100, 0)["finding"].tolist() == ["not rejected"] * 2
    few = ContrastResult((0,), tuple("abc"), ones[:3], values[:3], ones[:3], values[:3], torch.zeros(3, 2, 1, 4))
    assert few.test(100, 0)["finding"].tolist() == ["no test: 3 units, ten are needed"] * 2
    assert all(map(math.isnan, few.experts(100, 0)["p_value"].tolist()))
