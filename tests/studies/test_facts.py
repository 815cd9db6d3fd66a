"""Tracing over facts: restoring coalitions against patching by hand, and the study on a model with planted experts."""

import inspect
import json
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_lens import HookedMoE, names
from moe_lens.cli import main
from moe_lens.errors import InputError
from moe_lens.interventions.embedding_noise import EMBEDDING, noisy
from moe_lens.interventions.traced_fact import Fact, TracedFact
from moe_lens.studies import StudyResult, localise_facts, read_facts
from moe_lens.studies.facts import RUNS, FactResult, FactStats, FactStudy
from tests.planted import LAYER, PLANTED, WORDS, planted_model
from tests.studies.tiny import tiny_model
from tests.wrapped import untouched


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return planted_model()


SAYS = {"sea": " wind", "law": " right", "art": " book"}
"""A word of each domain that is one token."""


def facts() -> list[Fact]:
    """The last word says which domain's tokens come next."""
    others = dict(zip(SAYS, [*list(SAYS)[1:], *SAYS], strict=False))
    return [
        Fact(f"{SAYS[others[name]]} {word}", f" {word}", SAYS[name], SAYS[others[name]], kind=name)
        for name in SAYS
        for word in WORDS[name][:4]
    ]


@pytest.mark.typed
def test_restoring_a_coalition_is_patching_what_its_experts_add():
    model = tiny_model()
    fact = Fact("the old man looked", " old", " water", " fish")
    with untouched(model):
        traced = TracedFact.of(model, fact, noise_std=1.0, draws=2, seed=3)
        members = torch.zeros(3, 2, 8, dtype=torch.bool)
        members[0, 0, traced.clean.indices(1)[0, traced.at, 0]] = True
        members[1] = True
        found = traced.restored(members)
    tokens = model.to_tokens(fact.prompt)
    _, clean = model.run_with_cache(tokens)
    copies = tokens.expand(2, -1)
    noise = EMBEDDING, noisy([traced.at], 1.0, 3)
    first = int(traced.clean.indices(1)[0, traced.at, 0])

    def one(weighted, hook):
        experts, new = model.experts_in_slots(1), weighted.clone()
        new[:, traced.at][experts[:, traced.at] == first] = 0
        new[:, traced.at, 0] += clean["expert_weighted", 1][0, traced.at, 0]
        return new

    def whole(routed, hook):
        new = routed.clone()
        new[:, traced.at] = clean["routed_out", hook.layer()][0, traced.at]
        return new

    ways = [[(names.mlp("hook_expert_weighted", 1), one)], [(names.mlp("hook_routed_out", at), whole) for at in (1, 2)]]
    for hooks, ours in zip([*ways, []], found, strict=True):
        logits = model.run_with_hooks(copies, fwd_hooks=[noise, *hooks])[:, -1]
        assert torch.allclose(ours, traced.scores(logits).mean(0), atol=1e-4, rtol=0)
    assert (found[:2, 0] - found[2, 0]).abs().min() > 1e-3
    assert torch.allclose(traced.ends[1], found[2], atol=1e-9)


def test_it_finds_the_planted_experts(model):
    with untouched(model):
        result = localise_facts(model, facts(), experts=1)
    rows = [row for row in result.tables["experts"].to_dict("records") if row["layer"] == LAYER]
    assert {(row["domain"], row["expert"]) for row in rows} == set(PLANTED.items())
    rows = [row for row in result.tables["contrast"].to_dict("records") if row["measure"] == "difference"]
    assert len(rows) == 3
    for row in rows:
        assert row["picked"] > 0 and row["estimate"] >= 0
        assert row["picked"] > 0.5 * row["all"] > 0  # not the same: of all, what noise has chosen goes, too
        assert row["low"] != row["low"]  # few prompts: no interval
    runs: dict[str, dict[str, float]] = {}
    for of in result.tables["runs"].to_dict("records"):
        runs.setdefault(of["domain"], {})[of["run"]] = of["difference"]
    for row in runs.values():
        assert row["corrupted"] < row["picked"] and row["random"] <= row["picked"] < row["clean"] + 1


def test_it_finds_nothing_where_subjects_are_shuffled(model):
    """Answers that the prompt's last word does not choose, and subjects that the answer does not hang on."""
    draw = random.Random(0)
    shuffled = []
    for fact in facts():
        answer, foil = draw.sample(list(SAYS.values()), 2)
        shuffled.append(replace(fact, answer=answer, foil=foil, kind="answers"))
    elsewhere = [replace(fact, subject=fact.prompt[: -len(fact.subject)], kind="subjects") for fact in facts()]
    found = (
        localise_facts(model, [*shuffled, *elsewhere], experts=1).tables["contrast"].query("measure == 'difference'")
    )
    answers, subjects = found.to_dict("records")
    assert answers["sources"] >= 10 and answers["low"] <= 0 <= answers["high"] and not answers["picked"] > 0.5
    assert abs(subjects["all"]) < 1e-4 and abs(subjects["estimate"]) < 1e-4  # rounding: no token reads another here


def test_the_facts_that_ship():
    kinds = [fact.kind for fact in read_facts("small")]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
        ("agreement", "brackets", "digits", "quotation"), 24
    )


@pytest.mark.typed
def test_the_command_and_what_is_refused(tmp_path, capsys):
    path = tmp_path / "facts.jsonl"
    rows = [
        {"prompt": f"the {word} man", "subject": word, "answer": " water", "foil": " fish"} for word in ("old", "one")
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    assert main(["localise", "--facts", str(path), "--experts", "1", "--out", str(out)]) == 0
    assert list(StudyResult.load(out).tables["contrast"]["measure"]) == ["difference", "rank"]
    capsys.readouterr()
    assert main(["localise", "--facts", str(path), "--how", "zero"]) == 2
    assert "--how applies to texts" in capsys.readouterr().err
    for row, message in (
        ({"prompt": "a", "subject": "a", "answer": "b"}, r":1: a fact lacks foil"),
        ({**rows[0], "colour": "red"}, r":1: a fact has colour; expected texts prompt"),
        (["a"], ":1: expected an object"),
        ({**rows[0], "prompt": "the old \ud83d man"}, ":1 holds half of a character"),
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(InputError, match=message):
            read_facts(path)
    path.write_text(f"\n{json.dumps(rows[0])}\n\n{{")  # blank lines count as lines
    with pytest.raises(InputError, match=r":4: not JSON .*column 2"):
        read_facts(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_facts(tmp_path / "none.jsonl")


@pytest.mark.untyped
def test_facts_that_cannot_be_traced(model):
    fact = facts()[0]
    with pytest.raises(InputError, match="a kind of facts has a single source"):
        localise_facts(model, [fact])
    long = Fact(fact.prompt + " the" * model.cfg.n_ctx, fact.subject, fact.answer, fact.foil)
    with pytest.raises(InputError, match="the model's context is"):
        localise_facts(model, [fact, long])
    with pytest.raises(InputError, match="are the same token"):
        localise_facts(model, [Fact(fact.prompt, fact.subject, fact.answer, fact.answer)] * 2)


def test_a_contrast_is_the_picked_less_the_random_and_a_lower_rank_is_better():
    runs = (*RUNS, "random", "random")
    value = {"clean": (9.0, 0.0), "corrupted": (1.0, 50.0), "all": (8.0, 5.0), "picked": (6.0, 10.0)}
    random_ones = [(3.0, 20.0), (7.0, 40.0)]
    one = torch.tensor([*(value[name] for name in RUNS), *random_ones], dtype=torch.float64)
    found = FactResult(runs, ("s", "t"), torch.tensor([1, 1]), torch.stack([one, one])).contrast()
    difference, rank = found.to_dict("records")
    assert difference["estimate"] == pytest.approx(6 - 5) and rank["estimate"] == pytest.approx(10 - 30)
    assert difference["beaten"] == 0.5, "more is better: one of two random ones has less"
    assert rank["beaten"] == 1, "less is better: both have more"
    back = {"picked": (5, -40), "random": (4, -20), "all": (7, -45)}
    for name, (of_difference, of_rank) in back.items():
        assert (difference[name], rank[name]) == (pytest.approx(of_difference), pytest.approx(of_rank)), name


def test_random_coalitions_are_of_experts_in_use_and_other_ones_for_each_prompt():
    study = FactStudy(tuple(facts()), random=30)
    own = torch.zeros(2, 16, dtype=torch.bool)
    own[0, :3] = own[1, 5:7] = True
    active = torch.zeros(2, 16)
    active[:, 8:14] = 1
    traced: Any = SimpleNamespace(active=active)
    found = torch.stack(study._random(traced, own, facts()[0]))
    assert (found.sum(-1) == torch.tensor([3, 2])).all() and not found[..., :8].any() and not found[..., 14:].any()
    assert found.any(0)[:, 8:14].all(), "each of them at some time"
    assert torch.equal(found, torch.stack(study._random(traced, own, facts()[0])))
    assert not torch.equal(found, torch.stack(study._random(traced, own, facts()[1])))


def test_a_fact_is_confirmed_with_experts_that_were_picked_on_the_other_half(monkeypatch):
    """Those of its own half know it already."""
    given = tuple(replace(fact, source=f"template {number % 2}") for number, fact in enumerate(facts()[:4]))
    study, seen = FactStudy(given, random=1), []
    traced = SimpleNamespace(ends=torch.zeros(2, 2), active=torch.ones(1, 4))
    traced.restored = lambda coalitions: seen.append(coalitions[1]) or torch.zeros(len(coalitions), 2)
    monkeypatch.setattr(TracedFact, "of", lambda *_, **__: traced)
    picked = [torch.tensor([[True, False, False, False]]), torch.tensor([[False, True, False, False]])]
    into, halves = FactStats(1), {"template 0": 0, "template 1": 1}
    batch: Any = SimpleNamespace(windows=[SimpleNamespace(document=number) for number in range(4)])
    step: Any = inspect.unwrap(FactStudy.step)  # a model and a batch that only know what is asked of them
    step(study, None, "confirming", batch, {"scores": into}, (given, 1.0, picked, halves))
    assert [int(one.flatten().nonzero()) for one in seen] == [1, 0, 1, 0]
    assert into.result().sources == ("template 0", "template 1"), "facts of one template depend on one another"
    assert {domain.n_sources for domain in FactStudy(given[:2]).domains()} == {2}


def test_other_facts_are_another_study_and_a_prompt_must_fit(model):
    one, other = (FactStudy(tuple(facts()[:n])).settings()["facts"] for n in (3, 4))
    assert one != other and one == FactStudy(tuple(facts()[:3])).settings()["facts"]
    long = replace(facts()[0], prompt=" sea" * (int(model.cfg.n_ctx) + 1))
    with pytest.raises(InputError):
        FactStudy((long,)).check(model)
    FactStudy(tuple(facts())).check(model)
