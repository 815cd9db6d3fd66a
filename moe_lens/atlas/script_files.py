"""Data as classic scripts: a page that was opened from the disk may load these, and nothing else."""

import json
import math
from collections.abc import Iterator, Mapping
from decimal import ROUND_05UP, Context
from typing import Any

ESCAPED = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
"""What could end a script, begin markup, or be a line break to older parsers of scripts."""

DIGITS = Context(prec=6, rounding=ROUND_05UP)
"""Of numbers. The last one is never a 5 or 0 that stands for more: rounded to fewer, they are as if rounded once."""


def script(name: str, value: Any) -> str:
    """A script that hands a value over by name. Whatever texts it holds, they are data."""
    return f"atlas.put({_json(name)}, {_json(value)});\n"


def _json(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(ESCAPED)


def _plain(value: Any) -> Any:
    """What JSON can hold: numbers of six digits, nothing in place of what is missing or infinite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(DIGITS.create_decimal(str(value))) if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # halves of a character have no encoding
    return value


def sharded(entries: Mapping[int, Any], limit: int) -> Iterator[dict[int, Any]]:
    """Entries in their order, in parts that take no more than a number of bytes as JSON, or hold one entry."""
    part: dict[int, Any] = {}
    size = 0
    for key, value in entries.items():
        bytes_ = len(_json({key: value}).encode())
        if part and size + bytes_ > limit:
            yield part
            part, size = {}, 0
        part[key] = value
        size += bytes_
    if part:
        yield part
