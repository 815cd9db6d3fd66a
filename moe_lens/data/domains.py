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
            `.parquet`, or a folder that `datasets` saved: a row a passage, with the same columns. Passages without
            `source`, and those of a `.txt` file, count as one source: nothing shows that they are independent.

    Raises:
        InputError: The file cannot be read, is not UTF-8, holds no text, or has a line that is not as described; the
            message names file and line.
    """
    if path.is_dir() or path.suffix == ".parquet":
        passages = _read_dataset(path)
    elif path.suffix in _READERS:
        passages = _READERS[path.suffix](path, _decoded(path))
    else:
        came = path.suffix or "a file without suffix"
        raise InputError(f"{path}: domain {name!r} must be a .jsonl, .txt or .parquet file or a dataset, not {came}")
    if not passages:
        raise InputError(f"{path}: domain {name!r} holds no text")
    return Domain(name, tuple(passages))


def _decoded(path: Path) -> str:
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
    return text.replace("\r\n", "\n")


def _read_dataset(path: Path) -> list[Passage]:
    """The rows of a parquet file, or of a dataset saved to a folder, through `datasets`."""
    import datasets

    rows: Any
    try:
        if path.is_dir():
            rows = datasets.load_from_disk(str(path))
        else:
            rows = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    except Exception as error:  # datasets and pyarrow raise errors of many kinds for files that are not theirs
        reason = str(error).strip().splitlines()
        raise InputError(f"{path}: not a dataset ({reason[0] if reason else type(error).__name__})") from None
    if isinstance(rows, datasets.DatasetDict):
        raise InputError(f"{path}: holds the splits {sorted(rows)}; name the folder of one of them")
    return [_passage(row, f"{path}:{number}", path.name) for number, row in enumerate(rows, start=1)]


def _read_jsonl(path: Path, content: str) -> list[Passage]:
    passages = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        passages.append(_passage(_parse(line, origin), origin, path.name))
    return passages


def _parse(line: str, origin: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise InputError(f'{origin}: not JSON; expected a line such as {{"text": "…", "source": "…"}}') from None
    if not isinstance(row, dict):
        raise InputError(f'{origin}: expected an object with "text", got a JSON {type(row).__name__}')
    return row


def _passage(row: dict[str, Any], origin: str, file: str) -> Passage:
    if "text" not in row:
        raise InputError(f'{origin}: expected an object with "text", got keys {sorted(row)}')
    text, source = row["text"], row.get("source")
    if not isinstance(text, str) or not text.strip():
        came = "empty" if isinstance(text, str) else type(text).__name__
        raise InputError(f'{origin}: "text" must be a text that is not empty, and is {came}')
    return Passage(text, str(file if source is None else source), origin)


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


_READERS = {".jsonl": _read_jsonl, ".txt": _read_txt}
