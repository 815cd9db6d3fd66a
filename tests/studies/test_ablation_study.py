"""The study `ablation`: its losses are those of `model.ablate`, its controls carry the same weight."""

import pytest
import torch

from moe_lens.cli import main, options
from moe_lens.data import Domain, tokenize
from moe_lens.errors import InputError
from moe_lens.studies import AblationStudy, compare, run
from moe_lens.studies.forward_passes import losses, predicted
from moe_lens.studies.matched_coalitions import TOLERANCE
from tests.studies.test_study import SMALL
from tests.studies.tiny import domain, passages, tiny_model

EXPERTS = {2: [3, 1], 1: [5]}
FLOAT32 = 1e-5
"""Nats a token: sums of float32 losses in another order of batches."""


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def made(model):
    return run(AblationStudy(EXPERTS, matched=4), model, [domain("a"), domain("b", seed=1)], reading=SMALL)


def by_hand(model, of: Domain, experts, how: str) -> float:
    """Nats a token that `model.ablate` adds."""
    texts = tokenize(of, model, n_tokens=10**6, context=SMALL.context, seed=SMALL.seed)
    added, tokens = 0.0, 0
    with torch.no_grad():
        for batch in texts:
            counted = predicted(batch)
            clean = losses(model, batch, [])
            with model.ablate(experts, how=how):
                added += float((losses(model, batch, []) - clean).double()[counted].sum())
            tokens += int(counted.sum())
    return added / tokens


@pytest.mark.parametrize("how", ["reroute", "zero"])
def test_named_experts_cost_what_ablating_them_by_hand_does(model, made, how):
    table = made.tables["ablation"]
    found = table[(table["how"] == how) & (table["coalition"] == "picked")].set_index("domain")["added"]
    assert found["a"] == pytest.approx(by_hand(model, domain("a"), EXPERTS, how), abs=FLOAT32)
    assert found["b"] == pytest.approx(by_hand(model, domain("b", seed=1), EXPERTS, how), abs=FLOAT32)
    other = by_hand(model, domain("a"), {2: [0, 2], 1: [4]}, how)
    assert abs(found["a"] - other) > 10 * FLOAT32  # negative control


@pytest.mark.parametrize("how", ["reroute", "zero"])
def test_special_tokens_within_texts_are_read_and_not_counted(model, how):
    """As in rendered chats."""
    end = model.tokenizer.eos_token
    rows = [{"text": row["text"].replace(" ", f"{end} ", 3), "source": row["source"]} for row in passages(n=12)]
    texts = Domain.of("chats", rows)
    found = run(AblationStudy(EXPERTS, how=(how,), matched=1), model, [texts], reading=SMALL).tables["ablation"]
    picked = found[found["coalition"] == "picked"]["added"].item()
    assert picked == pytest.approx(by_hand(model, texts, EXPERTS, how), abs=FLOAT32)


def test_matched_coalitions_carry_the_weight_and_none_of_the_experts(made):
    table, who = made.tables["ablation"], made.tables["coalitions"]
    named = {(layer, expert) for layer, experts in EXPERTS.items() for expert in experts}
    for name in ("a", "b"):
        own = who[who["domain"] == name]
        members = {kind: set(zip(of["layer"], of["expert"], strict=True)) for kind, of in own.groupby("coalition")}
        assert members["picked"] == named and {layer for layer, _ in members["random"]} == set(EXPERTS)
        mass = table[(table["domain"] == name) & (table["how"] == "zero")].set_index("coalition")
        if mass.loc["matched", "coalitions"]:
            assert not members["matched"] & named
            assert mass.loc["matched", "mass"] == pytest.approx(mass.loc["picked", "mass"], rel=TOLERANCE)
    zero = table[table["how"] == "zero"].set_index(["domain", "coalition"])
    beyond = zero.loc[("a", "picked"), "added"] - zero.loc[("a", "random"), "added"]
    assert zero.loc[("a", "random"), "beyond"] == pytest.approx(beyond)
    assert zero.loc[("a", "random"), "beyond_low"] <= beyond <= zero.loc[("a", "random"), "beyond_high"]


def test_comparing_says_that_only_routing_is_compared(made):
    found = compare(made, domains=("a", "b"))
    assert set(found.table["quantity"]) == {"share", "weight", "router_entropy", "margin"}
    assert "left out: what ablation measures beyond routing (added losses)" in found.found()


def test_each_coalition_is_told_by_itself_and_stars_ask_for_both(made):
    table, each = made.tables["ablation"], made.tables["effects"]
    mean = each.groupby(["domain", "how", "coalition"])["added"].mean()
    for row in table[table["coalitions"] > 0].to_dict("records"):
        key = row["domain"], row["how"], row["coalition"]
        assert mean[key] == pytest.approx(row["added"], abs=1e-9)
    assert (table["starred"].isna() == (table["coalition"] == "picked")).all()
    lower = table[["all_low", "over_most_low"]].min(axis=1) > 0
    assert not (table["starred"].fillna(False) & ~lower).any()  # the corrected interval is wider than the one shown
    kind = each.groupby(["domain", "how", "coalition"])["added"].max()
    for row in table[(table["coalitions"] > 0) & (table["coalition"] != "picked")].to_dict("records"):
        own = mean[row["domain"], row["how"], "picked"]
        assert row["over_most"] == pytest.approx(own - kind[row["domain"], row["how"], row["coalition"]], abs=1e-9)
    said = [line for line in made.findings().lines if "  beyond" in line]
    for how, line in zip(("reroute", "zero"), said, strict=True):
        n = int(table.query(f"how == '{how}' and coalition == 'matched'")["starred"].sum())
        assert f"shown to cost more than nothing and than each of these, corrected for all, in {n} of 2 domains" in line


def test_findings_hold_the_experts_against_their_controls(made):
    said = made.findings().lines
    assert said[0].startswith("forbidden") and "beyond" in said[1] and said[2].startswith("set to zero")


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (AblationStudy({9: [0]}), "there is no layer 9"),
        (AblationStudy({1: [99]}), "there is no expert 99 in layer 1"),
        (AblationStudy({1: []}), "a list that is not empty"),
        (AblationStudy({1: range(6)}), "2 experts would be left"),
        (AblationStudy({1: [0]}, how=("zero", "zero")), "expected one or both of reroute, zero"),
    ],
)
def test_what_cannot_be_taken_out_is_refused(model, study, message):
    with pytest.raises(InputError, match=message):
        run(study, model, [domain("a")], reading=SMALL)


@pytest.mark.typed
def test_experts_of_the_command_line(capsys, tmp_path):
    assert options.experts_by_layer(["3:17,4", "5:8", "3: 2"], "--experts") == {3: [17, 4, 2], 5: [8]}
    for wrong in ("3", "3:", "3:x", "-1:2", "3:1,", "³:1"):
        assert main(["ablate", f"--experts={wrong}", "--out", str(tmp_path / "out")]) == 2
        assert "expected LAYER:EXPERT,EXPERT" in capsys.readouterr().err
