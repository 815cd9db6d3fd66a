"""Reading domains: what is there is read, and what cannot be read is named with file and line."""

import json
from pathlib import Path

import datasets
import pytest

from moe_lens.data import embedded_domains, load_domain
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
        ("a.csv", "text\na b", "must be a .jsonl, .txt or .parquet file or a dataset, not .csv"),
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
    with pytest.raises(InputError, match="not a dataset"):
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


def test_a_dataset_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    written(tmp_path, "broken.parquet", "no parquet")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "one"}])})
    splits.save_to_disk(tmp_path / "splits")
    datasets.Dataset.from_list([{"body": "one"}]).to_parquet(tmp_path / "d.parquet")
    for name, message in (
        ("empty", "not a dataset"),
        ("broken.parquet", "not a dataset"),
        ("splits", "holds the splits ['train']"),
        ("d.parquet", "got keys ['body']"),
    ):
        with pytest.raises(InputError) as error:
            load_domain("d", tmp_path / name)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
