"""Domains: named collections of passages, each with the source that it was taken from."""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from moe_lens.errors import InputError

EMBEDDED = ("english", "french", "german", "math", "code")
"""The domains that ship with the package; `assets/domains/ATTRIBUTION.md` says where they come from."""


@dataclass(frozen=True)
class Passage:
    """A text that is read on its own: no attention reaches from one passage to another."""

    text: str
    source: str
    """The document it was taken from. Passages of one source are dependent, so intervals resample sources."""
    origin: str
    """File and line, for messages."""


@dataclass(frozen=True)
class Domain:
    """A named collection of passages."""

    name: str
    passages: tuple[Passage, ...]

    @property
    def n_sources(self) -> int:
        """How many different documents the passages come from."""
        return len({passage.source for passage in self.passages})


def embedded_domains() -> list[Domain]:
    """The five held-out domains that ship with the package."""
    folder = resources.files("moe_lens") / "assets" / "domains"
    return [load_domain(name, Path(str(folder / f"{name}.jsonl"))) for name in EMBEDDED]


def load_domain(name: str, path: Path) -> Domain:
    """Read a domain from a file.

    Args:
        name: What the domain is called in tables and figures.
        path: `.jsonl`: an object a line with `text` and, if known, `source`. `.txt`: passages separated by blank lines.
            Passages without `source`, and those of a `.txt` file, count as one source: nothing shows that they are
            independent.

    Raises:
        InputError: The file cannot be read, is not UTF-8, holds no text, or has a line that is not as described; the
            message names file and line.
    """
    readers = {".jsonl": _read_jsonl, ".txt": _read_txt}
    if path.suffix not in readers:
        raise InputError(
            f"{path}: domain {name!r} must be a .jsonl or a .txt file, not {path.suffix or 'a file without suffix'}"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}:{line}: not UTF-8 (byte {content[error.start]:#04x}); convert the file to UTF-8"
        ) from None
    passages = readers[path.suffix](path, text.replace("\r\n", "\n"))
    if not passages:
        raise InputError(f"{path}: domain {name!r} holds no text")
    return Domain(name, tuple(passages))


def _read_jsonl(path: Path, content: str) -> list[Passage]:
    passages = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        row = _parse(line, origin)
        text, source = row["text"], row.get("source")
        if not isinstance(text, str) or not text.strip():
            came = "empty" if isinstance(text, str) else type(text).__name__
            raise InputError(f'{origin}: "text" must be a text that is not empty, and is {came}')
        passages.append(Passage(text, str(path.name if source is None else source), origin))
    return passages


def _parse(line: str, origin: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise InputError(f'{origin}: not JSON; expected a line such as {{"text": "…", "source": "…"}}') from None
    if not isinstance(row, dict) or "text" not in row:
        came = f"keys {sorted(row)}" if isinstance(row, dict) else f"a JSON {type(row).__name__}"
        raise InputError(f'{origin}: expected an object with "text", got {came}')
    return row


def _read_txt(path: Path, content: str) -> list[Passage]:
    passages, block, start = [], [], 1
    for number, line in enumerate([*content.split("\n"), ""], start=1):
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            passages.append(Passage("\n".join(block), path.name, f"{path}:{start}"))
            block = []
    return passages
