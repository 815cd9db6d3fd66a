import importlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from moe_lens import HookedMoE
from moe_lens.data import Domain, Passage
from moe_lens.errors import InputError
from moe_lens.model.loading.pretrained import resolve_name
from moe_lens.pruning import Frontier, Point, frontier, halved, merge, plan, prune_job, score
from moe_lens.pruning.frontier import ALL
from moe_lens.pruning.speed import SPEED
from moe_lens.report.pruning_page import _page as page_of
from tests.families import build
from tests.pruning.test_scores import nats, texts
from tests.studies.tiny import domain, tiny_model

frontier_module = importlib.import_module("moe_lens.pruning.frontier")  # its name in the package is the function


@pytest.fixture(scope="module")
def model():
    return HookedMoE.from_hf(build("olmoe"), check=False)


@pytest.fixture(scope="module")
def found(model):
    halves = ((texts(1, name="a"), texts(2, name="b")), (texts(11, name="a"), texts(12, name="b")))
    made = frontier(
        model, halves, ["frequency", "random"], [0.5], merged=["frequency"], specialists="frequency", top_k=[1]
    )
    return halves, made


@pytest.mark.typed
def test_every_smaller_model_is_judged_where_it_was_not_calibrated(model, found):
    (first, second), made = found
    assert [Point(*point) for point in made.points] == [
        Point("all experts", ALL, "dropped", 8, 3),
        Point("frequency", ALL, "dropped", 4, 3),
        Point("frequency", ALL, "merged", 4, 3),
        Point("random", ALL, "dropped", 4, 3),
        Point("frequency", "a", "dropped", 4, 3),
        Point("frequency", "a", "merged", 4, 3),
        Point("frequency", "b", "dropped", 4, 3),
        Point("frequency", "b", "merged", 4, 3),
        Point("all experts", ALL, "dropped", 8, 1),
    ]
    expected, apart, merged = [], [], []
    for seen, unseen in ((first, second), (second, first)):
        special = plan(score(model, seen, "frequency"), 0.5, domain="b")
        with special.preview(model):
            expected.append(nats(model, unseen[0], []))
            apart.append(nats(model, seen[0], []))
        with merge(special, model, seen).preview(model):
            merged.append(nats(model, unseen[0], []))
    result = made.of(Point("frequency", "b", "dropped", 4, 3), "a")
    # rows end in padding alike, so that both halves hold as many tokens
    assert result.loss == pytest.approx(sum(expected) / 2, abs=1e-5)
    assert abs(sum(expected) - sum(apart)) > 1e-3
    specialist = made.of(Point("frequency", "b", "merged", 4, 3), "a").loss  # float32, as the models are
    assert specialist == pytest.approx(sum(merged) / 2, abs=1e-5) and abs(specialist - result.loss) > 1e-3
    whole = made.of(made.points[0], "a")
    assert whole.loss == pytest.approx((nats(model, first[0], []) + nats(model, second[0], [])) / 2, abs=1e-5)
    assert set(result.sources) == {source for half in (first, second) for source in half[0].sources}


def test_smaller_models_have_the_active_experts_and_the_draw_of_the_one_that_is_written(model):
    halves = [(texts(1, name="a"),), (texts(11, name="a"),)]
    made = frontier(model, (halves[0], halves[1]), ["reap", "random"], [0.5], top_k=[2], pruned_top_k=2, seed=5)
    assert [point[:1] + point[3:] for point in made.points] == [
        ("all experts", 8, 3), ("reap", 4, 2), ("random", 4, 2), ("all experts", 8, 2)
    ]  # fmt: skip
    method: Any
    for method, seed, other in (("reap", None, {"top_k": 3}), ("random", 5, {"seed": 0})):
        right, wrong = [], []
        for seen, unseen in (halves, halves[::-1]):
            asked = {"seed": seed, "top_k": 2}
            for said, nats_found in ((asked, right), (asked | other, wrong)):
                scores = score(model, seen, method, seed=said["seed"])
                with plan(scores, 0.5, top_k=said["top_k"]).preview(model):
                    nats_found.append(nats(model, unseen[0], []))
        loss = made.of(Point(method, ALL, "dropped", 4, 2), "a").loss
        assert loss == pytest.approx(sum(right) / 2, abs=1e-5) and abs(loss - sum(wrong) / 2) > 1e-4
    assert "reap, 2 active" in str(made.findings())
    figure: Any = made.figure()
    lines = {line.name: line for line in figure.data}
    assert [*lines] == ["reap, 2 active", "random, 2 active"]
    table = made.to_frame().query("top_k == 2")
    shown = sorted(table[table["method"].isin(["reap", "all experts"])]["ratio"])
    assert sorted(lines["reap, 2 active"].y) == shown


def test_findings_are_the_rows_of_the_table(found):
    said, table = str(found[1].findings()), found[1].to_frame()
    for row in table[table["method"] != "all experts"].to_dict("records"):
        line = next(line for line in said.splitlines() if line.strip().startswith(f"{row['method']}  "))
        others = table[(table["method"] == row["method"]) & (table["kept"] == row["kept"])]["ratio"]
        if row["ratio"] in (others.min(), others.max()) and row["treatment"] == "dropped" and row["calibrated"] == ALL:
            assert f"{row['ratio']:.3g} [" in line and f"({row['domain']})" in line


def test_texts_that_several_sources_have_are_said_in_the_findings(tmp_path):
    model, said = tiny_model(), []
    lines = [passage.text for passage in domain("d", n=6, sources=6).passages]
    for repeated in (False, True):
        sources = [*range(6), *([0, 1, 2, 9, 9, 9] if repeated else range(6))]
        halves = halved(Domain.of("d", lines * 2, sources=sources), model, n_tokens=10_000, context=24)
        frontier(model, halves, ["random"], [0.5]).save(tmp_path / "frontier")
        found = Frontier.load(tmp_path / "frontier")
        said.append([line for line in found.findings().warnings if "word for word: d (6); these" in line])
    assert [len(of) for of in said] == [0, 1]


def test_tables_pair_each_model_with_the_whole_one(found, tmp_path):
    _, made = found
    frame = made.to_frame()
    assert len(frame) == 9 * 2
    assert (frame[frame["share"] == 1].query("top_k == 3")["ratio"] == 1).all()
    row = frame[(frame["method"] == "random") & (frame["domain"] == "b")].iloc[0]
    whole = frame[(frame["share"] == 1) & (frame["top_k"] == 3) & (frame["domain"] == "b")].iloc[0]
    assert row["ratio"] == pytest.approx(row["perplexity"] / whole["perplexity"])
    assert frame["ratio_low"].isna().all() and (frame["sources"] == 6).all()  # six sources: too few for an interval
    made.save(tmp_path / "frontier")
    again = Frontier.load(tmp_path / "frontier")
    assert again.to_frame().equals(frame)
    with pytest.raises(InputError, match="was not measured in 'c'"):
        again.of(made.points[0], "c")


def test_a_domain_of_one_source_has_nothing_to_measure_on(model):
    domain = Domain("one", (Passage("text", "book", "x:1"), Passage("more", "book", "x:2")))
    with pytest.raises(InputError, match="domain 'one' has a single source"):
        halved([domain], model, n_tokens=10, context=8)
    twins = Domain("two", (Passage("text", "book/de/1", "x:1"), Passage("more", "book/fr/1", "x:2")))
    with pytest.raises(InputError, match="domain .two. has a single source, .*language code alone are one"):
        halved([twins], model, n_tokens=10, context=8)


def test_parallel_texts_are_in_one_half():
    model = HookedMoE.from_pretrained("tiny-deepseekmoe")

    def domain(language: str) -> Domain:
        return Domain(language, tuple(Passage(f"{i} text " * 9, f"book/{language}/{i}", f"x:{i}") for i in range(10)))

    first, second = halved([domain("de"), domain("fr")], model, n_tokens=10**4, context=8)
    read = [
        [{s.rsplit("/", 1)[1] for batch in tokens for s in batch.sources} for tokens in half]
        for half in (first, second)
    ]
    assert [[len(of) for of in half] for half in read] == [[5, 5], [5, 5]]
    assert read[0][0] == read[0][1] and read[1][0] == read[1][1] and not read[0][0] & read[1][1]
    # A control: names that share no document are divided each by its own draw.
    alone = [
        replace(domain(name), passages=tuple(replace(p, source=name + p.source[-1]) for p in domain(name).passages))
        for name in ("de", "fr")
    ]
    parts = halved(alone, model, n_tokens=10**4, context=8)
    assert [{s[-1] for batch in tokens for s in batch.sources} for tokens in parts[0]][0] != {
        s[-1] for batch in parts[0][1] for s in batch.sources
    }


def test_the_figures_hold_the_numbers_of_the_table(found):
    from moe_lens import viz

    _, made = found
    frame = made.to_frame()
    figure: Any = viz.frontier(made)
    names = [trace.name for trace in figure.data]
    assert names == [name for name in ("frequency", "frequency, merged", "random") for _ in range(2)]
    shown = figure.data[4].y
    expected = frame[(frame["method"] == "random") & (frame["domain"] == "a")]["ratio"].iloc[0]
    assert list(shown) == [expected, 1.0]
    ratios = frame[(frame["calibrated"] == "a") & (frame["domain"] == "b")].set_index("treatment")["ratio"]
    assert ratios["dropped"] != ratios["merged"]
    for treatment in ("dropped", "merged"):
        special_figure: Any = viz.specialists(made, 4, treatment=treatment)
        heat = special_figure.data[0]
        assert list(heat.y) == [ALL, "a", "b"] and list(heat.x) == ["a", "b"]
        assert heat.z[1][1] == ratios[treatment]


def test_the_whole_model_is_unchanged_afterwards(model, found):
    state = build("olmoe").state_dict()
    assert all(
        torch.equal(value, state[name.replace("_original_component.", "")])
        for name, value in model.original_model.state_dict().items()
        if name.replace("_original_component.", "") in state
    )


def test_a_smaller_model_that_is_asked_for_twice_counts_its_texts_once(model, found):
    halves, _ = found
    once = frontier(model, halves, ["frequency"], [0.5], top_k=[1]).to_frame()
    again = frontier(model, halves, ["frequency", "frequency"], [0.5, 4, 0.5], top_k=[1, 3, 1]).to_frame()
    assert again.equals(once)


def test_what_a_frontier_would_not_measure_is_refused(model, found):
    halves, _ = found
    wrong: list[tuple[Any, Any, dict[str, Any], str]] = [
        (halves, [], {}, "methods is empty"),
        (halves, ["random"], {"merged": ["frequency"]}, "merged names 'frequency', which is not among the methods"),
        ((halves[0], halves[1][:1]), ["random"], {}, "expected two halves of the same ones"),
        (((texts(name=ALL),), (texts(2, name=ALL),)), ["random"], {"specialists": "random"}, "is called 'all'"),
    ]
    for given, methods, more, message in wrong:
        with pytest.raises(InputError, match=message):
            frontier(model, given, methods, [0.5], **more)


def test_speed_is_not_measured_of_a_model_that_is_read_from_disk(model, found, monkeypatch):
    """A round of it is 66 passes over the disk."""
    monkeypatch.setattr(prune_job, "speed", lambda models: pytest.fail(f"{[*models]} are timed"))
    monkeypatch.setattr(prune_job, "places", lambda _: {"cpu": 1, "disk": 1})
    size, speed = prune_job.compare("tiny-deepseekmoe", Path(resolve_name("tiny-deepseekmoe")))
    assert len(set(size["parameters"].tolist())) == 1 and len(speed) == 0 and list(speed) == list(SPEED)
    scores = score(model, [texts(1, name="a")], "frequency")
    settings = prune_job.PruneSettings("m", 0.5, "frequency", False, "layer", False, None, None, (), 9, 0)
    made = prune_job.Pruned(settings, scores, plan(scores, 0.5), found[1])
    said = "Not measured: one of the two models does not fit"
    assert said in page_of(made, size, speed)
    timed = pd.DataFrame([("original", "prefill", 1, 9.0, 1.0)], columns=[*SPEED])
    assert said not in page_of(made, size, timed)


def test_a_full_disk_is_noticed_before_experts_are_scored(tmp_path, monkeypatch):
    """Scoring, and the frontier, take hours of a large model."""
    model, began = HookedMoE.from_pretrained("tiny-deepseekmoe"), []
    settings = prune_job.PruneSettings("tiny-deepseekmoe", 0.5, "reap", False, "layer", False, None, None, (), 99, 0)
    text = Domain("a", tuple(Passage(f"{i} text " * 9, f"{i}", f"x:{i}") for i in range(10)))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(InputError, match=r"the smaller model takes 0.01 GB, and 0.00 GB are free"):
        prune_job.prune(model, [text], settings, tmp_path / "out", watch=began.append)
    assert not began


@pytest.mark.parametrize(
    ("model_type", "passes"), [pytest.param("olmoe", 2, marks=pytest.mark.typed), ("deepseek_v3", 6)]
)
def test_plans_that_hide_experts_share_passes_where_those_are_dear(monkeypatch, model_type, passes):
    """Not those of a router with a bias of its own for the choice, which would choose what has no affinity."""
    no_groups: dict[str, Any] = {"n_group": 1, "topk_group": 1} if model_type == "deepseek_v3" else {}
    model, ran = HookedMoE.from_hf(build(model_type, **no_groups), check=False), []
    halves = ((texts(1, name="a"),), (texts(11, name="a"),))
    arguments: tuple[Any, ...] = (model, halves, ["frequency", "random"], [0.5])
    apart = frontier(*arguments)
    monkeypatch.setattr(frontier_module, "wants_few_passes", lambda _: True)
    losses = frontier_module.losses
    monkeypatch.setattr(frontier_module, "losses", lambda *given: ran.append(1) or losses(*given))
    for tokens in (10**6, 1):
        monkeypatch.setattr(frontier_module, "tokens_at_once", lambda *_, tokens=tokens: tokens)
        ran.clear()
        together = frontier(*arguments)
        assert len(ran) == (passes if tokens > 1 else 6) * len(halves[0][0])
        assert together.points == apart.points and together.sources == apart.sources
        assert torch.allclose(together.nats, apart.nats, rtol=1e-6)
        assert torch.allclose(together.row_losses, apart.row_losses, rtol=1e-6)
    assert not torch.allclose(apart.nats[1], apart.nats[2], rtol=1e-4), "the plans differ"
