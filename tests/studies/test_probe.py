"""Sparse probes: against sums written out, the planted experts, labels that mean nothing, and spans of texts."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from moe_lens import HookedMoE
from moe_lens.cli import main
from moe_lens.data import Domain, Passage, from_generator
from moe_lens.data.windows import windows_of
from moe_lens.errors import InputError
from moe_lens.model.loading.tokenizer import load_tokenizer
from moe_lens.resampling import bootstrap_all
from moe_lens.stats.sparse_probes import ProbeResult, Sums, at_components, component_sums, discriminant, pick_components
from moe_lens.studies import Probe, StudyResult, by_pattern, label_tokens, read_facts, read_pairs, read_spans, run
from moe_lens.studies.probe import K
from moe_lens.studies.study import TEXTS
from moe_lens.studies.texts_read import TextStats
from moe_lens.studies.token_labels import LabelTable, Span
from moe_lens.studies.token_tables import ABOUT
from tests.planted import ATLAS_READING, LAYER, PLANTED, WORDS, planted_domains, planted_model
from tests.studies.tiny import TOKENIZER, domain, save_checkpoint, tiny_hf

F32 = 1e-4  # a few sums of some hundred numbers near 1 in float32


@pytest.fixture(scope="module")
def model() -> Any:
    return planted_model()


@pytest.fixture(scope="module")
def labels(model) -> pd.DataFrame:
    """The words of each domain, in texts where they are mixed; and a label that means nothing."""
    patterns = {name: rf"\b({'|'.join(words)})\b" for name, words in WORDS.items()}
    frame = label_tokens(model, planted_domains(shuffled=True), by_pattern(patterns))
    generator = torch.Generator().manual_seed(0)
    return frame.assign(noise=(torch.rand(len(frame), generator=generator) < 0.3).numpy())


@pytest.fixture(scope="module")
def found(model, labels) -> StudyResult:
    return run(Probe(labels, (1, 2)), model, planted_domains(shuffled=True), reading=ATLAS_READING)


def test_a_layer_with_few_experts_has_the_numbers_that_it_has_experts_for():
    small = HookedMoE.from_hf(tiny_hf(n_routed_experts=8), load_tokenizer(str(TOKENIZER)))
    texts = [domain("a", n=60)]
    labels = label_tokens(small, texts, by_pattern({"sea": "sea|old|man"}))
    by_default, asked = (run(Probe(labels, k), small, texts).tables["probes"] for k in (None, (1, 2, 4, 8)))
    pd.testing.assert_frame_equal(by_default, asked)
    assert set(by_default["k"]) == {1, 2, 4, 8}
    with pytest.raises(InputError, match=r"k is \[1, 2, 4, 8, 16\]; expected numbers from 1 to the 8 experts"):
        run(Probe(labels, K), small, texts)


def test_one_planted_expert_and_its_neuron_tell_the_words_and_shuffled_ones_are_told_by_nothing(found):
    probes: Any = found.tables["probes"].query(f"layer == {LAYER} and k == 1").set_index(["label", "kind"])
    first: Any = found.tables["components"].query(f"layer == {LAYER} and place == 0").set_index(["label", "kind"])
    for name, expert in PLANTED.items():
        for kind in ("experts", "neurons"):
            probe = probes.loc[(name, kind)]
            assert probe["low"] > 0.95 and probe["beyond_low"] > 0.3 and abs(probe["shuffled"] - 0.5) < 0.1
            assert first.loc[(name, kind), "expert"] == expert and first.loc[(name, kind), "both"]
        assert first.loc[(name, "neurons"), "neuron"] == 0 and pd.isna(first.loc[(name, "experts"), "neuron"])


def test_negative_control_a_label_that_means_nothing_is_told_no_better_than_by_chance(found):
    noise: Any = found.tables["probes"].query("label == 'noise'")
    assert (noise["low"] < 0.5 + 0.02).all() and (noise["beyond_low"] < 0.02).all()
    assert noise["accuracy"].between(0.4, 0.6).all()


def test_components_and_discriminants_are_those_written_out():
    generator = torch.Generator().manual_seed(1)
    n, top_k, experts, width = 300, 2, 5, 3
    indices = torch.rand(n, experts, generator=generator).argsort(-1)[:, :top_k]
    values = torch.randn(n, top_k, width, generator=generator)
    label = torch.rand(n, 1, generator=generator) < 0.4
    values[..., 1] += 3 * ((indices == 2) & label)
    dense = torch.zeros(n, experts, width).scatter_(1, indices[..., None].expand(-1, -1, width), values).flatten(1)
    moments, labelled = component_sums(values, indices, label, experts)
    y = label[:, 0]
    effect = ((dense[y].mean(0) - dense[~y].mean(0)) / dense.std(0, correction=0)).abs()
    picked = pick_components(moments, labelled, float(n), label.sum(0).double(), 4)[0]
    assert picked.tolist() == effect.topk(4).indices.tolist() and picked[0] == 2 * width + 1
    x = at_components(values, indices, picked)
    assert torch.equal(x, dense[:, picked])
    x = x.double()
    sums = torch.stack([x[~y].sum(0), x[y].sum(0)])
    left = indices.masked_fill(indices == 3, -1)  # slots that are left out, as where tokens use fewer experts
    less, less_labelled = component_sums(values, left, label, experts)
    others = torch.arange(experts) != 3
    assert torch.equal(less, moments * others[:, None]) and torch.equal(less_labelled, labelled * others[:, None])
    weights, threshold = discriminant(x.T @ x, sums, torch.tensor([float((~y).sum()), float(y.sum())]).double())
    within = ((~y).sum() * x[~y].T.cov(correction=0) + y.sum() * x[y].T.cov(correction=0)) / n
    by_hand = torch.linalg.solve(within + 1e-3 * within.trace() / 4 * torch.eye(4), x[y].mean(0) - x[~y].mean(0))
    assert (weights - by_hand).abs().max() < F32 and (x @ weights > threshold).eq(y).double().mean() > 0.6


@pytest.mark.typed
def test_sums_add_up_by_name():
    one, other = (Sums(("a", "b")).update("a", torch.full((2, 3), value)) for value in (1.0, 2.0))
    frame = one.merge(other).result().to_frame()
    assert frame.to_dict("list") == {"name": ["a", "b"], "value": [18.0, 0.0]}


def test_spans_are_read_and_label_every_token_that_they_touch(model, tmp_path: Path):
    path = tmp_path / "spans.jsonl"
    text = "the ship and the judge"
    path.write_text(json.dumps({"text": text, "source": "a", "spans": [[5, 7, "inside"], [17, 22, "judge"]]}) + "\n")
    domain, find = read_spans(path)
    frame = label_tokens(model, [domain], find)
    encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for (start, end), row in zip(encoded["offset_mapping"], frame.to_dict("records"), strict=True):
        assert (row["inside"], row["judge"]) == (start < 7 and end > 5, end > 17)
    as_objects = "expected an object with"
    for line, says in (
        ("[]", as_objects),
        ('{"text": 3, "spans": []}', as_objects),
        ("{", "not JSON"),
        ('{"text": "a", "spans": [[0, 2, "x"]]}', "there is a span from 0 to 2 of a text of 1 char"),
        ('{"text": "a", "spans": [[false, 1, "x"]]}', "there is a span from False to 1"),
        ('{"text": "a", "spans": [[0, 1, 5]]}', "there is the label 5; expected a text"),
        ('{"text": "a", "spans": [[0, 1, "position"]]}', "there is the label 'position', which is a column"),
        ('{"text": "\\ud800a", "spans": [[0, 1, "x"]]}', "half of a character"),
        ('{"text": "a", "text": "b", "spans": []}', "not JSON .the key 'text' is there twice"),
    ):
        path.write_text(line + "\n")
        with pytest.raises(InputError, match=rf":1:? (holds )?{says}"):
            read_spans(path)
    with pytest.raises(InputError, match="no token has a label"):
        label_tokens(model, [domain], by_pattern({"x": "zzzz"}))


@pytest.mark.typed
def test_files_of_spans_facts_and_pairs_are_read_as_files_of_texts_are(tmp_path: Path):
    """A mark in front, and a line separator of Unicode inside a text, end no line; a pipe is not waited for."""
    text = "the ship\u2028and the judge"
    fact = {"prompt": text, "subject": "ship", "answer": " a", "foil": " b"}
    readers: list[tuple[Any, dict[str, Any], Any]] = [
        (read_spans, {"text": text, "spans": [[4, 8, "ship"]]}, lambda found: found[0].passages[0].text),
        (read_facts, fact, lambda found: found[0].prompt),
        (read_pairs, {"a": text, "b": "x"}, lambda found: found[0].a),
    ]
    for read, row, text_of in readers:
        path = tmp_path / "rows.jsonl"
        path.write_text(f"\ufeff{json.dumps(row, ensure_ascii=False)}\n\n", encoding="utf-8")
        assert text_of(read(path)) == text
        pipe = tmp_path / f"pipe {read.__name__}"
        os.mkfifo(pipe)
        with pytest.raises(InputError, match=r"cannot be read \(a pipe or a device"):
            read(pipe)


def test_spans_may_be_plain_tuples(model):
    expected = label_tokens(model, {"a": ["the ship"]}, lambda *_: [Span(4, 8, "ship")])
    for pair in ((4, 8, "ship"), [np.int64(4), 8, "ship"]):
        found: Any = lambda *_, pair=pair: [pair]  # noqa: E731
        pd.testing.assert_frame_equal(label_tokens(model, {"a": ["the ship"]}, found), expected)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("found", "says"),
    [
        (None, "find gave None; expected spans"),
        ("ship", "find gave a str; expected spans"),
        ([(4, 8)], r"find gave \(4, 8\); expected \(start, end, label\)"),
        ([(4, 9, "ship")], "a span from 4 to 9 of a text of 8 characters"),
        ([(-4, 8, "ship")], "a span from -4 to 8"),
        ([(4.0, 8, "ship")], "a span from 4.0 to 8"),
        ([(8, 4, "ship")], "a span from 8 to 4"),
        ([(4, 8, "")], "the label ''; expected a text"),
        *(([(4, 8, name)], f"the label '{name}', which is a column of every table") for name in ABOUT),
    ],
)
def test_what_is_no_span_of_a_text_is_refused(model, found: Any, says: str):
    with pytest.raises(InputError, match=says):
        label_tokens(model, {"a": ["the ship"]}, lambda *_: found)


def test_expressions_are_not_called_as_columns_of_every_table_are():
    for name in ABOUT:
        with pytest.raises(InputError, match=f"the label '{name}', which is a column"):
            by_pattern({name: "x"})


def test_a_match_of_no_character_labels_no_token(model):
    domain = Domain.of("a", ["the ship and the judge"])
    frame = label_tokens(model, domain, by_pattern({"j": "j*", "s": "ship"}))
    found = label_tokens(model, domain, by_pattern({"j": "j", "s": "ship"}))
    pd.testing.assert_frame_equal(frame, found)
    assert set(found["j"]) == {True, False}


@pytest.mark.typed
def test_a_label_that_is_given_twice_is_not_the_second(capsys):
    assert main(["probe", "--label", "a=b", "--label", "a=c"]) == 2
    assert "--label a is given 2 times" in capsys.readouterr().err


def test_labels_that_are_too_rare_leave_nothing_behind(model, tmp_path: Path):
    domains = {"a": [f"the ship {number} and the judge" for number in range(4)]}
    labels = label_tokens(model, domains, by_pattern({"ship": "ship"}))
    with pytest.raises(InputError, match="must have 20 with it"):
        run(Probe(labels, k=(1,)), model, domains, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_label_that_nothing_has_is_not_left_out_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_checkpoint(tmp_path / "model")
    rows = [{"text": "the old man and 1 sea " * 8, "source": str(number)} for number in range(8)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["--domain", f"a={tmp_path}/a.jsonl", "--tokens", "0", "--k", "1", "--out"]
    command = ["probe", "--model", f"{tmp_path}/model", *texts]
    assert main([*command, f"{tmp_path}/typo", "--label", "old=old", "--label", "typo=oold"]) == 2
    assert "the label 'typo' is on 0 of " in capsys.readouterr().err
    assert main([*command, f"{tmp_path}/old", "--label", "old=old"]) == 0
    assert main([*command, f"{tmp_path}/default"]) == 0  # of those that nobody asked for by name, what is there
    for out, label in (("old", "old"), ("default", "number")):
        assert set(StudyResult.load(tmp_path / out).tables["probes"]["label"]) == {label}


def test_labels_are_found_in_domains_however_they_are_given(model):
    find, text = by_pattern({"ship": "ship"}), "the ship and the judge"
    expected = label_tokens(model, [Domain.of("a", [text])], find)
    for given in (Domain.of("a", [text]), {"a": [text]}):
        pd.testing.assert_frame_equal(label_tokens(model, given, find), expected)
    with pytest.raises(InputError, match="'a' is a stream"):
        label_tokens(model, from_generator("a", lambda: [text]), find)


@pytest.mark.untyped
def test_labels_are_not_found_in_texts_without_a_domain(model):
    texts: Any = ["the ship and the judge"]
    with pytest.raises(InputError, match="domain 0 is a str"):
        label_tokens(model, texts, by_pattern({"ship": "ship"}))


def test_a_text_that_spells_out_what_opens_it_has_the_labels_of_the_tokens_that_are_read(model):
    opening, _ = model.own_ids("")
    assert opening
    texts = ["the ship and the judge", f"{model.tokenizer.decode(opening)}the ship and the judge"]
    frame = label_tokens(model, {"a": texts}, by_pattern({"ship": "ship"}))
    table = LabelTable(frame)
    found: list[list[bool]] = []
    for number, passage in enumerate(texts):
        (window,) = windows_of(number, Passage(passage, "s", "o"), model, 64, set(opening))
        positions = range(window.start, window.start + len(window.ids) - window.opening)
        ids = torch.tensor(window.ids[window.opening :])
        found.append(table.of("a", number, positions, ids)[:, 0].tolist())
        with pytest.raises(InputError, match=f"document {number}, position {window.start}, they have token "):
            table.of("a", number, positions, ids.flip(0))
    assert found[0] == found[1] and 1 <= sum(found[0]) < len(found[0])


def test_what_cannot_be_probed_is_refused(model, labels, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    domains = planted_domains(shuffled=True)

    def refused(says: str, frame: pd.DataFrame, k: tuple[int, ...] = (1,)) -> None:
        with pytest.raises(InputError, match=says):
            run(Probe(frame, k), model, domains, reading=ATLAS_READING)

    refused("expected numbers from 1 to the 16", labels, (17,))
    refused(r"a column of truth values for each label; \['sea'\] hold others", labels.assign(sea=1.5))
    refused("of which none is one", labels[["document", "position", "domain"]])
    refused("the labels lack a column domain", labels.drop_duplicates(["document", "position"]).drop(columns="domain"))
    refused("several rows are of one token: .*; there is no column domain", labels.drop(columns="domain"))
    again = labels.head(1).assign(sea=~labels["sea"].head(1))
    refused(r"several rows are of one token: {'domain': 'sea', 'document': 0, 'pos", pd.concat([labels, again]))
    refused("the column position holds 0.5; expected whole", labels.assign(position=labels["position"] + 0.5))
    refused("the column position holds -1; expected whole", pd.concat([labels, again.assign(position=-1)]))
    refused("the column counted holds ", labels.assign(counted="no"))
    refused("the labels lack tokens", labels[labels["position"] != 3])
    refused("the labels are of other texts", labels.assign(token=labels["token"].to_numpy()[::-1]))
    refused("they have token", labels.assign(token=labels["token"] + 7.0))
    refused("'rare' is on 1 of", labels[["domain", "document", "position"]].assign(rare=labels.index == 5))
    save_checkpoint(tmp_path / "model")
    rows = [
        {"text": "the old man and sea " * 8, "source": str(i), "spans": [[4, 7, "old"], [24, 27, "old"]]}
        for i in range(24)
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["probe", "--model", f"{tmp_path}/model", "--spans", f"{tmp_path}/s.jsonl", "--k", "1", "--tokens", "0"]
    assert main([*command, "--out", f"{tmp_path}/out"]) == 0
    assert set(StudyResult.load(tmp_path / "out").tables) == {"probes", "components"}
    for more in (["--label", "x=y"], ["--domain", f"a={tmp_path}/s.jsonl"]):
        assert main([*command, *more, "--out", f"{tmp_path}/other"]) == 2
    assert main(["probe", "--label", "x", "--out", f"{tmp_path}/other"]) == 2
    assert main(["probe", "--label", "x=(", "--out", f"{tmp_path}/other"]) == 2
    assert capsys.readouterr().err.count("error: ") == 4


def test_labels_are_those_of_their_tokens_whatever_a_join_or_a_file_made_of_the_table(labels):
    mixed = labels.sample(frac=1, random_state=0)
    mixed = mixed.assign(domain=mixed["domain"].astype("category"), document=mixed["document"].astype(object))
    mixed = mixed.assign(position=mixed["position"] + 0.0, token=mixed["token"].astype("Int64"))
    for made in (mixed, mixed.rename(columns={"noise": 5})):
        expected, found = LabelTable(labels), LabelTable(made)
        assert expected._rows.keys() == found._rows.keys()
        for parts in ("_rows", "_tokens"):
            ours, theirs = getattr(expected, parts), getattr(found, parts)
            assert ours and all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.typed
def test_parallel_sources_are_in_one_half_and_are_one_in_intervals(model, labels, found):
    domains = planted_domains(shuffled=True)
    names = {domain.name: tuple(dict.fromkeys(p.source for p in domain.passages)) for domain in domains}
    texts: Any = {name: {"texts": {TEXTS: TextStats()}} for name in names}
    for name, of in names.items():
        texts[name]["texts"][TEXTS]._read.add(torch.ones(len(of), 2).long(), of)
        read = texts[name]["texts"][TEXTS].result().to_frame()
        assert sorted(read["source"]) == sorted(of) and set(read["tokens"]) == set(read["windows"]) == {1}

    def halves(study: Probe) -> list[list[int]]:
        prepared: list[Any] = [study.prepare(model, "pick", name, texts) for name in names]
        return [[each.halves[source] for source in of] for each, of in zip(prepared, names.values(), strict=True)]

    first, *others = halves(Probe(labels, (1,)))
    assert all(other == first for other in others) and sum(first) == len(first) / 2
    assert set(found.tables["probes"]["sources"]) == {12}
    first, *others = halves(Probe(labels, (1,), parallel="nothing"))  # the control: as if they had nothing in common
    assert any(other != first for other in others)
    with pytest.raises(InputError, match="no regular expression"):
        run(Probe(labels, (1,), parallel="("), model, domains, reading=ATLAS_READING)


def test_intervals_are_those_of_the_sources_that_have_the_label():
    """The denominators of recall are labelled tokens: where three sources hold most of them, these decide."""
    generator = torch.Generator().manual_seed(0)
    labelled = torch.tensor([100] * 3 + [2] * 17)
    tokens = torch.stack([300 - labelled, labelled], -1)[:, None, None].expand(20, 1, 2, 2)
    rates = torch.rand(20, 1, 2, 1, 2, 1, 2, generator=generator)
    said = torch.binomial(tokens[:, None, None, :, :, None].expand(rates.shape).float(), rates, generator=generator)
    found = ProbeResult(
        (1,), ("x",), (1,), tuple(map(str, range(20))), tokens, said.long(), torch.zeros(2, 1, 2, 1, 1).long(), (4, 4)
    )

    def accuracy(times: torch.Tensor) -> torch.Tensor:
        false, true = (times @ said[:, 0, 0, 0, 0, 0].double() / (times @ tokens[:, 0, 0].double())).unbind(-1)
        return (true + 1 - false) / 2

    own, every = bootstrap_all(accuracy, labelled), bootstrap_all(accuracy, torch.full((20,), 300))
    assert own is not None and every is not None and (own[1] - own[0]) > 1.3 * (every[1] - every[0])
    row: Any = found.to_frame().iloc[0]
    assert (row["low"], row["high"]) == pytest.approx(own.tolist()) and row["labelled"] == 334 and row["tokens"] == 6000
    for kind in (0, 1):  # nine sources that have the label, or have tokens without it, are too few
        lies = tokens.clone()
        lies[9:, ..., kind] = 0
        few: Any = replace(found, tokens=lies).to_frame().iloc[0]
        assert few[["low", "high", "beyond_low", "beyond_high"]].isna().all() and few["accuracy"] > 0
