"""Folders for what is unfinished, which the next run that writes there removes if a killed one has left them."""

import shutil
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK = ".lock"
_BEGUN = 3600
"""Seconds after which a folder without a lock is no longer about to get one."""


def make_folder(path: Path) -> list[Path]:
    """Make a folder, and those above it that are missing; which ones were made, for `unmake`.

    Raises:
        OSError: it cannot be made; nothing is left behind.
    """
    made: list[Path] = []
    try:
        for folder in reversed([path, *path.parents]):
            try:
                if not folder.is_dir():
                    folder.mkdir()
                    made.append(folder)
            except FileExistsError:
                if not folder.is_dir():  # another process was quicker
                    raise
    except BaseException:
        unmake(made)
        raise
    return made


def unmake(made: list[Path]) -> None:
    """Remove the folders again that `make_folder` has made, as long as nothing is in them."""
    for folder in reversed(made):
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:  # somebody else has put something there
            return


@contextmanager
def folder_made(path: Path, *, whole: bool = False) -> Generator[None]:
    """A folder for what is written inside the block; when that fails, folders that were made for it go again.

    Args:
        path: The folder.
        whole: Whether a new one goes with all that is in it: for several files that only together are something.

    Raises:
        OSError: it cannot be made.
    """
    made = make_folder(path)
    try:
        yield
    except BaseException:
        if whole and path in made:
            shutil.rmtree(path, ignore_errors=True)
            made.remove(path)
        unmake(made)
        raise


@contextmanager
def scratch_folder(inside: Path, prefix: str) -> Generator[Path]:
    """An empty folder, removed in the end; its name is the prefix and letters of its own.

    Args:
        inside: Where it is made.
        prefix: Of folders of this kind: those that were left behind are removed.

    Raises:
        OSError: it cannot be made.
    """
    remove_dead(inside, prefix)
    made = Path(tempfile.mkdtemp(prefix=prefix, dir=inside))
    try:
        with FileLock(made / _LOCK):  # the system releases it, however this process ends
            work = made / "work"
            work.mkdir()
            yield work
    finally:
        shutil.rmtree(made, ignore_errors=True)


def remove_dead(inside: Path, prefix: str) -> int:
    """Remove what runs that were killed have left; how many folders that were. Those of runs at work stay."""
    found = [left for left in inside.iterdir() if left.name.startswith(prefix)]
    return sum(_removed_if_dead(left) for left in found)


def _removed_if_dead(folder: Path) -> bool:
    lock = folder / _LOCK
    try:
        if not lock.exists() and time.time() - folder.stat().st_mtime < _BEGUN:
            return False
        if lock.exists():
            with FileLock(lock, timeout=0):
                pass
    except (Timeout, OSError):
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()
