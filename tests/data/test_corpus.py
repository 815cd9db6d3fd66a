"""Streams: read as they come, numbered alike whoever reads, shared out among processes without loss or doubling."""

import itertools
import json
import os
import re
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import pandas as pd
import pytest

from moe_lens.data import (
    PRESETS,
    Corpus,
    Domain,
    DomainSpec,
    Passage,
    Reading,
    corpus,
    domains_from_table,
    from_file,
    from_generator,
    from_hub,
    load_domain,
    parse_domains,
    shards,
)
from moe_lens.data.corpus import digest
from moe_lens.errors import InputError
from tests.data.test_batches import Letters


class Encoder(Letters):
    def __init__(self):
        super().__init__()
        self.cfg.n_ctx = 64


def rows(n: int) -> list[dict[str, str]]:
    return [{"text": "abcdefgh"[: 3 + i % 5] * (1 + i % 7), "source": f"s{i % 4}"} for i in range(n)]


def seen(found) -> list[tuple[int, int, str, tuple[int, ...]]]:
    return sorted((w.document, w.start, w.source, w.ids) for shard in found for w in shard.windows)


@pytest.mark.parametrize("tokens", [None, 300])
@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("world_size", [2, 4, 7])
def test_processes_read_together_what_one_reads(tokens, streamed, world_size):
    passages = tuple(Passage(row["text"], row["source"], f"f:{i}") for i, row in enumerate(rows(60)))
    texts = from_generator("d", lambda: rows(60)) if streamed else Domain("d", passages)
    reading = Reading(tokens=tokens, context=16, shard_tokens=40)
    alone = list(shards(texts, Encoder(), reading))
    parts = [list(shards(texts, Encoder(), reading, rank=r, world_size=world_size)) for r in range(world_size)]
    assert seen(itertools.chain(*parts)) == seen(alone)
    assert sum(shard.short for part in parts for shard in part) == sum(shard.short for shard in alone)
    assert sum(len(part) > 0 for part in parts) > 1
    if tokens is not None:
        assert tokens <= sum(w.counted for shard in alone for w in shard.windows) < tokens + 16
    resumed = list(shards(texts, Encoder(), reading, start=2))
    assert [shard.number for shard in resumed] == [shard.number for shard in alone[2:]]
    assert seen(resumed) == seen(alone[2:])


@pytest.mark.parametrize("streamed", [True, False])
def test_what_is_too_short_is_counted_wherever_it_stands_and_however_large_shards_are(streamed):
    made = [{"text": text, "source": f"{i}"} for i, text in enumerate(["a", "abcdefgh", "b", "abcdefgh", "c", "d"])]
    texts = from_generator("d", lambda: made)
    if not streamed:
        texts = Domain("d", tuple(Passage(row["text"], row["source"], f"f:{i}") for i, row in enumerate(made)))
    for size, n in ((9, 2), (18, 1), (1000, 1)):  # a window is 9 tokens: the last shard is full, or it is not
        found = list(shards(texts, Encoder(), Reading(tokens=None, context=16, shard_tokens=size)))
        assert [len(shard.windows) for shard in found] == [2 // n] * n
        assert sum(shard.short for shard in found) == 4
        later = list(shards(texts, Encoder(), Reading(tokens=None, context=16, shard_tokens=size), start=1))
        assert [shard.short for shard in later] == [shard.short for shard in found[1:]]


def test_a_generator_without_end_is_read_no_further_than_needed():
    made = 0

    def endless():
        nonlocal made
        for i in itertools.count():
            made += 1
            yield {"text": "abcdefgh", "source": f"s{i}"}

    found = list(shards(from_generator("d", endless), Encoder(), Reading(tokens=2000, context=16)))
    assert sum(len(shard.windows) for shard in found) == 250
    assert made < 10_000 + 2_000  # the buffer that it is shuffled in, and what was read
    # Without a budget nothing is buffered.
    made = 0
    first = next(shards(from_generator("d", endless), Encoder(), Reading(tokens=None, context=16, shard_tokens=90)))
    assert len(first.windows) == 10 and made < 100


def test_a_seed_decides_the_order_of_a_stream():
    texts = from_generator("d", lambda: rows(60))
    read = [seen(shards(texts, Encoder(), Reading(tokens=100, seed=seed))) for seed in (0, 0, 1)]
    assert read[0] == read[1] != read[2]


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_passage_has_the_number_of_its_place_whatever_the_order_in_which_it_is_read(seed):
    made = [{"text": f"text {number}"} for number in range(60)]
    texts = from_generator("d", lambda: made)
    for rank, world_size in ((0, 1), (1, 3)):
        read = list(texts.passages(rank=rank, world_size=world_size, seed=seed))
        assert len(read) == 60 / world_size and all(passage.text == f"text {number}" for number, passage in read)
        assert (sorted(read) == read) == (seed is None)


def test_files_are_streamed_with_the_passages_that_they_have_in_memory(tmp_path):
    lines = "".join(json.dumps({"body": row["text"], "where": row["source"]}) + "\n" for row in rows(9))
    (tmp_path / "d.jsonl").write_text(lines)
    datasets.Dataset.from_list([{"body": r["text"], "where": r["source"]} for r in rows(9)]).to_parquet(
        tmp_path / "d.parquet"
    )
    for file in ("d.jsonl", "d.parquet"):
        spec = DomainSpec(name="d", path=str(tmp_path / file), text="body", source="where")
        memory = spec.open()
        assert isinstance(memory, Domain)
        stream = DomainSpec(**{**vars(spec), "streaming": True}).open()
        assert isinstance(stream, Corpus)
        assert [passage for _, passage in stream.passages()] == list(memory.passages)
        assert {passage.source for passage in memory.passages} == {"s0", "s1", "s2", "s3"}


def test_two_columns_are_one_text(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"question": "why", "answer": "so"}\n')
    (passage,) = load_domain("d", tmp_path / "d.jsonl", text="question+answer").passages
    assert passage.text == "why\nso"


def test_opening_a_stream_pickles_nothing_that_it_reads_from():
    """`datasets` pickles what it is to call; of a closure that would be all that it reaches, and slow to walk."""

    class Heavy:
        pickled = 0

        def __reduce__(self):
            Heavy.pickled += 1
            return Heavy, ()

    heavy = Heavy()

    def closure():
        assert heavy
        return iter([{"text": "a"}])

    ((_, passage),) = from_generator("d", closure).passages()
    assert passage.text == "a" and Heavy.pickled == 0
    datasets.IterableDataset.from_generator(closure)
    assert Heavy.pickled == 1  # the control: this is what happens without
    stream = from_generator("d", closure).rows()
    assert [row["text"] for row in datasets.concatenate_datasets([stream, stream])] == ["a", "a"]  # which copies it


def test_bytes_that_are_not_utf8_are_named_with_file_and_line_when_they_come_up(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good text"}\n{"text": "caf\xe9 au lait"}\n')
    with pytest.raises(InputError, match=re.escape(f"{path}:2: not UTF-8 (byte 0xe9)")):
        list(shards(from_file("bad", path), Encoder(), Reading(tokens=None)))


def test_offline_the_hub_says_so_in_one_line(monkeypatch):
    for spec in (
        DomainSpec(name="d", hub="openai/gsm8k", config="main", text="question"),
        DomainSpec(name="paper/gsm8k"),
    ):
        with pytest.raises(InputError) as error:
            list(shards(spec.open(), Encoder(), Reading()))
        said = str(error.value)
        assert "openai/gsm8k (main)" in said and "cannot be had from the hub" in said
        assert "give a .jsonl, .txt or .parquet file" in said and "\n" not in said
    assert "licence: MIT" in said


COMMITS = ["0123456789abcdef" * 2 + "0123456" + digit for digit in "ab"]


@pytest.fixture
def hub(monkeypatch):
    """A hub whose datasets have moved on from the first commit to the second."""

    class Api:
        def dataset_info(self, repository, revision=None):
            return SimpleNamespace(sha={None: COMMITS[1], "v1": COMMITS[0]}[revision])

    def load(repository, config, *, split, revision, streaming):
        assert streaming
        return iter([{"text": f"{repository} at {revision}"}])

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("datasets.load_dataset", load)


def test_a_dataset_on_the_hub_is_pinned_to_a_commit(hub):
    for argument, commit in (("d=hub:o/d", COMMITS[1]), ("d=hub:o/d@v1", COMMITS[0])):
        corpus = parse_domains([argument])[0].open()
        assert isinstance(corpus, Corpus) and corpus.pin is not None
        pinned = corpus.pin(None)
        assert pinned.identity == {**corpus.identity, "revision": commit} and pinned.pin is None
        assert [passage.text for _, passage in pinned.passages()] == [f"o/d at {commit}"]
        assert corpus.pin(COMMITS[0]).identity["revision"] == COMMITS[0]
    named = parse_domains([f"d=hub:o/d@{COMMITS[0]}"])[0].open()
    assert isinstance(named, Corpus) and named.pin is None  # nothing to ask the hub for


def test_a_column_that_mostly_names_a_corpus_is_no_source_unless_it_is_named(monkeypatch, recwarn):
    rows = [{"text": f"text {i}", "source": "a"} for i in range(3)]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: iter(rows))
    with pytest.warns(UserWarning, match="each row counts as a source of its own"):
        assert len({passage.source for _, passage in from_hub("d", "o/d").passages()}) == 3
    recwarn.clear()
    assert {passage.source for _, passage in from_hub("d", "o/d", source="source").passages()} == {"a"}
    assert not recwarn


@pytest.mark.typed
def test_presets_are_the_papers_seven_domains(hub):
    assert set(PRESETS) == {
        f"paper/{name}" for name in ("github", "english", "french", "aime", "chinese", "arxiv", "gsm8k")
    }
    for preset in PRESETS.values():
        assert preset.licence and preset.note
        assert re.fullmatch("[0-9a-f]{40}", preset.revision)
    assert len({preset.revision for preset in PRESETS.values()}) == len(PRESETS)
    # Another commit than the preset's can be named, on the command line and in a table.
    (spec,) = parse_domains([f"paper/gsm8k@{COMMITS[0]}"])
    assert [spec] == domains_from_table({"paper/gsm8k": {"revision": COMMITS[0]}})
    for asked, commit in ((spec, COMMITS[0]), (DomainSpec(name="paper/gsm8k"), PRESETS["paper/gsm8k"].revision)):
        corpus = asked.open()
        assert isinstance(corpus, Corpus) and corpus.pin is None and corpus.identity["revision"] == commit
        assert corpus.identity["text"] == "question+answer" and corpus.identity["config"] == "main"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": "a.jsonl"}, r"\[domains.a\] must be a table"),
        ({"a": {"file": "a.jsonl"}}, r"\[domains.a\] has no key 'file'; known: path, hub, config"),
        ({"a": {"path": 3}}, "path is 3; expected a text"),
        ({"a": {"path": "a.jsonl", "streaming": "yes"}}, "streaming is 'yes'; expected true or false"),
        ({"paper/gsm8k": {"split": "test"}}, "of which split cannot be chosen; revision alone can be given"),
        ({"english": {"revision": "v1"}}, "domain 'english' is a known one, of which revision cannot be chosen"),
    ],
)
def test_tables_that_are_wrong(table, message):
    with pytest.raises(InputError, match=message):
        domains_from_table(table)[0].open()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("few.txt", "expected NAME=FILE"),
        ("e\x1b[31mz=few.txt", r"'e\\x1b\[31mz'; its name must be one line"),
        ("=few.txt", "expected NAME=FILE"),
        ("a=b.docx", "must be a .jsonl, .json, .csv, .tsv, .txt or .parquet file .*not .docx"),
        ("paper/none", "one of english, french, german, math, code, paper/github"),
    ],
)
def test_arguments_that_are_wrong(argument, message):
    with pytest.raises(InputError, match=message):
        parse_domains([argument])[0].open()


def test_a_generator_that_breaks_is_told_with_its_place():
    def breaks():
        yield "abc"
        yield "abc"
        raise ValueError("no more")

    with pytest.raises(InputError, match=r"domain 'd' cannot be read after passage 2: no more"):
        list(shards(from_generator("d", breaks), Encoder(), Reading(tokens=None)))


@pytest.mark.parametrize(
    ("generate", "message"),
    [
        (lambda: "one text", "are one str"),
        (lambda: {"text": ["one"]}, "are a dictionary"),
        (lambda: {"one", "two"}, "are a set"),
        (lambda: None, "are None"),
        (lambda: [3], '"text" must be a text that is not empty, and is int'),
        (lambda: [["one"]], '"text" must be a text that is not empty, and is list'),
    ],
)
def test_a_generator_of_no_texts_is_said(generate, message):
    """One text would be read letter by letter, and a frame by the names of its columns."""
    with pytest.raises(InputError, match=message):
        list(from_generator("d", generate).passages())
    table = from_generator("d", lambda: pd.DataFrame({"text": ["one", "two"], "source": [1, 2]}))
    assert [(p.text, p.source) for _, p in table.passages()] == [("one", "1"), ("two", "2")]


def test_files_that_change_places_or_lie_behind_links_are_other_texts(tmp_path):
    texts, beside = tmp_path / "texts", tmp_path / "beside"
    for folder, text in ((texts / "a", "one"), (texts / "b", "two"), (beside, "six")):
        folder.mkdir(parents=True)
        (folder / "x.txt").write_text(text)
    (texts / "c").symlink_to(beside)
    seen = [from_file("d", texts).identity]
    (beside / "x.txt").write_text("ten")
    seen.append(from_file("d", texts).identity)
    (texts / "b").rename(texts / "bb")  # sources are called after their files
    seen.append(from_file("d", texts).identity)
    assert len({json.dumps(one) for one in seen}) == 3 and seen[-1] == from_file("d", texts).identity


def test_there_is_no_process_behind_the_last():
    stream = from_generator("g", lambda: rows(9))
    for read in (lambda: list(stream.passages(rank=2, world_size=2)),
                 lambda: list(shards(stream, Encoder(), Reading(), rank=2, world_size=2))):  # fmt: skip
        with pytest.raises(InputError, match="rank is 2; expected 0 to 1"):
            read()


def test_other_sources_are_another_reading(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row | {"book": "b"}) + "\n" for row in rows(9)), encoding="utf-8")
    read = [from_file("a", path, source=source).identity for source in (None, "book", "source")]
    assert read[0] != read[1] != read[2] and "source" not in read[0]
    hub = [from_hub("a", "o/d", source=source).identity for source in (None, "book")]
    assert hub[0] != hub[1]


def test_generators_are_told_apart_by_code_and_values():
    """By the name of a function alone, all lambdas of a place would be the same texts to a study that resumes."""

    class Reader:
        def __init__(self, path: Path):
            self.path, self._lock = path, threading.Lock()  # which cannot be pickled

        def __call__(self):
            return iter([str(self.path)])

    def over(texts):
        return from_generator("d", lambda: iter(texts)).identity

    one = over(["a", "b"])
    assert one == over(["a", "b"]) != over(["a", "c"])
    assert from_generator("d", lambda: iter(["a"])).identity != from_generator("d", lambda: iter(["b"])).identity
    first, again, other = (from_generator("d", Reader(Path(name))).identity for name in "aab")
    assert first == again != other
    assert from_generator("d", partial(over, 1)).identity != from_generator("d", partial(over, 2)).identity


def test_a_change_in_the_middle_of_a_file_is_another_corpus(tmp_path, monkeypatch):
    file = tmp_path / "d.txt"
    file.write_bytes(b"a" * (3 * 2**20))
    known, time = digest(file), file.stat().st_mtime_ns

    def change(letter: bytes) -> None:
        with file.open("r+b") as content:
            content.seek(3 * 2**19)
            content.write(letter)
        os.utime(file, ns=(time, time + ord(letter)))

    change(b"b")
    assert digest(file) != known
    change(b"a")
    assert digest(file) == known, "whatever the time"
    monkeypatch.setattr(corpus, "WHOLE", 2**20)  # of larger files, ends and times
    ends = digest(file)
    change(b"b")
    assert digest(file) != ends
