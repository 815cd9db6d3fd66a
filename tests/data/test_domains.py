"""Reading domains: what is there is read, and what cannot be read is named with file and line."""

import bz2
import gzip
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from moe_lens.data import (
    Domain,
    Passage,
    as_domains,
    embedded_domains,
    files,
    from_file,
    from_generator,
    in_memory,
    load_domain,
    tokenize,
)
from moe_lens.errors import InputError


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def test_jsonl_gives_text_source_and_line(tmp_path):
    path = written(tmp_path, "a.jsonl", '{"text": "one\\u2028two", "source": "s"}\r\n\r\n{"text": "three"}\n')
    first, second = load_domain("a", path).passages
    assert (first.text, first.source, first.origin) == ("one\u2028two", "s", f"{path}:1")
    assert (second.text, second.source, second.origin) == ("three", "a.jsonl", f"{path}:3")


def test_lines_end_at_newlines_only(tmp_path):
    path = written(tmp_path, "a.jsonl", json.dumps({"text": "a\u2028b\x85c\x0bd"}, ensure_ascii=False))
    assert load_domain("a", path).passages[0].text == "a\u2028b\x85c\x0bd"


def test_txt_is_cut_at_blank_lines_and_is_one_source(tmp_path):
    path = written(tmp_path, "a.txt", "\none\ntwo\n  \n\nthree")
    domain = load_domain("a", path)
    assert [(p.text, p.origin) for p in domain.passages] == [("one\ntwo", f"{path}:2"), ("three", f"{path}:6")]
    assert domain.n_sources == 1
    for ends in ("\r\n", "\r"):  # of other systems, and of old ones
        other = load_domain("b", written(tmp_path, "b.txt", path.read_text().replace("\n", ends).encode()))
        assert [(p.text, p.origin[-1]) for p in other.passages] == [("one\ntwo", "2"), ("three", "6")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a b"}\n{"text": ', "a.jsonl:2: not JSON"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: not JSON"),
        ("a.jsonl", '{"body": "a b"}', "a.jsonl:1: expected an object with \"text\", got keys ['body']"),
        ("a.jsonl", '["a b"]', 'a.jsonl:1: expected an object with "text", got a JSON list'),
        ("a.jsonl", '{"text": 3}', "is int"),
        ("a.jsonl", '{"text": " \\n"}', "is empty"),
        ("a.jsonl", "", "holds no text"),
        ("a.txt", "\n \n", "holds no text"),
        ("a.txt", b"one\ntwo \xff\n", "a.txt:2: not UTF-8 (byte 0xff)"),
        (
            "a.txt",
            "one\n\ntwo".encode("utf-16-le"),
            "a.txt:1: holds a byte 0, as no text does; if it is UTF-16, convert",
        ),
        ("a.csv", "text\na \0b\n", "a.csv:2: holds a byte 0"),
        ("a.docx", "text\na b", "must be a .jsonl, .json, .csv, .tsv, .txt or .parquet file"),
        (
            "a.jsonl",
            '{"text": "a b"}\n{"text": "cut \\ud83d"}',
            "a.jsonl:2: the text holds half of a character (\\ud83d",
        ),
        ("a.jsonl", '{"text": "a b", "source": "\\udc00"}', "a.jsonl:1: the source holds half of a character"),
        (
            "a.jsonl",
            '{"text": "a b", "n": ' + "1" * 5000 + "}",
            "a.jsonl:1: not JSON (a number of thousands",
        ),
        ("a.jsonl", '{"text": "a b", "source": ["x"]}', "a.jsonl:1: the source is a list"),
        ("a.json", "[" * 100_000, "a.json: not JSON (nested too deeply)"),
        ("a.json", '[{"text": "a b"}, 3]', "a.json: item 2: expected an object or a text, got a JSON int"),
        ("a.json", '{"text": ["a b"]}', 'a.json:1: "text" must be a text that is not empty, and is list'),
        ("a.csv", "text,source\na b,x\nc d\n", "a.csv:3: 1 cells; the first line names 2 columns"),
        ("a.csv", "text,text\na,b\n", 'a.csv:1: two columns are called "text"'),
        ("a.csv", 'text\n"a b\n', "a.csv:2: not comma-separated values"),
        ("a.csv", 'text\n"a\nb"\n""\n', 'a.csv:4: "text" must be a text that is not empty'),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    path = written(tmp_path, name, content)
    with pytest.raises(InputError) as error:
        load_domain("a", path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_domain("a", tmp_path / "none.jsonl")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match="holds no text"):
        load_domain("a", tmp_path / "folder.txt")


def test_what_ships_has_enough_sources_for_intervals():
    domains = {domain.name: domain for domain in embedded_domains()}
    assert list(domains) == ["english", "french", "german", "math", "code"]
    assert {name: domain.n_sources for name, domain in domains.items()} == {
        "english": 21, "french": 20, "german": 20, "math": 100, "code": 15,
    }  # fmt: skip
    # The handbook's untranslated paragraphs are gone, and English is still there to be found in English.
    assert " the " in domains["english"].passages[0].text
    for name in ("french", "german"):
        assert not [p.origin for p in domains[name].passages if p.text.count(" the ") > 2]


def test_parquet_and_saved_datasets_give_the_same_passages_as_jsonl(tmp_path):
    rows = [{"text": "one", "source": "a"}, {"text": "two", "source": None}]
    lines = "\n".join(json.dumps(row) for row in rows)
    expected = [(p.text, p.source == "a") for p in load_domain("d", written(tmp_path, "d.jsonl", lines)).passages]
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "d.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "d.parquet", tmp_path / "saved"):
        assert [(p.text, p.source == "a") for p in load_domain("d", path).passages] == expected


def test_a_dataset_that_cannot_be_used_is_named(tmp_path, caplog):
    (tmp_path / "empty").mkdir()
    written(tmp_path, "broken.parquet", "no parquet")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "one"}])})
    splits.save_to_disk(tmp_path / "splits")
    datasets.Dataset.from_list([{"body": "one"}]).to_parquet(tmp_path / "d.parquet")
    for name, message in (
        ("empty", "holds no text"),
        ("broken.parquet", "not a dataset"),
        ("splits", "holds the splits ['train']"),
        ("d.parquet", "got keys ['body']"),
    ):
        with pytest.raises(InputError) as error:
            load_domain("d", tmp_path / name)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert not caplog.records, "what is raised is not logged as well"


ROWS = [{"text": f"one, two\n{i}", "source": f"s{i % 3}", "n": i} for i in range(7)]


def test_every_kind_of_file_gives_the_same_passages(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    frame = pd.DataFrame(ROWS)
    frame.to_csv(tmp_path / "d.csv", index=False)
    frame.to_csv(tmp_path / "d.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "d.parquet")
    (tmp_path / "lines.json").write_bytes(lines)
    written(tmp_path, "d.json", json.dumps(ROWS, indent=1))
    written(tmp_path, "d.jsonl.gz", gzip.compress(lines))
    written(tmp_path, "d.jsonl.bz2", bz2.compress(lines))
    written(tmp_path, "d.csv.gz", gzip.compress((tmp_path / "d.csv").read_bytes()))
    with pa.output_stream(str(tmp_path / "d.jsonl.zst"), compression="zstd") as file:
        file.write(lines)
    for path in sorted(tmp_path.iterdir()):
        found = load_domain("d", str(path))
        assert [(p.text, p.source) for p in found.passages] == [(r["text"], r["source"]) for r in ROWS], path.name


@pytest.mark.typed
def test_a_folder_of_texts_has_a_source_a_file(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in (("a.txt", "one\n\ntwo"), ("b/c.txt", "three"), (".hidden.txt", "never")):
        written(tmp_path, name, text)
    found = load_domain("d", tmp_path).passages
    assert [(p.text, p.source) for p in found] == [("one", "a.txt"), ("two", "a.txt"), ("three", "b/c.txt")]
    written(tmp_path, "README.md", "what")
    with pytest.raises(InputError, match="README.md: texts must be"):  # it may be one, so it is not passed over
        load_domain("d", tmp_path)


@pytest.mark.parametrize("read", [load_domain, lambda name, path: list(from_file(name, path).passages())])
def test_no_folder_in_a_folder_is_passed_over(read, tmp_path, monkeypatch):
    inside, beside = tmp_path / "texts", tmp_path / "beside"
    for folder in (inside, beside):
        folder.mkdir()
        written(folder, "a.txt", folder.name)
    assert len(getattr(found := read("d", inside), "passages", found)) == 1
    (inside / "linked").symlink_to(beside)
    found = read("d", inside)
    passages = [p if isinstance(p, Passage) else p[1] for p in getattr(found, "passages", found)]
    assert [(p.text, p.source) for p in passages] == [("texts", "a.txt"), ("beside", "linked/a.txt")]
    (beside / "round").symlink_to(inside)
    with pytest.raises(InputError, match="round: is a link to a folder that it is in"):
        read("d", inside)
    (beside / "round").unlink()
    listed = Path.iterdir
    with monkeypatch.context() as closed:  # whoever runs tests may be allowed to read everything

        def denied(path: Path):
            if path.name == "linked":
                raise PermissionError(13, "Permission denied")
            return listed(path)

        closed.setattr(Path, "iterdir", denied)
        with pytest.raises(InputError, match=r"linked: cannot be read \(Permission denied\)"):
            read("d", inside)
    (inside / "gone.txt").symlink_to(tmp_path / "nothing.txt")
    with pytest.raises(InputError, match=r"gone.txt: cannot be read \(No such file"):
        read("d", inside)


def test_rows_of_a_table_without_quotes_do_not_become_one(tmp_path):
    """A text that begins with a quotation mark, as each paragraph of a speech does, and a later one that ends so."""
    rows = ["text\tsource", '"I said so.\ta', "He nodded.\tb", 'And went."\tc', "Then night fell.\td"]
    path = written(tmp_path, "a.tsv", "\n".join(rows))
    with pytest.raises(
        InputError, match="a.tsv:4: 3 lines that would be a row each are one between two quotation marks"
    ):
        load_domain("a", path)
    frame = pd.DataFrame([row.split("\t") for row in rows[1:]], columns=["text", "source"])
    frame.to_csv(tmp_path / "b.tsv", sep="\t", index=False)  # which quotes, and doubles quotation marks
    found = load_domain("b", tmp_path / "b.tsv").passages
    assert [(p.text, p.source) for p in found] == list(frame.itertuples(index=False, name=None))
    code = pd.DataFrame({"text": ["def f(x):\n\tif x:\n\t\treturn x\n", '"a"\nb\n'], "source": ["x", "y"]})
    code.to_csv(tmp_path / "c.tsv", sep="\t", index=False)
    assert [p.text for p in load_domain("c", tmp_path / "c.tsv").passages] == list(code["text"]), "tabs inside of texts"


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_columns_are_named_once(mark, tmp_path):
    """As in files that were put together by `cat`: the names would be read as a text and its source."""
    path = written(tmp_path, "a.csv", f"text,source\none,1\n{mark}text,source\ntwo,2\n")
    with pytest.raises(InputError, match="a.csv:3: names the columns again"):
        load_domain("a", path)
    fine = written(tmp_path, "b.csv", "text,source\none,1\ntext,2\n")
    assert [p.text for p in load_domain("b", fine).passages] == ["one", "text"]


def test_a_part_of_a_table_may_be_empty(tmp_path):
    frame = pd.DataFrame({"text": ["one", "two"], "source": ["a", "b"]})
    frame.to_parquet(tmp_path / "part-0.parquet")
    frame.head(0).to_parquet(tmp_path / "part-1.parquet")
    assert [p.text for p in load_domain("d", tmp_path).passages] == ["one", "two"]
    assert len(list(from_file("d", tmp_path).passages())) == 2
    with pytest.raises(InputError, match="part-1.parquet: domain 'd' holds no text"):
        load_domain("d", tmp_path / "part-1.parquet")


def test_arrays_of_no_axis_or_of_two_are_said():
    with pytest.raises(InputError, match="the texts of domain 'd' are a numpy array"):
        Domain.of("d", np.array("one text"))
    with pytest.raises(InputError, match=r"d\[0\]: the source is a numpy array"):
        Domain.of("d", ["one"], sources=np.ones((1, 2)))
    assert Domain.of("d", np.array(["one", "two"]), sources=np.arange(2)).n_sources == 2


def test_what_never_ends_is_refused_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "zero.jsonl"):
        with pytest.raises(InputError, match=f"{name}: is a pipe or a device"):
            load_domain("d", tmp_path / name)
    monkeypatch.setattr(files, "LINE", 100)
    with pytest.raises(InputError, match="long.txt:2: a line of more than"):
        load_domain("d", written(tmp_path, "long.txt", "short\n" + "a" * 101))
    assert load_domain("d", written(tmp_path, "short.txt", "short\n" + "a" * 100)).passages


def test_a_source_column_that_is_named_must_be_there(tmp_path):
    path = written(
        tmp_path, "d.jsonl", '{"text": "a b", "meta": {"book": "x"}}\n{"text": "c d", "meta": {"book": null}}'
    )
    assert [p.source for p in load_domain("d", path, source="meta.book").passages] == ["x", "d.jsonl"]
    assert {p.source for p in load_domain("d", path).passages} == {"d.jsonl"}  # none was named
    for wrong in ("meta.bok", "book", "text.book"):
        with pytest.raises(InputError, match=f'd.jsonl:1: there is no "{wrong}"') as error:
            load_domain("d", path, source=wrong)
        assert "'meta.book'" in str(error.value)
    with pytest.raises(InputError, match="did you mean 'meta.book'"):
        load_domain("d", path, source="meta.bok")
    # A column with a dot in its own name is that column.
    dotted = written(tmp_path, "e.jsonl", '{"a.b": "text here", "a": {"b": "not this"}}')
    assert load_domain("d", dotted, text="a.b").passages[0].text == "text here"


def test_a_source_column_that_is_almost_called_so_is_not_passed_over(tmp_path):
    """Without it every text is of one source, and no study has an interval."""
    for head, column in (("text, source", " source"), ("text,Source", "Source")):
        path = written(tmp_path, "d.csv", f"{head}\na b,x\nc d,y")
        with pytest.raises(InputError, match=f'd.csv:2: the column "{column}" is not "source"'):
            load_domain("d", path)
        assert [p.source for p in load_domain("d", path, source=column).passages] == ["x", "y"]
    frame = pd.DataFrame({"text": ["a b"], "Source": ["x"]})
    with pytest.raises(InputError, match='the column "Source"'):
        Domain.of("d", frame)
    for head in ("text,resource", "text,source,Source"):  # negative controls: another thing; it is there
        load_domain("d", written(tmp_path, "d.csv", f"{head}\n" + ",".join("a" * (1 + head.count(",")))))


TEXTS = [row["text"] for row in ROWS]


@pytest.mark.parametrize(
    "texts",
    [
        ROWS,
        pd.DataFrame(ROWS, index=[5] * len(ROWS)),
        datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        iter(ROWS),
    ],
)
def test_rows_at_hand_give_the_passages_of_a_file(texts, tmp_path):
    path = written(tmp_path, "d.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    found, there = Domain.of("d", texts), load_domain("d", path)
    assert [(p.text, p.source) for p in found.passages] == [(p.text, p.source) for p in there.passages]
    assert found.identity == there.identity


def test_plain_texts_take_one_source_or_one_for_each():
    for texts in (TEXTS, tuple(TEXTS), pd.Series(TEXTS, index=range(9, 16)), (text for text in TEXTS)):
        found = Domain.of("d", texts)
        assert [p.text for p in found.passages] == TEXTS and {p.source for p in found.passages} == {"d"}
    assert Domain.of("d", datasets.Dataset.from_list(ROWS)["text"]).n_sources == 1
    for sources in (range(7), pd.Series(range(7)), (i for i in range(7))):
        assert [p.source for p in Domain.of("d", TEXTS, sources=sources).passages] == list("0123456")
    frame = pd.DataFrame({"body": TEXTS, "by": [*"abcabc", None]})
    assert [p.source for p in Domain.of("d", frame, text="body", sources="by").passages] == [*"abcabc", "d"]
    assert Domain.of("d", frame, text="body").n_sources == 1


@pytest.mark.parametrize(
    ("texts", "more", "message"),
    [
        ("one text", {}, r"are one str \('one text'\); expected several"),
        (Path("a.txt"), {}, "load_domain"),
        ({"text": TEXTS}, {}, r"a dictionary with the keys \['text'\]"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), {}, "keys \\['train'\\]"),
        (3, {}, "are an int; expected a list"),
        ([], {}, "holds no text"),
        (["a b", 3], {}, r'd\[1\]: "text" must be a text that is not empty, and is int'),
        (["a b", None], {}, r"d\[1\].*missing"),
        (pd.Series(["a b", None]), {}, r"d\[1\].*missing"),
        (["a b", " "], {}, r"d\[1\].*empty"),
        (["a b", "\ud800"], {}, r"d\[1\]: the text holds half of a character"),
        (TEXTS, {"sources": range(6)}, "has 6 sources, and more texts"),
        (TEXTS, {"sources": itertools.count()}, "has 7 texts, and more sources"),
        (TEXTS, {"sources": "book"}, "names a column, and the texts"),
        (TEXTS, {"sources": 3}, "sources is 3; expected several, in a list"),
        (pd.DataFrame(ROWS), {"sources": "sourc"}, "did you mean 'source'"),
        (pd.DataFrame(ROWS), {"text": "body"}, "expected an object with \"body\""),
        (pd.DataFrame([[1, 2]], columns=["text", "text"]), {}, "have one name"),
    ],
)  # fmt: skip
@pytest.mark.untyped
def test_what_is_no_collection_of_texts_is_said(texts: Any, more, message):
    with pytest.raises(InputError, match=message):
        Domain.of("d", texts, **more)


def test_names_of_files_are_not_read_as_texts(tmp_path):
    """One text that is the name of a file is an error already; a list of such was read as a text of a few letters."""
    path = str(written(tmp_path, "d.jsonl", '{"text": "a b"}\n'))
    for texts in ([path], [path, path], pd.Series([path]), [{"text": path}], iter([path])):
        with pytest.raises(InputError, match=r"are names of files .*load_domain\(name, path\)"):
            Domain.of("d", texts)
    for texts in ([path, "a text"], [f"{path}.gone"], [str(tmp_path)], ["a" * 9999], ["zero \0"], ["~nobody/a"]):
        assert len(Domain.of("d", texts).passages) == len(texts)


def test_a_dictionary_is_a_set_of_domains():
    stream = from_generator("s", lambda: TEXTS)
    found = as_domains({"a": TEXTS, "b": Domain.of("other", ROWS), "c": stream})
    assert [domain.name for domain in found] == ["a", "b", "c"]
    assert found[0] == Domain.of("a", TEXTS) and isinstance(found[1], Domain) and found[1].n_sources == 3
    assert as_domains(found[0]) == [found[0]] and as_domains(tuple(found)) == found
    assert in_memory({"a": TEXTS}) == [found[0]]
    with pytest.raises(InputError, match="'c' is a stream"):
        in_memory(found)
    with pytest.raises(InputError, match=r"called 'c\\n'; its name must be one line"):
        as_domains({"c\n": stream})


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there is no domain"),
        ({}, "there is no domain"),
        (TEXTS, r"domain 0 is a str; expected Domain.of\(name, texts\)"),
        ("english", "domains are a str"),
        (3, "domains are an int"),
        ([Domain.of("a", TEXTS)] * 2, "two domains are called 'a'"),
        ({1: TEXTS}, "name is 1; expected a text"),
        ({"a": "one text"}, "are one str"),
    ],
)
def test_what_is_no_set_of_domains_is_said(given: Any, message):
    with pytest.raises(InputError, match=message):
        as_domains(given)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Domain.of("d", {"x", "y"}), "are a set"),
        (lambda: tokenize(["x"], None, n_tokens=5, context=8), "expected a Domain"),  # pyright: ignore[reportArgumentType]
        (lambda: Domain.of("d", ["x", "y"], sources={"u", "v"}), "has no order"),
        (lambda: Domain.of("d", pd.Series(["x", "y"]), sources=pd.Series(["u", "v"], index=[1, 0])), "indices differ"),
        (lambda: Domain.of("d", pd.DataFrame({"text": ["x"]}), sources=pd.Series(["u"], index=[3])), "indices differ"),
        (lambda: as_domains({Domain.of("d", TEXTS)}), "domains are a set"),  # pyright: ignore[reportArgumentType]
        (lambda: Domain.of("d", pd.DataFrame(ROWS).set_index("source")), "'source' is the index of the texts, and no"),
        (lambda: Domain.of("d", pd.DataFrame(ROWS).set_index("source")["text"]), r"texts.reset_index\(\) makes it one"),
        (
            lambda: Domain.of("d", pd.DataFrame({"text": ["x"]}, pd.Index(["u"], name="by")), sources="by"),
            "'by' is the index",
        ),
        (lambda: Domain.of("d", [{"text": "x"}], text=None), "text is None; expected a text"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_texts_and_sources_that_python_would_pair_at_random_are_refused(call: Callable[[], Domain], says: str) -> None:
    with pytest.raises(InputError, match=says):
        call()


def test_texts_and_sources_of_pandas_go_together_by_their_index() -> None:
    index = [7, 3]
    found = Domain.of("d", pd.Series(["x", "y"], index=index), sources=pd.Series(["u", "v"], index=index))
    assert [(passage.text, passage.source) for passage in found.passages] == [("x", "u"), ("y", "v")]
    listed = Domain.of("d", pd.Series(["x", "y"], index=index), sources=["u", "v"])
    assert listed == found


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_a_key_that_is_there_twice_is_refused(tmp_path: Path, name: str) -> None:
    row = '{"text": "a", "text": "b"}'
    (tmp_path / name).write_text(row if name.endswith("l") else f"[{row}]")
    with pytest.raises(InputError, match="'text' is there twice"):
        load_domain("d", tmp_path / name)
    (tmp_path / name).write_text((row if name.endswith("l") else f"[{row}]").replace('"text": "a"', '"title": "a"'))
    assert load_domain("d", tmp_path / name).passages[0].text == "b", "negative control"


def test_text_files_have_no_columns_and_sources_in_torchs_format_are_numbers(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one two\n\nthree four")
    assert load_domain("a", path).n_sources == 1
    for column in ({"source": "url"}, {"text": "body"}):
        with pytest.raises(InputError, match="a .txt file has no columns"):
            load_domain("a", path, **column)
    near = Domain.of("a", ["x", "y"], sources=torch.tensor([1.00001, 1.00002]))
    assert near.n_sources == 2 and "tensor" not in str(near.passages[0].source)


def test_an_index_that_nothing_is_looked_for_in_may_have_any_name():
    frame = pd.DataFrame(ROWS)
    expected = Domain.of("d", frame)
    assert Domain.of("d", frame.set_index(frame["source"])) == expected, "it is a column, too"
    assert Domain.of("d", frame.rename_axis("number")) == expected
    assert Domain.of("d", frame.set_index("source"), sources=[row["source"] for row in ROWS]) == expected


def test_an_open_file_is_no_list_of_texts_and_a_name_can_be_too_long(tmp_path):
    path = written(tmp_path, "d.jsonl", '{"text": "a b"}\n')
    with path.open() as file, pytest.raises(InputError, match=r"are an open file; load_domain\(name, path\) reads"):
        Domain.of("d", file)
    for read in (load_domain, from_file):
        with pytest.raises(InputError, match="at most 255 bytes"):
            read("d", tmp_path / f"{'x' * 300}.jsonl")


def test_a_source_is_one_number_whether_its_column_lacks_one_or_not():
    """Pandas and parquet keep whole numbers as floats where one is missing; a document must keep its name."""
    whole = Domain.of("d", pd.DataFrame({"text": ["x", "y"], "source": [7, 8]}))
    lacks = Domain.of("d", pd.DataFrame({"text": ["x", "y"], "source": [7, None]}))
    assert whole.passages[0] == lacks.passages[0] and lacks.passages[1].source == "d"
    assert Domain.of("d", ["x"], sources=[7.5]).passages[0].source == "7.5"
