"""config.json of a checkpoint: read, or refused before anything is built of it. Needs no torch."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_lens.errors import CheckpointError
from moe_lens.json_files import read_json


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object.")
    return value


def believed_config(path: Path) -> dict[str, Any]:
    """A config that names a model_type, and no size that a model would take for ever to be built in.

    Raises:
        CheckpointError: it is another; names what is wrong.
    """
    config = read_object(path)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path} has no model_type, so which model it belongs to is unknown.")
    _believable(path, config)
    return config


_GREATEST = {re.compile(r"(num|n)_(\w+_)?layers?|n_layer|(?!max_)\w+_layers|depth"): 4096,
             re.compile(r"(num|n)_(\w+_)?experts"): 2**16,
             re.compile(r"(num|n)_(\w+_)?heads?"): 2**16,
             re.compile(r"(\w+_)?(head_dim|(hidden|intermediate)_size)"): 2**24,
             re.compile(r"(\w+_)?vocab_size"): 2**31}  # fmt: skip
"""By names of sizes that are built one by one or multiplied, in whatever part of a config: more than any model has."""
_POSITIVE = re.compile(r"(num|n)_\w+|(\w+_)?(size|eps|epsilon|theta|embeddings|dim|rank|step|top_?k)")
"""Names of what is counted or measured: negative in no model."""
_GROUPS = re.compile(r"\w+\.([\w.]+\.)?(\w+_)?group_size")
"""What a library that packs calls the columns that share a scale: -1 where all do."""
_SHARES = re.compile(r"(\w+_)?(eps|epsilon)")
"""Names of numbers that are at most 1."""
_TRAINED = re.compile(r"\w*(dropout|pdrop|jitter|aux_loss|aux_alpha|z_loss|initializer)\w*")
"""Names of what training alone reads: whatever it is, transformers loads the model and runs it."""
_PACKING = ("quantization_config", "compression_config")
_DEEPEST = 50
"""Levels of values inside values, many more than any config has."""


def _believable(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse what no model has, before transformers begins: it would build it for ever, or not look at it.

    Raises:
        CheckpointError: a size that is too large, a negative one, or a number that is none; names it.
    """
    waiting: list[tuple[str, Any, int]] = [("", config, 0)]
    while waiting:
        name, value, depth = waiting.pop()
        if depth > _DEEPEST:
            raise CheckpointError(f"{path}: its values are nested more than {_DEEPEST} deep; it is no model's config.")
        if isinstance(value, Mapping):
            within = f"{name}." if name.startswith(_PACKING) else ""  # its words are those of the library that packed
            waiting += [(f"{within}{key}", inner, depth + 1) for key, inner in value.items()]
        elif _TRAINED.fullmatch(name):
            continue
        elif isinstance(value, list):
            waiting += [(name, inner, depth + 1) for inner in value if isinstance(inner, Mapping | list)]
        elif isinstance(value, float) and not math.isfinite(value) and not (value == math.inf and "limit" in name):
            raise CheckpointError(f"{path}: {name} is {value}; expected a number.")
        elif isinstance(value, int | float) and value > 1 and _SHARES.fullmatch(name):
            raise CheckpointError(f"{path}: {name} is {value}; expected at most 1.")
        elif isinstance(value, int | float) and value < 0 and _POSITIVE.fullmatch(name):
            raise CheckpointError(f"{path}: {name} is {value}, and less than none there cannot be.")
        elif isinstance(value, int | float) and value < -1 and _GROUPS.fullmatch(name):
            raise CheckpointError(f"{path}: {name} is {value}; expected columns of a group, or -1 for all of them.")
        elif isinstance(value, int):
            limits = [limit for pattern, limit in _GREATEST.items() if pattern.fullmatch(name)]
            if abs(value) > min([2**63 - 1, *limits]):
                raise CheckpointError(f"{path}: {name} is {_short(value)}, which is more than any model has.")


def _short(value: int) -> str:
    return f"{value:,}" if abs(value) < 10**18 else f"a number of {len(str(abs(value)))} digits"
