"""GGUF files: found by their own path, with the config and the tokenizer that they hold."""

import importlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from moe_lens.errors import CheckpointError, InputError, UnsupportedModelError
from moe_lens.model.hf_compat import is_gguf_available
from moe_lens.model.loading.checkpoint import find_file

_SIZES = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Names in the file, and in configs, of sizes that transformers leaves at the default of another model."""
_ROTARY = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
"""Names in the file, and in configs, of what scales rotary angles; transformers leaves them out."""
_FACTORS = "rope.factors"
"""Among what is said of a file: the name of a tensor by which rotary frequencies are divided."""
_ORIGINAL = "Load the checkpoint in safetensors that the file was made from"
_OWN_ROTARY = frozenset(("config", "rope_parameters", "rope_scaling"))
"""Arguments of `from_pretrained` that say how to scale rotary angles, whatever the file says."""


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
    source: str,
    file: str,
    hub: Mapping[str, Any],
    unreadable: tuple[type[Exception], ...],
    given: Collection[str] = (),
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Path of a GGUF file, the config that transformers makes of it, and settings that it leaves out.

    These are sizes, and the scaling of rotary angles. A config.json beside the file is not read.

    Args:
        source: Folder, or name on the hub.
        file: Name of the file there.
        hub: See `HUB_ARGUMENTS`.
        unreadable: What transformers raises of a file that it cannot read.
        given: Names of the caller's own arguments; those for rotary embeddings count instead of the file's.

    Raises:
        CheckpointError: there is no such file, or it cannot be read.
        UnsupportedModelError: one of several parts, an architecture that transformers does not know, or a scaling of
            rotary angles that is not read; names it.
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
        architecture, stated = _stated(path) if is_gguf_available() else ("", {})  # without it, transformers says so
        if architecture == "gpt-oss" and "rope.scaling.type" in stated:  # read as the length of the key's name
            raise UnsupportedModelError(
                f"{path}: transformers misreads rope.scaling of the architecture 'gpt-oss' in GGUF files. {_ORIGINAL}"
            )
        raw = AutoConfig.from_pretrained(source, gguf_file=file, **hub).to_dict()
    except unreadable as error:
        if unknown := re.search(r"architecture (\S+) is not supported", str(error)):
            raise UnsupportedModelError(
                f"{path}: transformers does not read GGUF files of the architecture {unknown[1]!r}. {_ORIGINAL}"
            ) from error
        raise CheckpointError(f"transformers cannot read {path}: {error}") from error
    settings: dict[str, Any] = {
        ours: int(stated[theirs]) for theirs, ours in _SIZES.items() if theirs in stated and ours in raw
    }
    if not _OWN_ROTARY & set(given) and (rotary := _rotary(path, stated)):
        settings["rope_parameters"] = {**(raw.get("rope_parameters") or {}), **rotary}
    return path, {**raw, **settings}, settings


def _stated(path: Path) -> tuple[str, dict[str, Any]]:
    """The architecture, and what the file says of it: numbers and strings by their names without its own in front."""
    library: Any = importlib.import_module("gguf")
    reader = library.GGUFReader(str(path))
    fields = reader.fields
    name = str(fields["general.architecture"].contents()) if "general.architecture" in fields else ""
    wanted = {
        key: key.removeprefix(f"{name}.") for key in fields if key.startswith((f"{name}.expert_", f"{name}.rope."))
    }
    stated = {short: fields[key].contents() for key, short in wanted.items()}
    # Llama 3's scaling and longrope are tensors of factors, often without a word of it among the keys
    for tensor in reader.tensors:
        if str(tensor.name).startswith(("rope_freqs", "rope_factors")):
            stated[_FACTORS] = str(tensor.name)
    return name, stated


def _rotary(path: Path, stated: Mapping[str, Any]) -> dict[str, Any]:
    """How rotary angles are scaled, in words of transformers; empty where they are not. llama.cpp's defaults.

    Raises:
        UnsupportedModelError: by more than linear scaling or YaRN; names it.
    """
    said = {
        key.removeprefix("rope.scaling."): value for key, value in stated.items() if key.startswith("rope.scaling.")
    }
    said.setdefault("factor", stated.get("rope.scale_linear", 0.0))  # its older name; 0 is none
    kind = said.pop("type", "linear")
    if kind == "none":
        return {}
    strange = [f"rope.scaling.type = {kind!r}"] * (kind not in ("linear", "yarn"))
    strange += [f"the scaling in {stated[name]}" for name in stated if name == _FACTORS]
    strange += [
        f"rope.scaling.{key} = {value}" for key, value in said.items() if key not in _ROTARY and key != "finetuned"
    ]
    if strange:
        raise UnsupportedModelError(
            f"{path}: {strange[0]} is not read from GGUF files. Pass rope_parameters={{…}} as the config of the "
            "original checkpoint has them"
        )
    if kind == "linear" and said["factor"] in (0, 1):
        return {}
    of_kind = ("factor",) if kind == "linear" else tuple(_ROTARY)
    found = {_ROTARY[key]: value for key, value in said.items() if key in of_kind}
    return {"rope_type": kind, **found, "factor": found["factor"] or 1.0}
