"""The pages of single studies run as they are written, and what they say of the embedded model holds."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lens import HookedMoE, studies
from moe_lens.data import Reading, embedded_domain
from moe_lens.studies import RoutingStudy, SingleExpertStudy, collect
from tests.test_docs import DOCS, code_of


def run(page: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    exec(compile(code_of(DOCS / page), page, "exec"), values)
    assert capsys.readouterr().out or page == "pruning.md"
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


@pytest.mark.slow
def test_localisation(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    wide = run("localisation.md", capsys)["wide"].query("control == 'matched'")
    assert set(wide["domain"]) == {"french", "german"} and (wide["low"] < wide["estimate"]).all()


FEW = Reading(tokens=96, context=32)


def test_saved_studies_and_activations(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    model, domains = HookedMoE.from_pretrained("tiny-deepseekmoe"), [embedded_domain("code")]
    studies.run(SingleExpertStudy(treatments=("dropped",)), model, domains, reading=FEW, out="runs/single")
    collect(model, domains, "runs/activations", hooks=["blocks.3.hook_resid_mid"], reading=FEW)
    values = run("studies.md", capsys)
    assert sum(1 for _ in values["rows"]) == values["saved"].n_tokens > 96 and len(values["figure"].data)
    assert values["shard"]["blocks.3.hook_resid_mid"].shape[1] == model.cfg.d_model


def test_verdicts_with_a_threshold_of_ones_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    model, domains = HookedMoE.from_pretrained("tiny-deepseekmoe"), [embedded_domain("code"), embedded_domain("math")]
    studies.run(RoutingStudy(), model, domains, reading=FEW, out="moe-lens-report/routing")
    found = run("paper.md", capsys)["found"]
    said = found.to_frame()["inference"]
    assert "study pruning was not run" in said[5] and "was not run" not in said[0] and found.changed() == ("agreement",)


def test_a_pruned_model_is_previewed(capsys: pytest.CaptureFixture[str]):
    values = run("pruning.md", capsys)
    assert (values["logits"] != values["model"](values["tokens"])).any()


def test_packed_experts(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("bitsandbytes")
    values = run("quantised.md", capsys)
    assert values["cache"]["expert_out", 3].shape[-1] == values["model"].cfg.d_model


def test_routing_that_an_engine_exported():
    """The two blocks before it need the engines."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", (DOCS / "large-models.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    values: dict[str, Any] = {"ids": torch.rand(5, 58, 256).topk(8).indices.numpy()}
    exec(compile(blocks[-1], "large-models.md", "exec"), values)
    assert [bool("vllm" in block or "sglang" in block) for block in blocks] == [True, True, False]
    assert values["routing"].layers == tuple(range(3, 61)) and values["routing"].n_experts == 256
