"""Localisation on a model whose truth is planted, and on texts in which domains mean nothing."""

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch

from moe_lens import HookedMoE, viz
from moe_lens.cli import main
from moe_lens.data import Reading, batch_windows, shards
from moe_lens.errors import InputError
from moe_lens.interventions import CleanRun, Loss
from moe_lens.interventions.coalitions import added_losses
from moe_lens.studies import Localisation, StudyResult, run
from moe_lens.studies.forward_passes import losses, predicted
from moe_lens.studies.localisation import contrast
from moe_lens.studies.matched_coalitions import beaten, matched, pick
from tests.planted import LAYER, PLANTED, planted_domains, planted_model
from tests.studies.tiny import assert_same, domain, save_checkpoint, tiny_model, write_jsonl
from tests.wrapped import untouched

READING = Reading(tokens=None, context=24)


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return planted_model()


@pytest.fixture(scope="module")
def found(model) -> StudyResult:
    with untouched(model):
        return run(Localisation(experts=1, matched=20, how=("reroute",)), model, planted_domains(), reading=READING)


def picked(result: StudyResult) -> dict[tuple[str, int], list[tuple[int, int]]]:
    """(layer, expert) of those of the last layer, by domain and half."""
    found: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for row in result.tables["coalitions"].to_dict("records"):
        if row["coalition"] == "picked" and row["layer"] == LAYER:
            found.setdefault((row["domain"], row["out_of"]), []).append((row["layer"], row["expert"]))
    return found


@pytest.mark.parametrize("how", ["reroute", "zero"])
def test_added_losses_are_those_of_ablating_one_coalition_at_a_time(how):
    model = tiny_model()
    (shard,) = shards(domain("d", n=6, sources=6), model, READING)
    (batch,) = batch_windows(shard.windows, model, batch_tokens=10**6)
    run_ = CleanRun.of(model, batch.tokens, attention_mask=batch.mask.long())
    generator = torch.Generator().manual_seed(0)
    coalitions = torch.rand(5, 2, 8, generator=generator) < 0.3
    coalitions[1] = False
    coalitions[2, 0] = False
    assert coalitions.sum(-1).max() <= 5
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(len(batch.sources)))
    with untouched(model):
        added = added_losses(model, run_, Loss(batch.tokens, batch.mask), coalitions, pairs, how).view(5, -1)
    whole = losses(model, batch, [])
    for members, ours in zip(coalitions, added, strict=True):
        out = [(model.moe_layers[row], expert) for row, expert in members.nonzero().tolist()]
        without = losses(model, batch, model.ablate(out, how=how).fwd_hooks if out else [])
        theirs = ((without - whole).double() * predicted(batch)).sum(-1)
        assert torch.allclose(ours, theirs, atol=2e-5, rtol=0)
        assert bool(theirs.any()) == bool(members.any())


@pytest.mark.typed
def test_it_recovers_the_planted_experts(found):
    assert picked(found) == {(name, half): [(LAYER, of)] for name, of in PLANTED.items() for half in (0, 1)}
    table = found.tables["contrast"]
    for row in table.query("control == 'matched'").to_dict("records"):
        assert 0 < row["low"] <= row["estimate"] <= row["high"]
        assert row["beaten"] == 1 and row["controls"] == 20
        assert row["starred"] and 0 < row["contrast_low"] <= row["contrast"] <= row["contrast_high"]
        assert row["contrast"] == pytest.approx(row["own"] - row["others"])
        assert abs(row["control_mass"] / row["mass"] - 1) < 0.1 and row["control_experts"] > row["experts"] == 2
    assert min(table["own"]) > 4 and max(abs(table["others"])) < 1e-3
    assert set(table["control"]) == {"busiest", "random", "matched"}
    for at, name in enumerate(PLANTED):
        effects: Any = found.results[name]["effects"]
        rows: Any = effects.to_frame().query("kind == 'picked'").set_index(["how", "of_domain"])["added"]
        for way in effects.how:
            added, tokens = (values[:, at, effects.kinds.index("picked")].sum() for values in effects.of(way))
            assert rows[way, at] == pytest.approx(float(added / tokens)) and rows[way].idxmax() == at


def test_picked_experts_that_cost_nothing_are_not_starred_because_their_controls_cost_less(found):
    settings = dict(found.manifest["plan"]["settings"])
    parts = Localisation(**{**settings, "how": tuple(settings["how"])}).contrasts(found.results)
    odd = {}
    for number, (name, of) in enumerate(parts.effects.items()):
        control = torch.tensor([kind == "matched" for kind in of.kinds])
        noise = torch.randn(of.added[..., 0].shape, generator=torch.Generator().manual_seed(number))
        added = torch.where(control, -0.5 * of.tokens, 0.01 * noise[..., None] * of.tokens)
        added[:, :, [i for i in range(len(PLANTED)) if i != number]] = 0
        odd[name] = replace(of, added=added)
    rows: Any = replace(parts, effects=odd).contrast().query("control == 'matched'")
    assert (rows["low"] > 0).all() and not rows["starred"].any()


def test_a_control_with_as_great_a_contrast_takes_the_star_away(found):
    """Whatever their mean; and ends that hold for all domains and ways together reach farther than those of one."""
    settings = dict(found.manifest["plan"]["settings"])
    parts = Localisation(**{**settings, "how": tuple(settings["how"])}).contrasts(found.results)
    ends: Any = parts.contrast().query("control == 'matched'")
    assert ends["starred"].all() and (ends["over_most"] > 0).all()
    assert (ends["over_most"] == ends["contrast"] - ends["control_most"]).all()
    assert (ends["beyond_low"] < ends["estimate"]).all() and (ends["estimate"] < ends["beyond_high"]).all()
    # the same sums of sources of which two hold nearly all of the text say less
    first = next(iter(parts.effects))
    books = {name: of.predicted.clone() for name, of in parts.effects.items()}
    books[first][:2] *= 100
    few = {name: replace(of, predicted=books[name]) for name, of in parts.effects.items()}
    wide: Any = replace(parts, effects=few).contrast().query("control == 'matched'")
    assert (wide["all_low"] < ends["all_low"]).all() and (wide["beyond_high"] > ends["beyond_high"]).all()
    at = next(iter(parts.effects.values())).kinds.index("matched")
    odd = {}
    for number, (name, of) in enumerate(parts.effects.items()):
        added = of.added.clone()
        added[:, 0, number, at] += 99 * of.tokens[:, 0, number, at]  # only in the domain that it is a control for
        odd[name] = replace(of, added=added)
    rows: Any = replace(parts, effects=odd).contrast().query("control == 'matched'")
    assert not rows["starred"].any() and (rows["over_most"] < 0).all() and (rows["beaten"] >= 0.9).all()


@pytest.mark.parametrize("varies", [0, 1])
def test_the_interval_of_a_contrast_is_that_of_the_one_domain_that_varies(found, varies):
    """Whether that is the domain itself or another, of which two sources hold most of the text."""
    settings = dict(found.manifest["plan"]["settings"])
    parts = Localisation(**{**settings, "how": tuple(settings["how"])}).contrasts(found.results)
    noise = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    odd = {}
    for number, (name, of) in enumerate(parts.effects.items()):
        times = torch.tensor([20, 20, *[1] * 10] if number == 1 else [1] * 12)
        rate = (1 + number + noise * (number == varies))[:, None, None, None]
        tokens = of.tokens * times[:, None, None, None]
        odd[name] = replace(of, predicted=of.predicted * times, tokens=tokens, added=rate * tokens)
    apart = {name: {source: f"{name}: {source}" for source in of.sources} for name, of in odd.items()}
    parts = replace(parts, effects=odd, blocks=apart)
    row: Any = parts.contrast().query("control == 'matched'").iloc[0]
    read = list(odd)[varies]
    shown: Any = parts.by_domain_read().query(f"coalition == 'picked' and read == '{read}'").iloc[0]
    assert shown["low"] < shown["added"] < shown["high"] and row["domain"] == shown["domain"]
    ends = [shown["added"] - shown["low"], shown["high"] - shown["added"]]
    if varies:  # one of two others, whose mean is taken away
        ends = [end / 2 for end in reversed(ends)]
    theirs = [row["contrast"] - row["contrast_low"], row["contrast_high"] - row["contrast"]]
    assert theirs == pytest.approx(ends, rel=1e-6)  # sums in float64


@pytest.mark.parametrize("by", [pytest.param("attribution", marks=pytest.mark.typed), "knockout"])
def test_experts_can_be_picked_by_what_they_are_worth(model, by):
    study = Localisation(by=by, experts=1, matched=1, how=("zero",))
    result = run(study, model, planted_domains(), reading=READING)
    assert picked(result) == {(name, half): [(LAYER, of)] for name, of in PLANTED.items() for half in (0, 1)}
    for name, of in PLANTED.items():
        saved: Any = result.results[name]["scores"].to_frame().set_index(["layer", "expert"])["saved"]
        assert saved.idxmax() == (LAYER, of)


def test_it_says_no_where_domains_mean_nothing(model):
    study = Localisation(experts=1, matched=20, how=("reroute",))
    table = contrast(run(study, model, planted_domains(shuffled=True), reading=READING), 1 - 0.05 / 3)
    rows = table.query("control == 'matched'")
    assert len(rows) == 3 and max(abs(rows["estimate"])) < 1
    for row in rows.to_dict("records"):
        assert row["low"] <= 0 or row["beaten"] < 0.95


def test_what_it_says_of_the_picked_is_what_taking_them_out_costs(model, found):
    cost: dict[str, float] = {}
    for of in planted_domains():
        (shard,) = shards(of, model, READING)
        (batch,) = batch_windows(shard.windows, model, batch_tokens=10**6)
        hooks = model.ablate({LAYER: [PLANTED["sea"]]}, how="reroute").fwd_hooks  # the first layer does nothing
        mask = predicted(batch)
        cost[of.name] = float((losses(model, batch, hooks) - losses(model, batch, []))[mask].double().mean())
    row = found.tables["contrast"].query("domain == 'sea' and control == 'matched'").iloc[0]
    assert row["own"] == pytest.approx(cost["sea"], abs=1e-5)
    assert row["others"] == pytest.approx((cost["law"] + cost["art"]) / 2, abs=1e-5)
    shown = found.tables["effects"].query("domain == 'sea' and coalition == 'picked' and how == 'reroute'")
    assert dict(zip(shown["read"], shown["added"], strict=True)) == pytest.approx(cost, abs=1e-5)
    assert min(shown["added"] - shown["low"]) >= 0 and min(shown["high"] - shown["added"]) >= 0


def test_halves_are_balanced_and_keep_parallel_sources_together(found):
    halves = found.tables["halves"]
    assert set(halves.groupby(["domain", "half"]).size()) == {6}
    assert set(halves.assign(number=halves["source"].str.split("/").str[-1]).groupby("number")["half"].nunique()) == {1}


def test_a_saved_result_is_the_same_and_gives_any_level(model, found, tmp_path):
    study = Localisation(experts=1, matched=20, how=("reroute",))
    small = Reading(tokens=None, context=24, shard_tokens=100)
    saved = run(study, model, planted_domains(), reading=small, out=tmp_path / "runs", batch_tokens=60)
    assert_same(saved, found, 1e-6)
    again = contrast(StudyResult.load(tmp_path / "runs"))
    pd.testing.assert_frame_equal(again, saved.tables["contrast"])
    wide = contrast(saved, level=1 - 0.05 / 3)
    assert min(again["low"] - wide["low"]) >= 0 and max(wide["high"] - again["high"]) > 0


def test_what_cannot_be_matched_is_not_matched():
    generator = torch.Generator().manual_seed(0)
    members = torch.zeros(1, 8, dtype=torch.bool)
    members[0, 0] = True
    mass = torch.tensor([[0.79, *[0.03] * 7]])
    assert not matched(members, mass, 3, generator).any()  # five others carry 0.15
    even = torch.full((1, 8), 1 / 8)
    other = matched(members, even, 3, generator)
    assert int(other.sum()) == 1 and not (other & members).any()


def test_controls_as_good_as_the_picked_count_by_half():
    assert beaten(torch.tensor([0.1, 0.2, 0.3, 0.4]), 0.3) == pytest.approx((2 + 0.5) / 4)
    assert beaten(torch.zeros(40), 0.0) == 0.5  # all the same: neither beaten nor better


def test_picked_are_the_greatest_of_each_layer_above_zero():
    scores = torch.tensor([[5.0, 4.0, 3.0], [1.0, 0.0, -1.0]])
    assert pick(scores, 2).nonzero().tolist() == [[0, 0], [0, 1], [1, 0]]
    assert pick(scores, 3).sum() == 4


@pytest.mark.untyped
def test_what_cannot_be_is_refused(model, found):
    texts = planted_domains()
    for study, message in (
        (Localisation(how=("zero", "zero")), "expected one or both of reroute, zero"),
        (Localisation(experts=99), "experts is 99; at most 6 of a layer's 16"),
        (Localisation(parallel="("), "no regular expression"),
    ):
        with pytest.raises(InputError, match=message):
            run(study, model, texts, reading=READING)
    with pytest.raises(InputError, match="got the domain 'sea' alone; expected at least two"):
        run(Localisation(), model, texts[:1], reading=READING)
    one = [domain("a", n=4, sources=1), domain("b", n=4, sources=2)]
    with pytest.raises(InputError, match="domain 'a' has too few sources"):
        run(Localisation(), model, one, reading=READING)
    other = StudyResult({"plan": {"study": "routing"}}, {}, {})
    with pytest.raises(InputError, match="the study 'routing'; expected 'localisation'"):
        contrast(other)


def test_the_command(tmp_path, capsys):
    save_checkpoint(tmp_path / "model")
    for seed, name in enumerate("ab"):
        write_jsonl(tmp_path / f"{name}.jsonl", n=4, sources=4, seed=seed)
    texts = [word for name in "ab" for word in ("--domain", f"{name}={tmp_path}/{name}.jsonl")]
    own = ["--how", "zero", "--matched", "2", "--experts", "1"]
    out = tmp_path / "out"
    assert main(["localise", "--model", f"{tmp_path}/model", *texts, *own, "--window", "24", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out.resolve())
    result = StudyResult.load(out)
    table = result.tables["contrast"]
    assert set(table["domain"]) == {"a", "b"} and set(table["low"].isna()) == {True}  # four sources: no interval
    assert main(["report", str(out), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "Localisation" in page and "No intervals: some domain has fewer than 10 sources" in page
    for figure in (viz.localisation_costs(result), viz.localisation_contrast(result)):
        traces = figure.to_dict()["data"]
        assert {x for trace in traces for x in trace["x"]} <= {"a", "b"} and len(traces) >= 3
