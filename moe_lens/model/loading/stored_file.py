"""One safetensors file, from which parts of tensors are read into memory that is there already."""

import errno
import json
import mmap
import os
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_lens.errors import CheckpointError

PAGE, BLOCK = 4096, 8 << 20

Bytes = NDArray[np.uint8]
Stamp = tuple[int, int, int, int]
"""Of a file: its number in the file system, its size, and when its contents and its entry were last changed.

A copy that keeps size and time (`cp -p`, `rsync -t`, a renamed shard) has another number, or another time of its entry.
"""


def stamp_of(path: Path) -> Stamp | None:
    """What tells a file from another one under its name; None if it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def page_block() -> Bytes:
    """Memory by way of which whole pages are read."""
    return np.frombuffer(mmap.mmap(-1, BLOCK), np.uint8)  # a map of its own begins at a page


class StoredFile:
    """A file that stays open. It is read past the operating system's cache where that can be done.

    A model that does not fit into memory is read from end to end again and again: the cache would lose every page
    before it is wanted again, at the cost of a second copy of each. Only whole pages can be read in this way, so they
    come by way of a block of memory.

    Args:
        path: Its header has been found in order.
        block: Of `page_block`; files that are read one at a time can share it.
        stamp: Its own when the model was loaded; that which it has now, if not given.
    """

    def __init__(self, path: Path, block: Bytes, stamp: Stamp | None = None):
        self.path, self._block = path, block
        self.stamp = stamp or stamp_of(path)
        self.check()
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        self._at: dict[str, tuple[int, int]] = {
            name: (8 + size + of["data_offsets"][0], 8 + size + of["data_offsets"][1]) for name, of in header.items()
        }
        self._open(getattr(os, "O_DIRECT", 0))

    def _open(self, flag: int) -> None:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | flag)
            self._file = os.fdopen(descriptor, "rb", buffering=0)
            weakref.finalize(self, self._file.close)
        except OSError as error:
            if not flag or error.errno != errno.EINVAL:  # a file system that knows no other way
                raise changed(self.path, "is gone") from error
            self._open(0)

    def read(self, name: str, into: Bytes, offset: int = 0) -> None:
        """Read as many bytes of a tensor as there is room for.

        Args:
            name: Of the tensor.
            into: Where they go.
            offset: The first of them.

        Raises:
            CheckpointError: The file is not what it was when it was opened.
        """
        self.check()
        begin, end = self._at[name]
        begin += offset
        assert begin + len(into) <= end
        done = 0
        while done < len(into):
            page, skipped = divmod(begin + done, PAGE)
            pages = min(-(-(skipped + len(into) - done) // PAGE) * PAGE, BLOCK)
            here = self._some(page * PAGE, pages) - skipped
            if here <= 0:
                raise changed(self.path, "has become shorter")
            here = min(here, len(into) - done)
            into[done : done + here] = self._block[skipped : skipped + here]
            done += here

    def check(self) -> None:
        """Raise a CheckpointError if the file is not what it was when it was opened."""
        if (found := stamp_of(self.path)) is None or found != self.stamp:
            raise changed(self.path, "has changed")

    def _some(self, at: int, count: int) -> int:
        try:
            self._file.seek(at)
            return self._file.readinto(self._block[:count].data) or 0
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
        self._open(0)  # it can be opened in this way, but not read
        self._file.seek(at)
        return self._file.readinto(self._block[:count].data) or 0


def changed(path: Path, how: str) -> CheckpointError:
    """The error where a file is another by now."""
    return CheckpointError(
        f"{path} {how} since the model was loaded, which reads its parameters from there in every pass. "
        "Load it again, and leave its files as they are while it is in use"
    )
