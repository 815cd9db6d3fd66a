"""Domains: named collections of passages, each with the source that it was taken from."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import chain
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

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these texts from others, as plain values."""
        found = hashlib.sha256()
        for passage in self.passages:
            found.update(json.dumps([passage.text, passage.source]).encode())
        return {"passages": len(self.passages), "digest": found.hexdigest()[:16]}


def embedded_domains() -> list[Domain]:
    """The five held-out domains that ship with the package."""
    return [embedded_domain(name) for name in EMBEDDED]


def embedded_domain(name: str) -> Domain:
    """One of `EMBEDDED`."""
    folder = resources.files("moe_lens") / "assets" / "domains"
    return load_domain(name, Path(str(folder / f"{name}.jsonl")))


def load_domain(name: str, path: Path, *, text: str = "text", source: str | None = "source") -> Domain:
    """Read a domain from a file.

    Args:
        name: What the domain is called in tables and figures.
        path: `.jsonl`: an object a line with `text` and, if known, `source`. `.txt`: passages separated by blank lines.
            `.parquet`, or a folder that `datasets` saved: a row a passage, with the same columns. Passages without
            `source`, and those of a `.txt` file, count as one source: nothing shows that they are independent.
        text: The column (or key) with the text, or several joined by +.
        source: The column that says which document a text was taken from.

    Raises:
        InputError: The file cannot be read, is not UTF-8, holds no text, or has a line that is not as described; the
            message names file and line.
    """
    try:
        passages = tuple(read_lines(path, text=text, source=source))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not passages:
        raise InputError(f"{path}: domain {name!r} holds no text")
    return Domain(name, passages)


def read_lines(path: Path, *, text: str = "text", source: str | None = "source") -> Iterator[Passage]:
    """The passages of a file one after another; see `load_domain` for the kinds of files and for what is refused."""
    if path.is_dir() or path.suffix == ".parquet":
        rows = enumerate(_read_dataset(path), start=1)
        yield from (read_row(row, f"{path}:{number}", path.name, text=text, source=source) for number, row in rows)
    elif path.suffix == ".jsonl":
        for number, line in _lines(path):
            if line.strip():
                origin = f"{path}:{number}"
                yield read_row(_parse(line, origin), origin, path.name, text=text, source=source)
    elif path.suffix == ".txt":
        yield from _read_txt(path)
    else:
        came = path.suffix or "a file without suffix"
        raise InputError(f"{path}: texts must be a .jsonl, .txt or .parquet file or a dataset, not {came}")


def read_row(
    row: dict[str, Any],
    origin: str,
    file: str,
    *,
    text: str = "text",
    source: str | None = "source",
    empty: bool = False,
) -> Passage:
    """A row of a dataset as a passage.

    Args:
        row: By column.
        origin: File and line, for messages.
        file: What counts as the source where the row names none.
        text: The column with the text, or several joined by +, whose texts then follow one another.
        source: The column with the source.
        empty: Whether an empty text will do: it then counts among those that are too short to be read.

    Raises:
        InputError: There is no such text in it.
    """
    columns = text.split("+")
    if not row.keys() >= set(columns):
        raise InputError(f'{origin}: expected an object with "{text}", got keys {sorted(map(str, row))}')
    for column in columns:
        if not isinstance(row[column], str) or not (empty or row[column].strip()):
            came = "empty" if isinstance(row[column], str) else type(row[column]).__name__
            raise InputError(f'{origin}: "{column}" must be a text that is not empty, and is {came}')
    value = "\n".join(row[column] for column in columns)
    given = None if source is None else row.get(source)
    return Passage(value, str(file if given is None else given), origin)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, one in memory at a time."""
    try:
        with path.open("rb") as content:
            for number, line in enumerate(content, start=1):
                try:
                    decoded = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{path}:{number}: not UTF-8 (byte {line[error.start]:#04x}); convert the file to UTF-8"
                    ) from None
                yield number, decoded.rstrip("\r\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_dataset(path: Path) -> Any:
    """The rows of a parquet file, or of a dataset saved to a folder, through `datasets`; mapped, not loaded."""
    import datasets

    rows: Any
    try:
        if path.is_dir():
            rows = datasets.load_from_disk(str(path))
        else:
            rows = datasets.IterableDataset.from_parquet(str(path))
            next(iter(rows), None)  # reads nothing before
    except Exception as error:  # datasets and pyarrow raise errors of many kinds for files that are not theirs
        reason = str(error).strip().splitlines()
        raise InputError(f"{path}: not a dataset ({reason[0] if reason else type(error).__name__})") from None
    if isinstance(rows, datasets.DatasetDict):
        raise InputError(f"{path}: holds the splits {sorted(rows)}; name the folder of one of them")
    return rows


def _parse(line: str, origin: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise InputError(f'{origin}: not JSON; expected a line such as {{"text": "…", "source": "…"}}') from None
    if not isinstance(row, dict):
        raise InputError(f'{origin}: expected an object with "text", got a JSON {type(row).__name__}')
    return row


def _read_txt(path: Path) -> Iterator[Passage]:
    block: list[str] = []
    start = 1
    for number, line in chain(_lines(path), [(0, "")]):
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            yield Passage("\n".join(block), path.name, f"{path}:{start}")
            block = []
