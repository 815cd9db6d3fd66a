"""Tensors with a small JSON header in one safetensors file, written whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_lens.errors import InputError

_HEADER = "moe_lens"
_VERSION = 1


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
    target = Path(path)
    metadata = {_HEADER: json.dumps({"kind": kind, "version": _VERSION, **header})}
    temporary = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.detach().contiguous() for key, value in tensors.items()}, temporary, metadata)
        temporary.replace(target)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be written: {error}") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: the tensors, on the CPU, and the header.

    Raises:
        InputError: there is no such file, it is not safetensors, or it holds something else.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            header = json.loads(metadata.get(_HEADER, "{}"))
            found = header.get("kind", "something that moe_lens did not write")
            if found != kind:
                raise InputError(f"{path} holds {found}; expected a {kind}")
            if header["version"] != _VERSION:
                raise InputError(f"{path} has format version {header['version']}; this moe_lens reads {_VERSION}")
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 (not a mapping)
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from error


def stored_kind(path: str | Path) -> str:
    """What kind of thing `save_tensors` wrote to a file.

    Raises:
        InputError: there is no such file, or it is not safetensors.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            return str(header.get("kind", "something that moe_lens did not write"))
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from error
