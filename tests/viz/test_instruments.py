"""Figures of contrast, explain, probe and checkpoints have the numbers of their tables; `compare` knows three."""

from typing import Any

import pytest

from moe_lens import viz
from moe_lens.data import Reading
from moe_lens.errors import InputError
from moe_lens.studies import (
    Checkpoints,
    Explain,
    Probe,
    StudyResult,
    by_pattern,
    compare,
    contrast_prompts,
    label_tokens,
    run,
)
from tests.planted import ATLAS_READING, WORDS, planted_domains, planted_model
from tests.studies.test_checkpoints import perturbed
from tests.studies.test_contrast import pairs_of
from tests.studies.tiny import domain, tiny_model

SHORT = Reading(tokens=None, context=48)
ORDER = 1e-12  # means over some ten sources in float64, in another order
MANY = 1e-9  # sums of nats over thousands of tokens, or of hundreds of differences


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, StudyResult]:
    """One of each, as read from its folder."""
    model, texts, folder = planted_model(), planted_domains(shuffled=True), tmp_path_factory.mktemp("instruments")
    labels = label_tokens(model, texts, by_pattern({name: "|".join(WORDS[name]) for name in ("sea", "law")}))
    how: dict[str, Any] = {"experts": 1, "matched": 2, "neutral_matched": 1, "draws": 200}
    pairs = pairs_of(model, "sea", "law")
    contrast_prompts(model, pairs, [domain("n", n=12)], reading=ATLAS_READING, out=folder / "contrast", **how)
    run(Explain(), model, texts, reading=ATLAS_READING, out=folder / "explain")
    run(Probe(labels, (1, 2)), model, texts, reading=ATLAS_READING, out=folder / "probe")
    other = perturbed(tiny_model(), "gate.weight")
    both = [domain("a", n=12), domain("b", n=12, seed=1)]
    run(Checkpoints(other), tiny_model(), both, reading=SHORT, out=folder / "checkpoints")
    return {path.name: StudyResult.load(path) for path in folder.iterdir()}


def numbers(figure: Any, name: str) -> list[float]:
    return [value for trace in figure.data if trace.name == name for value in trace.y]


@pytest.mark.parametrize("name", ["contrast", "explain", "probe", "checkpoints"])
def test_each_has_its_figures_and_refuses_others(made, name):
    result = made[name]
    drawn = [result.figure(each) for each in viz.figures_of(result)]
    assert drawn and all(figure.data for figure in drawn)
    assert result.figure().to_json() == drawn[0].to_json()
    stranger = next(of for other, of in made.items() if other != name)
    with pytest.raises(InputError, match="got the result of"):
        getattr(viz, viz.figures_of(result)[0])(stranger)


@pytest.mark.typed
def test_figures_show_the_numbers_of_the_tables(made):
    tables = {name: of.tables for name, of in made.items()}
    figure: Any = viz.contrast_map(made["contrast"])
    experts = tables["contrast"]["experts"]
    assert figure.data[0].z.sum() == pytest.approx(experts["difference"].sum(), abs=MANY)
    assert len(figure.data[1].x) == (experts["p_value"] <= 0.05).sum() > 0
    steered = tables["contrast"]["steering"].query("kind == 'picked'")["effect"]
    assert numbers(viz.contrast_steering(made["contrast"]), "picked on the other half of the units") == list(steered)
    layers = tables["explain"]["layers"]
    figure = viz.choices_explained(made["explain"])
    assert numbers(figure, "token") == list(layers.query("feature == 'token'")["explained"])
    assert numbers(figure, "domain") == list(layers.query("feature == 'domain'")["gain"])
    assert numbers(figure, "domain, shuffled") == list(layers.query("feature == 'domain'")["gain_shuffled"])
    probes = tables["probe"]["probes"].query("k == 2 and kind == 'neurons'").sort_values(["label"], kind="stable")
    found = viz.probe_accuracy(made["probe"], k=2)
    assert sorted(numbers(found, "neurons")) == sorted(probes["accuracy"])
    assert sorted(numbers(found, "neurons, shuffled labels")) == sorted(probes["shuffled"])
    with pytest.raises(InputError, match=r"no probes of k = 3; there are those of \[1, 2\]"):
        viz.probe_accuracy(made["probe"], k=3)
    overlap, losses = tables["checkpoints"]["overlap"], tables["checkpoints"]["losses"]
    figure = viz.routing_overlap(made["checkpoints"])
    assert numbers(figure, "both as they are") == list(overlap.query("pair == 'checkpoints'")["overlap"])
    assert numbers(figure, "both as they are, by load alone") == list(overlap.query("pair == 'checkpoints'")["by_load"])
    run_ = "first with the other's routers"
    costs = numbers(viz.swapped_router_costs(made["checkpoints"]), run_)
    assert costs == list(losses[losses["run"] == run_]["added"])


def test_without_answers_nothing_was_steered(made):
    from dataclasses import replace

    tables = {name: table for name, table in made["contrast"].tables.items() if name != "steering"}
    with pytest.raises(InputError, match="no answers, so that nothing was steered"):
        viz.contrast_steering(replace(made["contrast"], tables=tables))


def test_compare_has_the_numbers_of_the_tables_and_itself_has_no_differences(made):
    columns: dict[str, Any] = {"names": ("one", "same")}
    found: Any = compare(made["checkpoints"], made["checkpoints"], **columns).table
    assert (found["difference"] == 0).all() and found["paired"].all()
    overlap = made["checkpoints"].tables["overlap"].query("domain == 'b' and pair == 'routers'")
    rows = found[(found["domain"] == "b") & (found["quantity"] == "overlap") & found["of"].str.startswith("routers,")]
    assert list(rows["one"]) == pytest.approx(list(overlap["overlap"]), abs=ORDER)
    losses = made["checkpoints"].tables["losses"].query("domain == 'a' and run.str.contains('with')")
    rows = found[(found["domain"] == "a") & (found["quantity"] == "added loss")]
    assert list(rows["one"]) == pytest.approx(list(losses["added"]), abs=ORDER)
    two: Any = compare(made["checkpoints"], domains=("a", "b")).table
    assert (two["difference"] != 0).any()

    found = compare(made["contrast"], made["contrast"], **columns).table
    experts = made["contrast"].tables["experts"].sort_values(["layer", "expert"])
    assert list(found[found["quantity"] == "A minus B"]["one"]) == pytest.approx(list(experts["difference"]), abs=ORDER)
    steered = made["contrast"].tables["steering"].query("kind != 'matched'")["effect"]
    assert list(found[found["quantity"] == "effect"]["one"]) == pytest.approx(list(steered), abs=MANY)

    found = compare(made["probe"], made["probe"], **columns).table
    probes: Any = made["probe"].tables["probes"].query("label == 'sea' and layer == 2 and kind == 'experts' and k == 1")
    rows = found[found["of"] == "sea, layer 2, experts, k = 1"].pivot(index="quantity", columns="domain", values="one")
    tokens = {}  # of each domain, those without and with the label; the table is of all domains together
    for domain_, of in made["probe"].results.items():
        counted: Any = of["probes"]
        tokens[domain_] = counted.tokens[:, counted.labels.index("sea"), 0].sum(0).tolist()
    share = [
        sum(rows[name][kind] * n[has] for name, n in tokens.items()) / sum(n[has] for n in tokens.values())
        for has, kind in enumerate(("false alarms", "recall"))
    ]
    assert (share[1] + 1 - share[0]) / 2 == pytest.approx(probes["accuracy"].item(), abs=ORDER)

    with pytest.raises(InputError, match="two studies 'explain' cannot be compared: they keep no sums by source"):
        compare(made["explain"], made["explain"], **columns)
