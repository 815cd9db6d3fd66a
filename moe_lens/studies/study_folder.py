"""Where a study writes: progress beside the folder it was asked for, which appears when everything is there."""

import json
import os
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout
from torch import Tensor

from moe_lens import distributed
from moe_lens.errors import InputError
from moe_lens.manifest import FORMAT, MANIFEST, known, read_manifest, read_object, seal
from moe_lens.scratch import make_folder, unmake
from moe_lens.storage import load_tensors, save_tensors

PLAN = "plan.json"
SPACE = 2**26
"""Bytes that must be free before a study that does not know better begins."""


class StudyFolder:
    """A folder that appears when it is complete; until then what was done is kept in `NAME.unfinished` beside it.

    Args:
        path: The folder, which has a name; it must not exist, be empty, or hold the finished result of the same plan.
        plan: What is to be done, as plain values: unfinished work is resumed if its plan is the same.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any]):
        self.path = named(folder_meant(path))
        if (above := _study_above(self.path)) is not None:
            raise InputError(f"{self.path}: is inside of {above}, which holds what a study saved; choose another --out")
        self.plan = json.loads(json.dumps(plan))
        self.unfinished = self.path.with_name(f"{self.path.name}.unfinished")
        self._made: list[Path] = []
        self._lock = FileLock(self.unfinished / ".lock")  # the system releases it, however this process ends

    def finished(self) -> bool:
        """Whether the folder holds the result of this very plan; its progress, if a killed run left that, is dropped.

        Raises:
            InputError: It holds something else.
        """
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return False
        manifest = read_manifest(self.path)
        self._same(manifest["plan"], self.path, f"holds the result of another study ({manifest['plan']['study']})")
        with suppress(InputError):  # there is none
            if read_object(self.unfinished / PLAN, "the beginning of a study") == {
                "format": FORMAT,
                **manifest["plan"],
            }:
                self._drop()
        return True

    def begin(self, space: int = SPACE) -> None:
        """Make sure that it can be written by this run and no other, and resume unfinished work.

        Args:
            space: Bytes that the study will write.

        Raises:
            InputError: The disk is too full or the folder cannot be written, holds other unfinished work, or another
                run is filling it.
        """
        try:
            self._made = make_folder(self.unfinished)
            self._lock.acquire(timeout=0)
            self._check(space)
        except Timeout:
            raise InputError(
                f"{self.path}: another run is filling it; wait until that has ended, or choose another --out"
            ) from None
        except OSError as error:
            self._leave()
            reason = error.strerror or str(error)
            raise InputError(f"{self.path}: cannot be written ({reason}); choose another --out") from None
        except InputError:
            self._leave()
            raise

    def _check(self, space: int) -> None:
        probe = self.unfinished / f".probe-{uuid4().hex}"
        probe.write_bytes(b"\0" * 2**16)
        probe.unlink()
        free = shutil.disk_usage(self.unfinished).free
        if free < space:
            raise InputError(
                f"{self.path}: {_size(free)} are free there, and this may need {_size(space)}; free some or choose "
                "another --out"
            )
        plan = self.unfinished / PLAN
        begun = self._begun()
        if plan.exists() and begun:
            found = read_object(plan, "the beginning of a study")
            known(plan, found.pop("format", None))
            self._same(found, self.unfinished, "holds the beginning of other work")
        elif begun:
            raise InputError(f"{self.unfinished}: is in the way, and is not ours; choose another --out")
        else:
            _write(plan, json.dumps({"format": FORMAT, **self.plan}, indent=1, ensure_ascii=False))

    def _begun(self) -> bool:
        """Whether anything was done: a plan alone is no work, and what begins with a dot was never completed."""
        return any(path.name != PLAN and path.name[0] != "." for path in self.unfinished.iterdir())

    def _leave(self) -> None:
        """Let others fill it, and leave nothing behind where nothing was done."""
        with suppress(OSError):
            if distributed.world_size() == 1 and not self._begun():  # others may be about to keep what they did
                self.discard()
        self._lock.release()

    @contextmanager
    def filled(self) -> Generator[None]:
        """The work of this run, from `begin` to `finish`: what it leaves unfinished another run can take up."""
        try:
            yield
        finally:
            self._leave()

    def discard(self) -> None:
        """Drop what was done."""
        self._drop()
        unmake(self._made)

    def _drop(self) -> None:
        """The plan comes last: what is left if this is killed is known by it."""
        with suppress(OSError):
            for path in self.unfinished.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != PLAN:
                    path.unlink()
        shutil.rmtree(self.unfinished, ignore_errors=True)

    def there(self) -> None:
        """Make sure that the progress so far is still there.

        Raises:
            InputError: It vanished meanwhile.
        """
        if not (self.unfinished / PLAN).is_file():
            raise InputError(f"{self.unfinished}: vanished while it was being filled; run the command again")

    def save(self, name: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Keep progress, in place of what was kept under the name; complete or not at all."""
        save_tensors(self.unfinished / f"{name}.safetensors", "progress", tensors, {**header, **self._origin(name)})

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The progress kept under a name.

        Raises:
            InputError: It cannot be read, or was kept under another name or by another study.
        """
        path = self.unfinished / f"{name}.safetensors"
        if not path.exists():
            return None
        tensors, header = load_tensors(path, "progress")
        if {key: header.get(key) for key in self._origin(name)} != self._origin(name):
            raise InputError(f"{path}: is not what this study kept there; remove {self.unfinished} to begin anew")
        return tensors, header

    def _origin(self, name: str) -> dict[str, str]:
        """What tells progress from that of other passes, domains and studies."""
        return {"kept_as": name, "of_plan": seal(self.plan)}

    def note(self, name: str, values: Mapping[str, Any]) -> None:
        """Keep plain values."""
        _write(self.unfinished / f"{name}.json", json.dumps(values, ensure_ascii=False))

    def has(self, name: str) -> bool:
        """Whether something was kept by `note`."""
        return (self.unfinished / f"{name}.json").exists()

    def noted(self, name: str) -> dict[str, Any]:
        """What was kept by `note`."""
        return read_object(self.unfinished / f"{name}.json", "what a study notes")

    def finish(self, scratch: Path, manifest: Mapping[str, Any]) -> None:
        """Let the files of a folder inside `unfinished` appear, with their manifest, and drop the progress.

        Raises:
            InputError: The disk is full, or the folder is no longer writable; progress is kept.
        """
        try:
            complete = {"format": FORMAT, "plan": self.plan, **json.loads(json.dumps(manifest, allow_nan=False))}
            complete["seal"] = seal(complete)
            _write(scratch / MANIFEST, json.dumps(complete, indent=1, ensure_ascii=False))
            scratch.rename(self.path)  # takes the place of an empty folder, and of no other
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"{self.path}: could not be written ({reason}); {self.unfinished} is kept") from None
        self._drop()

    def scratch(self) -> Path:
        """An empty folder for the files of the result."""
        folder = self.unfinished / "result"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def _same(self, found: Mapping[str, Any], where: Path, what: str) -> None:
        different = list(_different(found, self.plan))
        if where == self.path:
            different = [each for each in different if each[0] != "processes"]  # they change no result
        if different:
            told = "; ".join(f"{key}: {_short(there)} there, {_short(now)} now" for key, there, now in different)
            raise InputError(f"{where}: {what} – {told}. Choose another --out, or remove it")


def named(path: Path) -> Path:
    """The path of a folder that can have a neighbour of a like name.

    Raises:
        InputError: It is the working directory, a folder above it, or a root.
    """
    if path.name in ("", ".."):
        raise InputError(f"{path}: progress is kept beside the result, and so it needs a name; choose a folder in it")
    return path


def folder_meant(path: Path) -> Path:
    """Where a result is to appear: the home of `~`, and what a link leads to, which a folder cannot replace.

    Raises:
        InputError: It is a link that leads to itself.
    """
    with suppress(RuntimeError):  # nobody has that name
        path = path.expanduser()
    if not path.is_symlink():
        return path
    end = Path(os.path.realpath(path))
    if end.is_symlink():
        raise InputError(f"{path}: is a link that leads to itself; choose another --out")
    return end


def _study_above(path: Path) -> Path | None:
    """The folder above a path that holds what a study saved, if there is one."""
    for above in path.absolute().parents:
        with suppress(InputError):  # a file of that name may be somebody else's
            read_manifest(above)
            return above
    return None


def _write(path: Path, content: str) -> None:
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)


def _different(there: Mapping[str, Any], now: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What differs of two plans: the key, and both values; keys inside keys are named with dots."""
    for key in sorted(there.keys() | now.keys()):
        one, other = there.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _different(one, other, f"{inside}{key}.")
        elif one != other:
            yield f"{inside}{key}", one, other


def _short(value: Any) -> str:
    said = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return said if len(said) <= 160 else f"{said[:157]}…"


def _size(n: int) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
