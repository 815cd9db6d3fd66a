"""One page of any studies that were saved."""

from collections.abc import Mapping
from pathlib import Path

from moe_lens.report.files import OutputFolder
from moe_lens.studies import StudyResult


def write_saved(results: Mapping[Path, StudyResult], folder: OutputFolder, *, version: str) -> Path:
    """Later."""
    raise NotImplementedError
