"""The manifest of a study's folder, read without torch: the command line looks at it before anything else."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_lens.errors import InputError, a_kind
from moe_lens.json_files import check_file, read_json

MANIFEST = "manifest.json"
FORMAT = 4
"""Of manifests, progress, tables and results: raised by one whenever what is written changes, so that this is said."""
_VERDICTS = re.compile(r"verdicts(?:-(\d+))?\.json").fullmatch


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What a finished result says of itself.

    Raises:
        InputError: The folder holds no result of a study, one of another format, or one that was changed.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.exists():
        unfinished = Path(f"{folder.resolve()}.unfinished")  # `.` has no name of its own
        more = f"; {unfinished} holds the beginning of one: run its command again" if unfinished.exists() else ""
        raise InputError(f"{folder}: holds no result of a study (there is no {MANIFEST}){more}")
    manifest = read_object(path, "the manifest of a study")
    known(path, manifest.get("format"))
    if manifest.pop("seal", None) != seal(manifest) or not isinstance(manifest.get("plan"), dict):
        raise InputError(f"{path}: is not as the study wrote it; run its command again, with another --out")
    return manifest


def studies_in(folder: str | Path) -> list[Path]:
    """The folders of results that one stands for: itself, or those inside a folder that is none, as a report's is."""
    folder = Path(folder)
    inside = [] if (folder / MANIFEST).exists() else sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    return inside or [folder]


def model_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a study's manifest says of its model, but for the name, or the place, that it was opened under."""
    return {name: value for name, value in manifest["plan"]["model"].items() if name != "name"}


def verdict_files(folder: str | Path) -> list[Path]:
    """The verdicts of a report's page, in the order of its models."""
    named = [(path, _VERDICTS(path.name)) for path in Path(folder).glob("verdicts*.json")]
    return [path for _, path in sorted((int(match[1] or 1), path) for path, match in named if match)]


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: The file.
        what: What it should be, for the message.

    Raises:
        InputError: It cannot be read, or holds something else.
    """
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        reason = (error.strerror or "unreadable") if isinstance(error, OSError) else f"broken: {error}"
        raise InputError(f"{path}: cannot be read as {what} ({reason})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: cannot be read as {what} (it holds {a_kind(found)})")
    return found


def known(path: Path, found: Any) -> None:
    """Refuse every format but the present one."""
    if found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        what = "a newer moe_lens: install that" if newer else "an earlier moe_lens: run the command again, elsewhere"
        raise InputError(f"{path}: has format {found!r}, and this moe_lens reads {FORMAT}. It is of {what}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        OSError: It cannot be read, or is a pipe or a device, of which there may be no end.
    """
    check_file(path)
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def seal(manifest: Mapping[str, Any]) -> str:
    """A digest of all that a manifest says."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
