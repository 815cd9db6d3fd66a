"""Files are whole or not there, and say what they are."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_lens.errors import InputError
from moe_lens.manifest import file_digest
from moe_lens.storage import load_tensors, parse_json, read_json, save_tensors, stored_kind, written_whole


def test_tensors_and_header_come_back_bit_for_bit(tmp_path: Path):
    tensors = {
        "half": torch.randn(3, 4).bfloat16(),
        "view": torch.randn(4, 6).T[1:3],
        "ids": torch.arange(5),
        "empty": torch.zeros(0, 7),
        "flags": torch.tensor([True, False]),
    }
    header = {"layers": [1, 2], "text": "é", "nothing": None}
    save_tensors(tmp_path / "new" / "file.safetensors", "Test", tensors, header)
    loaded, found = load_tensors(tmp_path / "new" / "file.safetensors", "Test")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value)
    assert found.items() >= header.items()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "file"
    save_tensors(path, "Test", {"a": torch.ones(2)}, {})
    shared = torch.zeros(3)
    with pytest.raises(RuntimeError, match="share memory"):
        save_tensors(path, "Test", {"a": shared, "b": shared}, {})
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert torch.equal(load_tensors(path, "Test")[0]["a"], torch.ones(2))


def test_where_nothing_can_be_written_nothing_is_left(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name in ("folder", "file/below"):
        with pytest.raises(InputError, match="cannot be written") as error:
            save_tensors(tmp_path / name, "Test", {"a": torch.ones(2)}, {})
        assert str(tmp_path / name) in str(error.value)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_pipe_or_a_device_is_never_replaced_and_a_link_leads_on(tmp_path: Path):
    # `--out /dev/null`, as root, would take the device away from the whole machine.
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="a pipe or a device"), written_whole(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "link").symlink_to("there/file")
    with written_whole(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").read_text() == "new"


def test_work_that_fails_midway_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "new" / "file"
    with written_whole(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(ZeroDivisionError), written_whole(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and [file.name for file in path.parent.iterdir()] == ["file"]


def test_what_cannot_be_read_is_named(tmp_path: Path):
    whole = tmp_path / "whole"
    save_tensors(whole, "Test", {"a": torch.ones(200)}, {})
    (tmp_path / "truncated").write_bytes(whole.read_bytes()[:-10])
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("{}")
    save_file({"a": torch.ones(2)}, tmp_path / "foreign")
    for name, message in (
        ("truncated", "cannot be read as safetensors"),
        ("empty", "cannot be read as safetensors"),
        ("text", "cannot be read as safetensors"),
        ("", "cannot be read as safetensors"),
        ("absent", "there is no file"),
        ("foreign", "something that moe_lens did not write; expected a Test"),
    ):
        with pytest.raises(InputError, match=message) as error:
            load_tensors(tmp_path / name, "Test")
        assert str(tmp_path / name) in str(error.value)
    with pytest.raises(InputError, match="holds Test; expected a Routing"):
        load_tensors(whole, "Routing")


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moe_lens.storage._VERSION", 3)
    save_tensors(tmp_path / "file", "Test", {"a": torch.ones(2)}, {})
    monkeypatch.undo()
    with pytest.raises(InputError, match="format version 3; this moe_lens reads 2"):
        load_tensors(tmp_path / "file", "Test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "a number of thousands of digits"),
        ('{"a": 1,}', "in line 1"),
        (b'"\xff"', "not UTF-8"),
    ],
)
def test_json_that_cannot_be_read_is_one_kind_of_error(content, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_json(content)
    assert "\n" not in str(error.value)


def test_a_json_file_is_a_file_and_ends(tmp_path: Path):
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "long").write_text(" " * 100 + "1")
    for name, message in (("zero", "a pipe or a device"), ("", "a folder"), ("long", "more than 0 MiB")):
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / name, limit=100)
    assert read_json(tmp_path / "long", limit=101) == 1


def test_a_pipe_or_a_device_is_never_opened_for_a_file(tmp_path: Path):
    (tmp_path / "null").symlink_to("/dev/null")  # read as an empty file without the check; a pipe would never end
    with pytest.raises(OSError, match="a pipe or a device, and no file"):
        file_digest(tmp_path / "null")
    for read in (stored_kind, lambda path: load_tensors(path, "Test")):
        with pytest.raises(InputError, match="a pipe or a device, and no file"):
            read(tmp_path / "null")
    with pytest.raises(OSError, match="No such file"):
        file_digest(tmp_path / "nothing")


def test_a_header_that_is_no_object_is_named(tmp_path: Path):
    for header in ("3", "[" * 100_000, "not JSON"):
        save_file({"a": torch.ones(2)}, tmp_path / "file", {"moe_lens": header})
        with pytest.raises(InputError, match="cannot be read as safetensors"):
            load_tensors(tmp_path / "file", "Test")
        with pytest.raises(InputError, match="cannot be read as safetensors"):
            stored_kind(tmp_path / "file")


@pytest.mark.typed
def test_a_single_number_of_any_stride_is_kept(tmp_path: Path) -> None:
    odd = torch.arange(4).view(2, 2)[:1, 1]
    assert odd.stride() == (2,) and odd.is_contiguous()
    save_tensors(tmp_path / "odd.safetensors", "Odd", {"value": odd}, {})
    assert load_tensors(tmp_path / "odd.safetensors", "Odd")[0]["value"].tolist() == [1]
