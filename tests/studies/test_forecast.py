"""What is said before the work is what the work then asks of the model, and the time left is what is left of it."""

from typing import Any

import pytest

from moe_lens import HookedMoE
from moe_lens.data import Reading
from moe_lens.model.loading import batch_sizes
from moe_lens.studies import LensStudy, Localisation, PruningStudy, RoutingStudy, SingleExpertStudy, forecast, run
from moe_lens.studies.forecast import Forecast
from tests.studies.tiny import domain, tiny_model

TOKENS = 160
READING = Reading(tokens=TOKENS, context=16)
DOMAINS = ["one", "two"]


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    return tiny_model()


STUDIES = {
    "routing": (RoutingStudy(nulls=True), 1.0),
    "single-expert": (SingleExpertStudy(), 1.0),
    "lens": (LensStudy(), 1.0),
    # Texts that chose no expert of a coalition are not run without it.
    "pruning": (PruningStudy(random=5), 0.7),
    "localisation": (Localisation(experts=1, matched=5), 0.4),
}


@pytest.mark.parametrize(("name", "on_disk"), [("single-expert", False), *((name, True) for name in STUDIES)])
def test_so_many_tokens_go_through_the_model_in_so_many_passes(model, monkeypatch, name, on_disk):
    if on_disk:
        monkeypatch.setattr(batch_sizes, "places", lambda _: {"disk": 1})
    study, least = STUDIES[name]
    texts = [domain(each, n=12, sources=12, seed=seed) for seed, each in enumerate(DOMAINS)]
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    passes: list[int] = []
    said: list[str] = []
    with model.hooks([(last, lambda value, hook: passes.append(value.shape[0] * value.shape[1]))]):
        result: Any = run(study, model, texts, reading=READING, say=said.append)
    found = Forecast(model, [("", study, READING)], DOMAINS, said.append)
    read = result.manifest["read"]
    tokens = sum(of["tokens"] for of in read) / (len(DOMAINS) * TOKENS)
    load = found.whole
    assert said[0] == str(found)
    assert least * load.tokens * tokens <= sum(passes) <= 1.3 * load.tokens * tokens, "padding and special tokens"
    assert least * load.passes <= len(passes) <= load.passes + (2 if name in ("pruning", "localisation") else 0)


def test_time_left_is_what_is_left_at_the_rate_so_far(model, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(forecast.time, "monotonic", lambda: clock[0])
    said: list[str] = []
    routing = RoutingStudy(nulls=True)
    found = Forecast(model, [("a", routing, READING), ("b", routing, READING)], DOMAINS, said.append)
    found.begin()
    assert found.seconds_left() is None and len(said) == 1
    clock[0] += 600
    assert found.seen("a", "model", "one", 80).startswith(" · about ")
    whole, done = sum(found.cost.values()), 0.5 * found.cost["a", "model", "one"]
    assert found.seconds_left() == pytest.approx(600 * (whole - done) / done)
    assert said[1].endswith("left, after 10 min")
    found.seen("b", "nulls", "two", 80)  # what came before was done by a process that was killed
    part = found.cost["b", "nulls", "two"]
    assert found.seconds_left() == pytest.approx(600 * 0.5 * part / (done + 0.5 * part))
    assert len(said) == 2, "not again so soon"
    assert found.seen("b", "nulls", "three", 80) == ""
