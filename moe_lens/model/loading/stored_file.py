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
    """

    def __init__(self, path: Path, block: Bytes):
        self.path, self._block = path, block
        self._stamp = self._seen()
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
                raise self.changed("is gone") from error
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
                raise self.changed("has become shorter")
            here = min(here, len(into) - done)
            into[done : done + here] = self._block[skipped : skipped + here]
            done += here

    def check(self) -> None:
        """Raise a CheckpointError if the file is not what it was when it was opened."""
        if self._seen() != self._stamp:
            raise self.changed("has changed")

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

    def _seen(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size

    def changed(self, how: str) -> CheckpointError:
        """The error where the file is another by now."""
        return CheckpointError(
            f"{self.path} {how} since the model was loaded, which reads its parameters from there in every pass. "
            "Load it again, and leave its files as they are while it is in use"
        )
