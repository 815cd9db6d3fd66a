"""Files of texts, of every kind that people keep them in, read one passage at a time."""

import csv
import io
import json
import logging
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from moe_lens.data.rows import Passage, passage, read_row
from moe_lens.errors import InputError, check_characters
from moe_lens.json_files import check_file, parse_json

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
"""Suffixes of files of texts."""
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""Suffixes that may follow (but for parquet, which compresses by itself), and what they stand for."""
LINE = 2**28
"""Bytes of the longest line that is read: a file without line ends must not fill the memory."""
WHOLE = 2**30
"""Bytes of the largest file of a kind that must be read as a whole."""
_TEXT = 'an object with "text"'
_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")


def read_passages(path: str | Path, *, text: str = "text", source: str | None = None) -> Iterator[Passage]:
    """The passages of a file or folder one after another; see `load_domain` for the kinds and for what is refused."""
    path = Path(path)
    try:
        if path.is_dir() and not any((path / name).exists() for name in _SAVED):
            yield from _read_folder(path, text, source)
        else:
            yield from _read_file(path, path.name, text, source)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_objects(path: str | Path, like: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON Lines file, compressed or not, each with its file and line.

    Args:
        path: Of a file with any name.
        like: What a line is expected to be, for messages.

    Raises:
        InputError: It cannot be read, or a line is no object or holds half of a character.
    """
    path = Path(path)
    codec = COMPRESSED.get(path.suffix.lower())
    try:
        check_file(path)
        for number, line in _lines(path, codec):
            if line.strip():
                row = _object(line, f"{path}:{number}", like)
                check_characters(f"{path}:{number}", json.dumps(row, ensure_ascii=False))
                yield f"{path}:{number}", row
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def files_in(folder: str | Path) -> list[Path]:
    """Every file of a folder and of the folders in it, by name; what begins with a dot is left out.

    Raises:
        InputError: A folder cannot be read, or is a link to one that it is in.
    """
    found: list[Path] = []
    folder = Path(folder)
    waiting: list[tuple[Path, tuple[Path, ...]]] = [(folder, (folder.resolve(),))]
    while waiting:
        inside, around = waiting.pop()
        for path in _listed(inside):
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                found.append(path)
                continue
            if (real := path.resolve()) in around:
                raise InputError(f"{path}: is a link to a folder that it is in, and would be read without end")
            waiting.append((path, (*around, real)))
    return sorted(found)


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror or error})") from None


def _read_folder(folder: Path, text: str, source: str | None) -> Iterator[Passage]:
    for path in files_in(folder):
        try:
            yield from _read_file(path, str(path.relative_to(folder)), text, source)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_file(path: Path, file: str, text: str, source: str | None) -> Iterator[Passage]:
    kind, codec = _kind(path)
    if not path.is_dir() and path.exists() and not path.is_file():
        raise InputError(f"{path}: is a pipe or a device; texts are read from a file on the disk")
    if path.is_dir() or kind == ".parquet":
        rows: Iterator[tuple[str, Any]] = ((f"{path}:{n}", row) for n, row in enumerate(_read_dataset(path), start=1))
    elif kind == ".txt":
        if source is not None or text != "text":
            named = f"source={source!r}" if source is not None else f"text={text!r}"
            raise InputError(f"{path}: got {named}; a .txt file has no columns: it is one source, cut at blank lines")
        yield from _read_txt(path, file, codec)
        return
    elif kind == ".json":
        rows = _read_json(path, codec)
    elif kind == ".jsonl":
        rows = _read_jsonl(path, codec)
    else:
        rows = _read_csv(path, codec, "," if kind == ".csv" else "\t")
    for origin, row in rows:
        yield read_row(row, origin, file, text=text, source=source)


def _kind(path: Path) -> tuple[str, str | None]:
    """The kind of a file, and how it is compressed."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    codec = COMPRESSED.get(suffixes[-1]) if suffixes else None
    kind = "".join(suffixes[:-1] if codec else suffixes[-1:])
    if path.is_dir() or kind in KINDS and not (codec and kind == ".parquet"):
        return kind, codec
    came = "".join(path.suffixes[-2:] if codec else path.suffixes[-1:]) or "a file without suffix"
    raise InputError(
        f"{path}: texts must be a .jsonl, .json, .csv, .tsv, .txt or .parquet file (all but the last also .gz, .zst or "
        f".bz2), a folder of such files or a dataset, not {came}"
    )


def _opened(path: Path, codec: str | None) -> IO[bytes]:
    """The bytes of a file."""
    if codec is None:
        return path.open("rb")
    import pyarrow

    path.stat()  # raises for a file that is not there as `open` does
    return io.BufferedReader(pyarrow.input_stream(str(path), compression=codec))


def _lines(path: Path, codec: str | None) -> Iterator[tuple[int, str]]:
    """Lines with their ends and numbers, one in memory at a time."""
    with _opened(path, codec) as content:
        number = 0
        while line := content.readline(LINE + 1):
            number += 1
            if len(line) > LINE:
                raise InputError(f"{path}:{number}: a line of more than {LINE // 2**20} MiB; is it a file of texts?")
            if b"\0" in line:
                raise InputError(
                    f"{path}:{number}: holds a byte 0, as no text does; if it is UTF-16, convert it to UTF-8"
                )
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}:{number}: not UTF-8 (byte {line[error.start]:#04x}); convert the file to UTF-8"
                ) from None


def _read_jsonl(path: Path, codec: str | None) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path, codec):
        if line.strip():
            yield f"{path}:{number}", _object(line, f"{path}:{number}")


def _object(line: str, origin: str, like: str = _TEXT) -> dict[str, Any]:
    try:
        row = parse_json(line, once=True)
    except ValueError as error:
        such = '{"text": "…", "source": "…"}' if like == _TEXT else like
        why = str(error).replace(" in line 1, column ", " in column ")  # of the file it is another line
        raise InputError(f"{origin}: not JSON ({why}); expected a line such as {such}") from None
    if not isinstance(row, dict):
        raise InputError(f"{origin}: expected {like}, got a JSON {type(row).__name__}")
    return row


def _read_json(path: Path, codec: str | None) -> Iterator[tuple[str, Any]]:
    """A list of objects or texts; or an object a line, which goes by this name as well."""
    first = next((line for _, line in _lines(path, codec) if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _read_jsonl(path, codec)
        return
    with _opened(path, codec) as content:
        read = content.read(WHOLE + 1)
    if len(read) > WHOLE:
        raise InputError(
            f"{path}: more than {WHOLE // 2**30} GiB of JSON in one piece; write an object a line (.jsonl)"
        )
    try:
        rows = parse_json(read.decode("utf-8-sig"), once=True)
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    for number, row in enumerate(rows, start=1):
        origin = f"{path}: item {number}"
        if not isinstance(row, dict | str):
            raise InputError(f"{origin}: expected an object or a text, got a JSON {type(row).__name__}")
        yield origin, {"text": row} if isinstance(row, str) else row


def _read_csv(path: Path, codec: str | None, delimiter: str) -> Iterator[tuple[str, Any]]:
    """A row a record of comma- or tab-separated values; the first one names the columns."""
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # a cell may hold a book
    taken: list[str] = []
    lines = (taken.append(line) or line for _, line in _lines(path, codec))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for row in rows:
            of_row = taken.copy()
            taken.clear()
            if not row:
                continue
            if not header:
                header = row
                if twice := next((name for name in row if row.count(name) > 1), None):
                    raise InputError(f'{path}:{rows.line_num}: two columns are called "{twice}"')
                continue
            origin = f"{path}:{rows.line_num}"
            if row == header or [row[0].removeprefix("\ufeff"), *row[1:]] == header:
                raise InputError(f"{origin}: names the columns again; were several files put together? Take it out")
            if len(row) != len(header):
                raise InputError(f"{origin}: {len(row)} cells; the first line names {len(header)} columns")
            if delimiter == "\t" and _looks_unquoted(of_row, len(header)):
                raise InputError(
                    f"{origin}: {len(of_row)} lines that would be a row each are one between two quotation marks; if "
                    "these belong to texts, double them, and put quotation marks around the cells; or write .jsonl"
                )
            yield origin, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}: not comma-separated values ({error})") from None


def _looks_unquoted(lines: list[str], columns: int) -> bool:
    """Whether several lines that were read as one row are rows by themselves.

    Many .tsv files quote nothing, and a text that begins with a quotation mark takes in what follows until one ends so.
    """
    return len(lines) > 1 < columns and all(line.count("\t") == columns - 1 for line in lines)


def _read_txt(path: Path, file: str, codec: str | None) -> Iterator[Passage]:
    block: list[str] = []
    start = 1
    lines = (line for _, ended in _lines(path, codec) for line in _split(ended))
    for number, line in enumerate(chain(lines, [""]), start=1):
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            yield passage("\n".join(block), None, f"{path}:{start}", file)
            block = []


def _split(ended: str) -> list[str]:
    """The lines of what ends in a line feed: a carriage return alone ended lines, too, and some files still have it."""
    return ended.removesuffix("\n").removesuffix("\r").split("\r")


def _read_dataset(path: Path) -> Any:
    """The rows of a parquet file, or of a dataset saved to a folder, through `datasets`; mapped, not loaded."""
    import datasets
    import pyarrow.parquet

    rows: Any
    log = logging.getLogger("datasets")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it says what it raises
    try:
        if path.is_dir():
            rows = datasets.load_from_disk(str(path))
        else:
            if not pyarrow.parquet.read_metadata(path).num_rows:  # a part of a table may be empty
                return []
            rows = datasets.IterableDataset.from_parquet(str(path))
            next(iter(rows), None)  # reads nothing before
    except Exception as error:  # datasets and pyarrow raise errors of many kinds for files that are not theirs
        reason = str(error).strip().splitlines()
        raise InputError(f"{path}: not a dataset ({reason[0] if reason else type(error).__name__})") from None
    finally:
        log.setLevel(level)
    if isinstance(rows, datasets.DatasetDict):
        raise InputError(f"{path}: holds the splits {sorted(rows)}; name the folder of one of them")
    return rows
