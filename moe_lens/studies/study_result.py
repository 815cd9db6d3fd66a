"""`StudyResult`: what a study found, with all that is needed to know how it was found."""

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lens.checked import Natural, Positive
from moe_lens.errors import InputError, near_miss
from moe_lens.manifest import file_digest, read_manifest
from moe_lens.reprs import Drawn
from moe_lens.stats import Result
from moe_lens.storage import stored_kind
from moe_lens.studies.finding_sentences import findings_of
from moe_lens.studies.findings import Findings
from moe_lens.studies.frames import latex


@dataclass(frozen=True, eq=False)
class StudyResult(Drawn):
    """The result of a study: tables to read, and the sums by source that they, and comparisons, are computed from."""

    manifest: Mapping[str, Any]
    """Plan (study, settings, reading, model, domains), versions, command, and what was read of each domain."""
    tables: Mapping[str, pd.DataFrame]
    """In long form, with the domain in the first column, by the name of their parquet file."""
    results: Mapping[str, Mapping[str, Result]]
    """By domain and name."""

    def _facts(self) -> dict[str, Any]:
        model = self.manifest["plan"].get("model", {})
        return {
            "study": self.study,
            "model": model.get("name"),
            "domains": self.domains,
            **{f"table {name}": table for name, table in self.tables.items()},
        }

    @property
    def study(self) -> str:
        """Which study it is."""
        return str(self.manifest["plan"]["study"])

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains, in the order that they were given."""
        return tuple(self.results)

    def findings(self) -> Findings:
        """The main findings in at most five lines, with intervals and controls; what is missing, and what to run next.

        The command line prints them when a study ends; `print(result.findings())` does the same.
        """
        return findings_of(self.manifest, self.tables)

    def to_latex(self, table: str, *, columns: Sequence[str] | None = None, digits: Positive = 3, **equal: Any) -> str:
        """A table for a paper: booktabs, everything escaped, each number with its interval in one column.

        Args:
            table: Its name.
            columns: Which; all if not given. Ends of intervals belong to the column that they are of.
            digits: Significant ones.
            equal: The rows that have these values, or one of several, by column: `domain="code", layer=[1, 2]`.

        Raises:
            InputError: There is no such table or column, or no row that has a value.
        """
        if table not in self.tables:
            raise InputError(
                f"there is no table {table!r}; there are {', '.join(self.tables)}{near_miss(table, self.tables)}"
            )
        return latex(self.tables[table], columns, digits, **equal)

    def expert(self, layer: Natural, expert: Natural) -> Any:
        """The atlas's card of one expert, of a result of the study `atlas`; see `moe_lens.atlas.expert_card`.

        Args:
            layer: A layer with experts.
            expert: The expert's id.

        Raises:
            InputError: It is the result of another study, or there is no such expert.
            HookError: The layer has no experts.
        """
        # Cards stand above results in the layers, as figures do.
        return importlib.import_module("moe_lens.atlas").expert_card(self, layer, expert)

    def write(self, folder: str | Path) -> dict[str, Any]:
        """Write everything but the manifest into a folder; the manifest that goes with it.

        Tables are parquet files; results by domain are safetensors files in the folder `results`. The manifest has a
        digest of each of them, so that a file which was changed is never taken for a result.

        Args:
            folder: One that is there, and empty.
        """
        folder = Path(folder)
        for name, table in self.tables.items():
            table.to_parquet(folder / f"{name}.parquet", index=False)
        results: dict[str, dict[str, str]] = {}
        for number, (domain, found) in enumerate(self.results.items()):
            for name, result in found.items():
                file = f"results/{number:02d}-{re.sub('[^A-Za-z0-9]+', '-', domain)[:80]}-{name}.safetensors"
                result.save(folder / file)
                results.setdefault(domain, {})[name] = file
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        digests = {name: file_digest(path) for name, path in files.items()}
        return {**self.manifest, "tables": sorted(self.tables), "results": results, "files": digests}

    @classmethod
    def load(cls, folder: str | Path) -> "StudyResult":
        """Read what a study saved.

        Args:
            folder: What was given as `out`.

        Raises:
            InputError: The folder holds no result of a study, or a file of it is missing or was changed.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if "files" not in manifest:
            study = manifest["plan"]["study"]
            raise InputError(f"{folder}: holds what {study} saved, of which there is nothing to show or compare")
        for name, digest in manifest["files"].items():
            try:
                same = file_digest(folder / name) == digest
            except OSError as error:
                raise InputError(f"{folder}: {name} cannot be read ({error.strerror or error})") from None
            if not same:
                raise InputError(f"{folder}: {name} is not as the study wrote it; run its command again")
        tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in manifest["tables"]}
        results = {
            domain: {name: _load(folder / file) for name, file in files.items()}
            for domain, files in manifest["results"].items()
        }
        return cls(manifest, tables, results)


def _load(path: Path) -> Result:
    kinds = {kind.__name__: kind for kind in _kinds(Result)}
    kind = stored_kind(path)
    if kind not in kinds:
        raise InputError(f"{path} holds {kind}, which is no result that moe_lens knows; import its module first")
    return kinds[kind].load(path)


def _kinds(base: type[Result]) -> Iterator[type[Result]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds(kind)
