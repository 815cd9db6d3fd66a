"""An output folder whose files appear together, or not at all."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from moe_lens.errors import InputError


class OutputFolder:
    """A folder in which files appear when all of them are complete; nothing is left behind otherwise.

    Entering checks that the folder can be written, so that this fails before the work and not after, and removes what a
    run that was killed has left there.

    Args:
        path: The folder; made if it does not exist. Other files in it stay as they are.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._made: list[Path] = []
        self.scratch = Path()
        """Where files are kept until all of them are complete."""
        self._lock: FileLock | None = None

    def __enter__(self) -> "OutputFolder":
        try:
            missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            for folder in reversed(missing):
                folder.mkdir()
                self._made.append(folder)
            for left in self.path.glob(f"{_UNFINISHED}*"):
                _remove_if_dead(left)
            self.scratch = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.path))
            self._lock = FileLock(self.scratch / _LOCK)  # the system releases it, however this process ends
            self._lock.acquire()
        except OSError as error:
            self._unmake()
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror or error}); choose another --out"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.release()
        shutil.rmtree(self.scratch, ignore_errors=True)
        if kind is not None:
            self._unmake()

    def _unmake(self) -> None:
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # somebody else has put something there
                return

    def fill(self, write_into: Callable[[Path], None]) -> list[Path]:
        """Let `write_into` write files into an empty folder, then move them all into place.

        Raises:
            InputError: The disk is full, or the folder is no longer writable.
        """
        try:
            write_into(self.scratch)
            complete = sorted(made for made in self.scratch.iterdir() if made.name != _LOCK)
            return [made.replace(self.path / made.name) for made in complete]
        except OSError as error:
            raise InputError(f"{self.path}: the report could not be written ({error.strerror or error})") from None


_UNFINISHED, _LOCK = ".unfinished-", ".lock"


def _remove_if_dead(folder: Path) -> None:
    """Remove what another run keeps its files in, unless that run is still at work."""
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return
    lock.release()
    shutil.rmtree(folder, ignore_errors=True)
