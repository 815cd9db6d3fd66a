"""JSON that somebody else may have written: read, or refused in a few words. Needs no torch."""

import errno
import json
from pathlib import Path
from typing import Any


def parse_json(content: str | bytes, *, once: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        content: To read.
        once: Refuse an object that has a key twice, of which Python's reader keeps the last.

    Raises:
        ValueError: it is not JSON, or of a kind that Python's reader gives up on; says why, in a few words.
    """
    try:
        return json.loads(content, object_pairs_hook=_once if once else None)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} in line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except _TwiceError:
        raise
    except ValueError:
        raise ValueError("a number of thousands of digits") from None


class _TwiceError(ValueError):
    """A key that an object has twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


class NoFileError(OSError):
    """What has a file's name is none."""


def check_file(path: Path) -> None:
    """Nothing, where a path is a file or leads nowhere: opening a pipe waits for ever, and a device may have no end.

    Raises:
        NoFileError: it is a folder, a pipe or a device.
    """
    if path.exists() and not path.is_file():
        raise NoFileError(errno.EINVAL, "a folder" if path.is_dir() else "a pipe or a device, and no file")


def read_json(path: Path, limit: int = 2**28) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file, larger than `limit` bytes, or not JSON; says why, in a few words.
    """
    try:
        check_file(path)
    except NoFileError as error:
        raise ValueError(error.strerror) from None
    with path.open("rb") as content:
        read = content.read(limit + 1)
    if len(read) > limit:
        raise ValueError(f"more than {limit // 2**20} MiB")
    return parse_json(read)
