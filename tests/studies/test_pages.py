"""The pages of single studies run as they are written, and what they say of the embedded model holds."""

from typing import Any

import pytest

from tests.test_docs import DOCS, code_of


def run(page: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    exec(compile(code_of(DOCS / page), page, "exec"), values)
    assert capsys.readouterr().out
    return values


@pytest.mark.slow
def test_contrasts(capsys: pytest.CaptureFixture[str]):
    steering = run("contrast.md", capsys)["found"].tables["steering"].set_index(["way", "kind"])
    for way in ("forbid", "push"):
        assert steering["low"][way, "picked"] > 0 > steering["effect"][way, "opposite"]


def test_experts_per_token(capsys: pytest.CaptureFixture[str]):
    numbers = run("experts-per-token.md", capsys)["found"].tables["numbers"]
    own, rule = numbers.set_index(["rule", "shuffled"]).xs("k")["ratio"], numbers.query("rule == 'entropy'")
    assert own.iloc[0] == 1 < own.iloc[1], "half as many experts cost something"
    assert rule["gain"].iloc[0] > rule["gain"].iloc[1], "the same numbers are worse when shuffled over tokens"


def test_what_explains_a_choice(capsys: pytest.CaptureFixture[str]):
    values = run("explain.md", capsys)
    layers = values["layers"].set_index("feature")
    assert (layers["explained"]["token"] > 0.03).all()
    # Of so few sources a shuffle may by chance keep a little of the domains: the mean over layers is held to nothing.
    assert (layers["gain_shuffled"].dropna().groupby("feature").mean() < 0.01).all()
    assert "german texts" in " ".join(values["said"]["sentence"])


def test_standing_committee(capsys: pytest.CaptureFixture[str]):
    layers = run("committee.md", capsys)["found"].tables["committee_layers"]
    assert (layers["half"] > layers["control_half"]).mean() > 0.5 and (layers["least"] < 0.5).all()


@pytest.mark.slow
def test_two_checkpoints(capsys: pytest.CaptureFixture[str]):
    overlap = run("checkpoints.md", capsys)["found"].tables["overlap"].set_index("pair")["overlap"]
    assert (overlap["checkpoints"] < 0.95).all() and (overlap["all but routers"] == 1).all()


def test_sparse_probes(capsys: pytest.CaptureFixture[str]):
    probes = run("probe.md", capsys)["probes"].set_index(["kind", "k"])
    assert probes["low"]["experts", 1] > 0.8 and probes["beyond_low"]["experts", 1] > 0.1
