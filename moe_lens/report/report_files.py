"""An output folder whose files appear together, or not at all."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from moe_lens.errors import InputError
from moe_lens.json_files import check_file
from moe_lens.scratch import make_folder, remove_dead, scratch_folder, unmake

PAGE = "report.html"
REPORT, SMALLER = "MoE report: ", "A smaller "
"""What the title of a report's page begins with, and of a smaller model's."""


def check_place(folder: str | Path, title: str) -> None:
    """Nothing, where a page can be written: only one of its own kind is replaced.

    Args:
        folder: Where to.
        title: `REPORT` or `SMALLER`.

    Raises:
        InputError: There is another `report.html` in the folder.
    """
    page = Path(folder) / PAGE
    if not (page.exists() or page.is_symlink()):
        return
    try:
        check_file(page)
        with page.open("rb") as content:
            begin = content.read(1024)
    except OSError as error:
        raise InputError(f"{page}: is there, and cannot be replaced ({error.strerror or error})") from None
    if f"<title>{title}".encode() not in begin:
        raise InputError(f"{page}: is there, is another page, and would be replaced; choose another --out")


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
        self._stack = ExitStack()
        self.scratch = Path()
        """Where files are kept until all of them are complete."""
        self.left = 0
        """How many runs were killed here before they were complete; what they left is removed."""

    def __enter__(self) -> "OutputFolder":
        try:
            self._made = make_folder(self.path)
            self.left = remove_dead(self.path, _UNFINISHED)
            if any(path.name.startswith(_UNFINISHED) for path in self.path.iterdir()):
                raise OSError("another run is writing there")
            self.scratch = self._stack.enter_context(scratch_folder(self.path, _UNFINISHED))
        except OSError as error:
            unmake(self._made)
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror or error}); choose another --out"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if kind is not None:
            unmake(self._made)

    def fill(self, write_into: Callable[[Path], None]) -> list[Path]:
        """Let `write_into` write files into an empty folder, then move them all into place.

        Raises:
            InputError: The disk is full, or the folder is no longer writable.
        """
        try:
            write_into(self.scratch)
            return [made.replace(self.path / made.name) for made in sorted(self.scratch.iterdir())]
        except OSError as error:
            raise InputError(f"{self.path}: the report could not be written ({error.strerror or error})") from None


_UNFINISHED = ".unfinished-"
