"""Files written whole or not at all; tensors with a small JSON header in one safetensors file."""

import hashlib
import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_lens.errors import InputError
from moe_lens.json_files import check_file
from moe_lens.json_files import parse_json as parse_json
from moe_lens.json_files import read_json as read_json
from moe_lens.scratch import folder_made, scratch_folder

_HEADER = "moe_lens"
_VERSION = 2
"""Raised by one whenever what is written changes. From 2 on there is a digest."""


@contextmanager
def written_whole(path: str | Path) -> Generator[Path]:
    """A path for a file that takes another's place when the block ends; the folder of that is created.

    A link stays one, and what it leads to is written. What is there and no file is never replaced: a device would be
    gone for the whole machine.

    Raises:
        InputError: the file cannot be written there; nothing is left behind.
    """
    target = Path(os.path.realpath(path)) if Path(path).is_symlink() else Path(path)
    try:
        if target.exists() and not target.is_file():
            raise OSError(f"it is {'a folder' if target.is_dir() else 'a pipe or a device'}, and no file")
        with folder_made(target.parent), scratch_folder(target.parent, f".{target.name}.") as folder:
            yield folder / target.name
            (folder / target.name).replace(target)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be written: {error}") from error


def save_tensors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header of plain JSON values, under a temporary name first.

    Args:
        path: the file; its folder is created.
        kind: what the file holds, such as "Routing"; `load_tensors` asks for it.
        tensors: tensors that share no memory.
        header: anything JSON can hold.

    Raises:
        InputError: the file cannot be written there; nothing is left behind.
    """
    about = json.loads(json.dumps({"kind": kind, "version": _VERSION, **header}))
    whole = {key: value.detach().contiguous() for key, value in tensors.items()}
    about["digest"] = digest(whole, about)
    with written_whole(path) as temporary:
        save_file(whole, temporary, {_HEADER: json.dumps(about)})


def digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """SHA-256 of a header of plain JSON values, and of tensors with their names, dtypes and shapes."""
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        plain = value.cpu().clone(memory_format=torch.contiguous_format)  # a single number may have any stride
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: the tensors, on the CPU, and the header.

    Raises:
        InputError: there is no such file, it is not safetensors, it holds something else, or it was changed.
    """
    try:
        check_file(Path(path))
        with safe_open(str(path), framework="pt") as file:
            header = _header(file.metadata())
            found = header.get("kind", "something that moe_lens did not write")
            if found != kind:
                raise InputError(f"{path} holds {found}; expected a {kind}")
            if (version := header.get("version")) != _VERSION:
                raise InputError(f"{path} has format version {version}; this moe_lens reads {_VERSION}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from error
    if header.pop("digest", None) != digest(tensors, header):
        raise InputError(f"{path} is not as moe_lens wrote it; was it edited? Make it anew")
    return tensors, header


@contextmanager
def believed(path: str | Path, kind: str) -> Generator[None]:
    """Making something of what `load_tensors` gave: a header that was edited by hand is an error that names the file.

    Raises:
        InputError: what is made inside the block lacks a value, or has one of the wrong kind.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{path} holds no {kind} that can be: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        lacks = isinstance(error, KeyError)
        raise InputError(
            f"{path} holds no {kind} as moe_lens writes it ({'lacks ' if lacks else ''}{error}); was it edited?"
        ) from error


def whole_numbers(name: str, values: Any, *, least: int) -> tuple[int, ...]:
    """Whole numbers of a header, none of them less than `least`.

    Raises:
        InputError: they are something else.
    """
    fine = isinstance(values, list) and all(type(value) is int and value >= least for value in values)
    if not fine:
        raise InputError(f"{name} is {values!r:.80}; expected whole numbers, {least} or more")
    return tuple(values)


def listed(name: str, values: Any) -> tuple[str, ...]:
    """Words of a header.

    Raises:
        InputError: they are something else.
    """
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InputError(f"{name} is {values!r:.80}; expected a list of words")
    return tuple(values)


def _header(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    header = parse_json((metadata or {}).get(_HEADER, "{}"))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header


def stored_kind(path: str | Path) -> str:
    """What kind of thing `save_tensors` wrote to a file.

    Raises:
        InputError: there is no such file, or it is not safetensors.
    """
    try:
        check_file(Path(path))
        with safe_open(str(path), framework="pt") as file:
            header = _header(file.metadata())
            return str(header.get("kind", "something that moe_lens did not write"))
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from error
