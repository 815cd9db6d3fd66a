"""The atlas against counts and ablations made by hand, on a model whose truth is planted."""

import math
from collections.abc import Generator
from typing import Any

import pandas as pd
import pytest
import torch

from moe_lens import HookedMoE
from moe_lens.data import Reading, batch_windows, shards
from moe_lens.errors import InputError
from moe_lens.stats import RoutingResult
from moe_lens.studies import Atlas, StudyResult, atlas, atlas_knockouts, atlas_reading, run
from moe_lens.studies.atlas_choice import RARE
from moe_lens.studies.atlas_knockouts import costliest
from moe_lens.studies.forward_passes import losses, predicted
from moe_lens.studies.localisation_effects import FIRST, CoalitionEffects
from tests.planted import ATLAS_READING, LAYER, OWN_TEXT, PLANTED, WORDS, planted_atlas, planted_domains
from tests.studies.tiny import assert_same, tiny_hf
from tests.wrapped import untouched

F64 = 1e-12  # sums of few numbers in float64, taken in another order: what rounding there may differ by


@pytest.fixture(scope="module")
def model() -> HookedMoE:
    model, _ = planted_atlas()
    return model


@pytest.fixture(scope="module")
def found(model) -> Generator[StudyResult]:
    with untouched(model):
        yield planted_atlas()[1]


@pytest.fixture(scope="module")
def by_hand(model) -> Any:
    """A row for each counted token: domain, source, position, token, and experts, weights and logits of the layer."""
    rows = []
    for of in planted_domains():
        for shard in shards(of, model, ATLAS_READING):
            for window in shard.windows:
                _, cache = model.run_with_cache(torch.tensor([window.ids]))
                routing = cache.routing(LAYER)
                for pos in range(window.opening, len(window.ids)):
                    slots = (routing.indices[0, pos].tolist(), routing.weights[0, pos].tolist())
                    logits = cache["router_logits", LAYER][0, pos].tolist()
                    rows.append((of.name, window.source, pos, window.ids[pos], *slots, logits))
    return pd.DataFrame(rows, columns=["domain", "source", "position", "token", "experts", "weights", "logits"])


def here(result: StudyResult, table: str, **equal: Any) -> Any:
    rows: Any = result.tables[table].query(f"layer == {LAYER}")
    for column, value in equal.items():
        rows = rows[rows[column] == value]
    assert len(rows), (table, equal)
    return rows


def tokens_of(model: Any, domain: str) -> set[int]:
    return {token for word in WORDS[domain] for token in model.tokenizer.encode(f" {word}", add_special_tokens=False)}


def test_shares_tokens_and_their_lifts_are_those_counted_by_hand(found, by_hand):
    for row in here(found, "domains").to_dict("records"):
        own = by_hand[by_hand["domain"] == row["domain"]]
        chose = own["experts"].map(lambda experts, row=row: row["expert"] in experts)
        assert (row["assigned"], row["tokens"]) == (chose.sum(), len(own))
        every = by_hand["experts"].map(lambda experts, row=row: row["expert"] in experts)
        chance = every.groupby(by_hand["token"]).mean()
        assert row["token_alone"] == pytest.approx(own["token"].map(chance).mean(), abs=F64)
    for row in here(found, "tokens").to_dict("records"):
        chose = by_hand["experts"].map(lambda experts, row=row: row["expert"] in experts)
        of_token = by_hand["token"] == row["token"]
        assert (row["assigned"], row["occurred"]) == ((chose & of_token).sum(), of_token.sum())
        assert row["lift"] == pytest.approx(chose[of_token].mean() / chose.mean(), abs=F64)
        assert row["lift"] > 1 and row["occurred"] >= 5


def test_the_token_explains_the_planted_experts_and_nothing_is_left_to_the_domain(found):
    for name, expert in PLANTED.items():
        explained = here(found, "explained", expert=expert).set_index("feature")
        assert explained["auc_low"]["token"] > 0.99 and explained["gain"]["domain"] < 0.05
        said = here(found, "chosen_for", expert=expert).iloc[0]
        assert said["precision"] > 0.95 and said["recall"] > 0.9
        assert not any(f"{other} texts" in said["sentence"] for other in PLANTED if other != name)


def test_sentences_hold_out_parallel_sources_together(model, monkeypatch):
    """As what explains choices does: a document in two languages is not in both halves."""
    asked: list[Any] = []
    monkeypatch.setattr(atlas, "chosen_for", lambda samples, text_of, **how: asked.append(how))
    monkeypatch.setattr(Atlas, "_explained", lambda *_: {})
    monkeypatch.setattr(atlas_reading, "tables", lambda *_: {})
    monkeypatch.setattr(atlas_reading, "words", lambda *_: pd.DataFrame())
    Atlas().read_off(model, {}, {})
    (how,) = asked
    key = how["parallel"]
    assert key("book/en/3") == key("book/de/3") != key("book/en/4")


def test_contexts_are_the_strongest_random_ones_and_those_that_nearly_chose(found, by_hand):
    places = by_hand.set_index(["domain", "source", "position"])
    table = here(found, "contexts")
    for row in table.to_dict("records"):
        token = places.loc[(row["domain"], row["source"], row["position"])]
        assert row["tokens"][row["at"]] == token["token"]
        chosen = dict(zip(token["experts"], token["weights"], strict=True))
        assert row["weights"][row["at"]] == pytest.approx(chosen.get(row["expert"], 0), abs=1e-6)
        assert (row["expert"] in chosen) == (row["kind"] != "nearly")
    for expert, rows in table.groupby("expert"):
        all_weights = [
            weights[experts.index(expert)]
            for experts, weights in zip(by_hand["experts"], by_hand["weights"], strict=True)
            if expert in experts
        ]
        missed = [
            logits[expert] - min(logits[e] for e in experts)
            for experts, logits in zip(by_hand["experts"], by_hand["logits"], strict=True)
            if expert not in experts
        ]
        of = {kind: rows[rows["kind"] == kind].sort_values("place") for kind in ("strongest", "random", "nearly")}
        assert list(of["strongest"]["score"]) == pytest.approx(sorted(all_weights)[::-1][:6], abs=1e-6)
        assert list(of["nearly"]["score"]) == pytest.approx(sorted(missed)[::-1][:3], abs=1e-5)
        assert len(of["random"]) == min(6, len(all_weights)) and (of["random"]["score"].diff().dropna() <= 0).all()


def test_it_says_whose_expert_it_is_how_sure_it_is_and_what_it_writes(model, found):
    for name, expert in PLANTED.items():
        row = here(found, "domains", domain=name, expert=expert).iloc[0]
        assert (row["share"], row["first"]) == (1, 1) and row["p_value"] < 0.01
        own = here(found, "compared", domain=name, place=0).iloc[0]
        assert own["expert"] == expert
        assert own["starred"] and 0 < own["all_low"] < own["low"] <= own["added"] <= own["high"]
        assert own["controls"] == 4 and abs(own["control_mass"] / own["mass"] - 1) < 0.1
        assert own["control_most"] == 0 and own["over_most"] == own["added"] and own["by"] == "share"
        knocked = here(found, "knockouts", expert=expert).set_index("read")["added"]
        assert knocked[name] == own["added"] and max(abs(knocked.drop(name))) < 1e-6
        written = here(found, "writing", of="mean", expert=expert, effect="promoted")
        assert set(written["token"][:5]) <= tokens_of(model, name) and written["recurs"][:5].all()
        neuron = here(found, "neurons", expert=expert, place=0).iloc[0]
        assert neuron["neuron"] == 0
        of_neuron = here(found, "writing", of="neuron", expert=expert, number=0, effect="promoted")
        assert set(of_neuron["token"]) <= tokens_of(model, name)
        router = here(found, "writing", of="router", expert=expert)
        assert set(router["token"][:5]) <= tokens_of(model, name)


def test_knockouts_and_first_order_effects_are_those_of_ablating_and_of_gradients(model, found):
    batches = [
        batch
        for shard in shards(planted_domains()[0], model, ATLAS_READING)
        for batch in batch_windows(shard.windows, model, batch_tokens=10**6)
    ]
    for expert in (PLANTED["sea"], 14):
        added = tokens = 0.0
        for batch in batches:
            mask = predicted(batch)
            whole, without = (losses(model, batch, hooks) for hooks in ([], _without(model, expert)))
            added += float(((without - whole).double() * mask).sum())
            tokens += int(mask.sum())
        row = here(found, "knockouts", expert=expert, read="sea").iloc[0]
        assert row["tokens"] == tokens
        assert row["added"] == pytest.approx(added / tokens, abs=1e-5)
    small, step = 0.0, 1e-2
    for batch in batches:
        ends = [losses(model, batch, _without(model, PLANTED["sea"], part)) for part in (1 - step, 1 + step)]
        small += float(((ends[0] - ends[1]).double() * predicted(batch)).sum()) / (2 * step)
    row = here(found, "domains", domain="sea", expert=PLANTED["sea"]).iloc[0]
    assert row["saved"] == pytest.approx(small / row["predicted"], rel=1e-2)
    assert row["saved_low"] <= row["saved"] <= row["saved_high"]


def test_every_expert_is_taken_out_and_controls_are_whole_coalitions_of_their_layer(model, found):
    table: Any = found.tables["knockouts"]
    assert len(table) == 2 * 16 * len(PLANTED) and not table[["added", "low", "high"]].isna().any().any()
    batches = [
        batch
        for shard in shards(planted_domains()[0], model, ATLAS_READING)
        for batch in batch_windows(shard.windows, model, batch_tokens=10**6)
    ]
    sea: Any = here(found, "domains", domain="sea", expert=PLANTED["sea"]).iloc[0]
    own = here(found, "knockouts", expert=PLANTED["sea"], read="sea").iloc[0]
    assert own["first_order"] == pytest.approx(sea["saved"], rel=1e-6)  # here the beginnings are all of the windows
    for control in here(found, "controls", domain="sea", expert=PLANTED["sea"]).to_dict("records"):
        assert PLANTED["sea"] not in control["experts"]
        added = tokens = 0.0
        for batch in batches:
            with model.ablate({LAYER: list(control["experts"])}, how="zero"):
                without = losses(model, batch, [])
            counted = predicted(batch)
            added += float((without - losses(model, batch, [])).double()[counted].sum())
            tokens += int(counted.sum())
        assert control["added"] == pytest.approx(added / tokens, abs=1e-5)


def test_the_costliest_are_held_against_controls_and_corrected_for_all_that_could_have_been(found):
    compared, knocked = found.tables["compared"], found.tables["knockouts"]
    best = knocked.sort_values("added", ascending=False).drop_duplicates(["layer", "expert"]).head(5)
    dear = best[best["added"] > 0]
    assert len(dear) >= len(PLANTED)
    columns = ["layer", "expert", "domain"]
    held = {tuple(key) for key in compared[columns].to_numpy()}
    assert {tuple(key) for key in dear.rename(columns={"read": "domain"})[columns].to_numpy()} <= held
    assert not compared.duplicated(columns).any()
    by_cost = compared[compared["by"] == "cost"]
    assert not by_cost["starred"].fillna(False).any()  # the planted experts alone cost anything
    made, among = costliest({"a": _routing()}, {"a": _lost([0.0, 0.3, 0.2, -0.1])})
    assert made == [(0, 0, 1), (0, 0, 2)] and among == 4


def _routing() -> RoutingResult:
    n, zeros = 12, torch.zeros(12, 1, 4)
    sources = tuple(f"s{i:02}" for i in range(n))
    sums = torch.zeros(n, 1, 2)
    return RoutingResult((0,), 1, sources, torch.ones(n).long(), zeros.long(), zeros.long(), zeros, sums, sums.long())


def _lost(added: list[float]) -> CoalitionEffects:
    whole = torch.tensor(added).double().expand(12, 1, 1, 4)
    sources = tuple(f"s{i:02}" for i in range(12))
    n = torch.ones(12).long()
    return CoalitionEffects(("zero",), ("expert",) * 4, sources, n.double(), n, whole, torch.ones_like(whole).long())


def test_what_falls_on_the_first_tokens_of_windows_is_that_of_reading_them_alone(model, found):
    batches = [
        batch
        for shard in shards(planted_domains()[0], model, ATLAS_READING)
        for batch in batch_windows(shard.windows, model, batch_tokens=10**6)
    ]
    for expert in (PLANTED["sea"], 14):
        at_first = tokens = 0.0
        for batch in batches:
            first = predicted(batch) & (predicted(batch).cumsum(-1) <= FIRST)
            whole, without = (losses(model, batch, hooks) for hooks in ([], _without(model, expert)))
            at_first += float(((without - whole).double() * first).sum())
            tokens += int(predicted(batch).sum())
        row = here(found, "knockouts", expert=expert, read="sea").iloc[0]
        assert row["at_first"] == pytest.approx(at_first / tokens, abs=1e-5)
        assert expert != PLANTED["sea"] or row["at_first"] < 0.9 * row["added"]


def test_of_many_experts_only_the_foremost_are_taken_out(model, monkeypatch):
    monkeypatch.setattr(atlas_knockouts, "EVERY", 31)
    table: Any = run(Atlas(contexts=False), model, planted_domains(sources=3), reading=ATLAS_READING).tables
    knocked = set(zip(table["knockouts"]["layer"], table["knockouts"]["expert"], strict=True))
    assert knocked == set(zip(table["compared"]["layer"], table["compared"]["expert"], strict=True))
    assert set(table["compared"]["domain"]) == set(PLANTED)
    assert {(LAYER, expert) for expert in PLANTED.values()} <= knocked and len(knocked) < 13


def test_strongest_pairs_and_losses_are_those_counted_by_hand(model, found, by_hand):
    pairs = here(found, "pairs")
    both = by_hand["experts"].map(lambda of: {(a, b) for a in of for b in of if a < b}).explode().value_counts()
    most = pairs.sort_values("by_tokens").dropna(subset="by_tokens")
    assert most["tokens"].tolist() == both.tolist()[: len(most)] and len(most) == 15
    share = by_hand["experts"].explode().value_counts() / len(by_hand)
    for row in pairs.to_dict("records"):
        n = both[(row["expert"], row["other"])]
        chance = share[row["expert"]] * share[row["other"]]
        assert (row["tokens"], row["of"]) == (n, len(by_hand))
        assert row["lift"] == pytest.approx(n / len(by_hand) / chance, abs=1e-9)
    nats = tokens = 0.0
    for shard in shards(planted_domains()[0], model, ATLAS_READING):
        for batch in batch_windows(shard.windows, model, batch_tokens=10**6):
            nats += float(losses(model, batch, []).double()[predicted(batch)].sum())
            tokens += int(predicted(batch).sum())
    quality: Any = found.tables["quality"].set_index("domain").loc["sea"]
    assert quality["loss"] == pytest.approx(nats / tokens, rel=1e-6) and quality["tokens"] == tokens
    assert quality["low"] < quality["loss"] < quality["high"] < quality["uniform"] == pytest.approx(math.log(4096))


def test_parts_of_characters_are_shown_as_their_bytes():
    assert atlas_reading._spelt("\u0120\u00e2", " \ufffd") == " \\xe2" and atlas_reading._spelt("\u2581", "x") == "x"


def _without(model: Any, expert: int, part: float = 0.0) -> Any:
    """Hooks that leave a part of what an expert adds."""
    name = f"blocks.{LAYER}.mlp.hook_routing_weights"

    def weigh(weights: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        return weights * torch.where(model.experts_in_slots(LAYER) == expert, part, 1.0)

    return [(name, weigh)]


def test_texts_are_shown_with_their_routing_and_the_lens_of_each_rank(model, found):
    tokens: Any = found.tables["text_tokens"]
    own = tokens[tokens["domain"] == ""]
    assert model.tokenizer.decode(own["token"].tolist()) == OWN_TEXT
    assert set(tokens["domain"]) == {*WORDS, ""} and set(tokens.groupby("domain")["text"].nunique()) == {1, 2}
    ids = torch.tensor([model.own_ids("")[0] + own["token"].tolist()])
    logits, cache = model.run_with_cache(ids)
    opening = ids.shape[1] - len(own)
    assert own["predicted"].tolist() == logits[0, opening:].argmax(-1).tolist()
    slots = here(found, "text_slots", text=own["text"].iloc[0])
    routing = cache.routing(LAYER)
    for row in slots.to_dict("records"):
        at = 0, opening + row["pos"], row["rank"]
        assert row["expert"] == routing.indices[at] and row["weight"] == pytest.approx(float(routing.weights[at]))
        stream = cache["resid_mid", LAYER][at[:2]] + cache["expert_weighted", LAYER][at]
        probs = model.unembed(model.ln_final(stream[None, None]))[0, 0].softmax(-1)
        assert row["token"] == int(probs.argmax()) and row["prob"] == pytest.approx(float(probs.max()), abs=1e-6)


def test_negative_control_where_domains_mean_nothing_no_expert_is_a_domains(model):
    study = Atlas(contexts=False)
    result = run(study, model, planted_domains(shuffled=True), reading=ATLAS_READING)
    table: Any = result.tables["domains"]
    assert table["p_value"].min() > 0.05
    assert here(result, "domains")["first"].max() < 0.95
    assert not {"contexts", "text_tokens", "text_slots"} & set(result.tables)


def test_beside_the_tables_it_keeps_sums_by_source_and_no_texts_neurons_or_outputs(found):
    """What is dropped took nine tenths of the room: it grows with the vocabulary, or with the width of experts."""
    effects = {"knockouts", "firsts", "controls", "costliest", "first_order", "first_order_beginnings"}
    for of in found.results.values():
        assert of.keys() == {"routing", "loss", *effects}
        assert all(kept.sources for kept in of.values())


def test_resumed_it_is_the_same_and_what_one_small_domain_cannot_tell_is_missing(model, tmp_path):
    texts = planted_domains(sources=3)[:1]
    reading = Reading(tokens=None, context=24, shard_tokens=30)
    whole = run(Atlas(), model, texts, reading=reading)
    shards_read = 0

    def interrupt(what: str, tokens: int) -> None:  # noqa: ARG001
        nonlocal shards_read
        shards_read += 1
        if shards_read in (2, 5, 8):
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(Atlas(), model, texts, reading=reading, out=tmp_path / "atlas", watch=interrupt)
    resumed = run(Atlas(), model, texts, reading=reading, out=tmp_path / "atlas", watch=interrupt)
    assert_same(resumed, whole)
    for name, table in whole.tables.items():
        pd.testing.assert_frame_equal(resumed.tables[name], table, check_dtype=False)
    domains: Any = whole.tables["domains"]
    assert domains[["difference", "p_value", "first", "low"]].isna().all().all()
    experts: Any = whole.tables["experts"]
    rare = experts[experts["rare"]]
    assert 0 < len(rare) < len(experts) and (experts["rare"] == (experts["assigned"] < RARE)).all()
    tables: Any = whole.tables
    for table in (tables["neurons"], tables["writing"].query("of == 'mean'")):
        told = set(zip(table["layer"], table["expert"], strict=True))
        assert told and not told & set(zip(rare["layer"], rare["expert"], strict=True))


def test_what_cannot_be_done_is_refused(model):
    with pytest.raises(InputError, match="knockout_tokens is 0; expected at least 1"):
        run(Atlas(knockout_tokens=0), model, planted_domains())
    all_active = HookedMoE.from_hf(tiny_hf(n_routed_experts=4, num_experts_per_tok=4))
    with pytest.raises(InputError, match="this model always chooses all its 4 experts: no choice is left to show"):
        run(Atlas(), all_active, planted_domains())
    with pytest.raises(InputError, match="the text '' holds no token"):
        run(Atlas(texts=("",)), model, planted_domains())
    fits = (model.cfg.n_ctx - len(model.own_ids("")[0])) // len(model.own_ids(" ship")[1])
    Atlas(texts=(" ship" * fits,)).check(model)
    with pytest.raises(InputError, match=f"tokens; the model's context is {model.cfg.n_ctx}"):
        run(Atlas(texts=(" ship" * (fits + 1),)), model, planted_domains())
