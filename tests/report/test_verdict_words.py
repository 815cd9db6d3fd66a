"""Verdicts in the words of the page: every bound has them, a control is shown itself, and what decides is named."""

import pandas as pd

from moe_lens.report.paper_quotes import QUOTED
from moe_lens.report.verdict_notes import notes_of
from moe_lens.report.verdict_words import WORDS, Cell, Form, Line, shown, words
from moe_lens.studies import StudyResult, Verdicts, judge
from moe_lens.studies.paper_claims import RULES
from moe_lens.studies.verdict_answers import THRESHOLDS, Bound, OfDomain, Verdict
from tests.studies.test_verdicts import made

RATIO, LESS = "perplexity ratio, k = 1 ÷ all", "perplexity ratio − a random active expert's"


def of(domain: str, ratio: float, less: float) -> OfDomain:
    number = Bound(RATIO, ratio, ratio - 0.02, ratio + 0.02, False, THRESHOLDS["perplexity"])
    control = Bound(LESS, less, less - 1, less + 1, False, THRESHOLDS["nothing"], control=True)
    return OfDomain(domain, 12, (number, control))


def test_a_row_says_values_the_control_itself_and_what_decides():
    row = shown(Verdict("4", "claim", "", True, (of("a", 1.04, -9.96), of("b", 1.5, -20.5))))
    assert row.number == (Line("perplexity, k = 1", "+4 to +50\u00a0%", "claimed ≤\u00a0+5\u00a0%"),)
    # what one random expert gives, not its difference from ours
    assert row.control == (Line("one random active expert", "+1000 to +2100\u00a0%", "claimed more than ours"),)
    assert row.reasons == ("perplexity, k = 1: undecided in a; contradicted in b",)
    (_, (first, second)), (difference, _) = row.matrix
    assert first == Cell("+4.0\u00a0%", "[+2.0, +6.0]", "undecided")
    assert second is not None and second.answer == "contradicted"
    assert (
        difference.label == "perplexity ratio − a random active expert's" and difference.claimed == "claimed <\u00a00"
    )
    assert (row.half, row.double) == ("", "")  # no †
    near = shown(Verdict("4", "claim", "", True, (of("a", 1.04, -0.36),)))
    assert near.control[0].values == "+40\u00a0%"  # in the unit of ours: no whole multiple


def test_where_all_holds_there_is_no_reason_and_what_was_not_run_is_one():
    held = shown(Verdict("4", "claim", "", True, (of("a", 1.0, -9.0),)))
    assert held.reasons == ()
    missing = OfDomain("a", 12, of("a", 1.0, -9.0).bounds, "token_unigram was not run")
    assert shown(Verdict("4", "claim", "", True, (missing,))).reasons == ("token_unigram was not run: undecided in a",)


def test_thresholds_of_ours_are_marked_and_shown_elsewhere():
    agrees = Bound("agreement with the ensemble", 0.97, 0.96, 0.98, True, THRESHOLDS["agreement"])
    row = shown(Verdict("2", "claim", "", True, (OfDomain("a", 12, (agrees,)),)))
    assert row.number[0].claimed == "claimed ≥\u00a095\u00a0% †"
    assert (row.half, row.double) == ("undecided / undecided", "holds / holds")


def test_every_bound_of_the_rules_has_words_and_every_claim_its_place_in_the_paper():
    assert [rule.key for rule in RULES] == list(QUOTED)
    found = [bound.what for row in judge(made(truth=True)).rows for each in row.domains for bound in each.bounds]
    assert len(set(found)) >= 14
    for what in found:
        assert words(what) in [said for _, said in WORDS], what
        assert not words(what).minuend or words(what).minuend in found
    assert words("share of 40 random plans beaten").label == "40 random plans of this size, worse"
    assert words("something else").label == "something else"


def test_forms():
    assert Form(0, " %", scale=100).limit(0.125) == "12.5 %" and Form(2).range([0.5, 0.5]) == "0.50"
    assert Form(0, sign="+", scale=100, less=1).one(1.118) == "+11.8"
    assert Form(1).range([float("nan"), 0.25, 0.5]) == "0.2 to 0.5" and Form(1).range([float("nan")]) == "–"


def test_cautions_are_computed_from_the_study():
    verdicts = Verdicts("m", ("a", "b"), (), {})
    row = {
        "domain": "a",
        "how": "reroute",
        "control": "matched",
        "estimate": 0.3,
        "low": 0.2,
        "high": 0.4,
        "controls": 9,
    }
    row |= {
        "own": 0.3,
        "control_own": 0.2,
        "others": 0.1,
        "control_others": 0.5,
        "experts": 15,
        "control_experts": 60.2,
    }
    rows = [row, {**row, "domain": "b", "own": 0.1}, {**row, "control": "busiest", "controls": 1}]

    def said(rows: list[dict]) -> str:
        plan = {"study": "localisation", "settings": {"how": ["reroute"]}}
        study = StudyResult({"plan": plan}, {"contrast": pd.DataFrame(rows)}, {})
        return " ".join(notes_of({"localisation": study}, verdicts)["6"])

    assert "hold 60 experts, the picked ones 15" in said(rows) and "no greater than theirs in b (" in said(rows)
    assert "busiest" not in said(rows)
    unclear = said([*rows[:2], {**rows[2], "low": -0.05, "estimate": 0.06}])
    assert "not shown to be above 0: a 0.06 [-0.05, 0.40]" in unclear
    assert "greater than theirs in every domain" in said(rows[:1])
    assert said([{**row, "controls": 0}]) == ""
