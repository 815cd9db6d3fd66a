"""GGUF files: found by their own path, with the config and the tokenizer that they hold."""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from moe_lens.errors import CheckpointError, InputError, UnsupportedModelError
from moe_lens.model.loading.checkpoint import find_file

_SIZES = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Names in the file, and in configs, of sizes that transformers leaves at the default of another model."""


def find_gguf(source: str, kwargs: dict[str, Any]) -> str:
    """The folder of a GGUF file whose path was given, with its name among the arguments; anything else as it is.

    Args:
        source: What was asked for.
        kwargs: Arguments of `from_pretrained`; changed.

    Raises:
        InputError: a second file is named.
    """
    path = Path(source)
    if path.suffix != ".gguf" or not path.is_file():
        return source
    if kwargs.get("gguf_file") not in (None, path.name):
        raise InputError(f"got the file {source} and gguf_file={kwargs['gguf_file']!r}; expected one of them")
    kwargs["gguf_file"] = path.name
    return str(path.parent)


def read_gguf_config(
    source: str, file: str, hub: Mapping[str, Any], unreadable: tuple[type[Exception], ...]
) -> tuple[Path, dict[str, Any], dict[str, int]]:
    """Path of a GGUF file, the config that transformers makes of it, and sizes that it leaves out.

    A config.json beside the file is not read.

    Args:
        source: Folder, or name on the hub.
        file: Name of the file there.
        hub: See `HUB_ARGUMENTS`.
        unreadable: What transformers raises of a file that it cannot read.

    Raises:
        CheckpointError: there is no such file, or it cannot be read.
        UnsupportedModelError: one of several parts, or an architecture that transformers does not know; names it.
    """
    path = find_file(source, file, hub)
    if path is None:
        raise CheckpointError(f"{source} has no file {file}")
    parts = re.search(r"-\d+-of-(\d+)\.gguf$", file)
    if parts is not None and int(parts[1]) > 1:
        raise UnsupportedModelError(
            f"{path} is one of {int(parts[1])} parts of a model. Join them: llama-gguf-split --merge {file} whole.gguf"
        )
    try:
        raw = AutoConfig.from_pretrained(source, gguf_file=file, **hub).to_dict()
        sizes = {name: size for name, size in _sizes(path).items() if name in raw}
    except unreadable as error:
        if architecture := re.search(r"architecture (\S+) is not supported", str(error)):
            raise UnsupportedModelError(
                f"{path}: transformers does not read GGUF files of the architecture {architecture[1]!r}. Load the "
                "checkpoint in safetensors that the file was made from"
            ) from error
        raise CheckpointError(f"transformers cannot read {path}: {error}") from error
    return path, {**raw, **sizes}, sizes


def _sizes(path: Path) -> dict[str, int]:
    reader: Any = importlib.import_module("gguf")  # transformers has asked for it by now
    fields = reader.GGUFReader(str(path)).fields
    name = fields["general.architecture"].contents()
    found = {ours: fields.get(f"{name}.{theirs}") for theirs, ours in _SIZES.items()}
    return {ours: int(field.contents()) for ours, field in found.items() if field is not None}
