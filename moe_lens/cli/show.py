"""`moe-lens show`: saved results in the terminal; and the findings that every command ends with."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.cli.app import app
from moe_lens.cli.model_loading import quiet
from moe_lens.errors import InputError, near_miss
from moe_lens.manifest import read_manifest, read_object, seal, studies_in, verdict_files

if TYPE_CHECKING:
    import pandas as pd

WIDE = 240
"""Characters of a line where no terminal says how many there are."""
_TEXT = 24
"""Characters of a column of texts that are asked for; longer ones take more than one line."""
_SHOWN = 6
"""Of a cell that is a list, how many of its items are printed."""


@app.command("show")
def show(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Saved studies, or folders of reports.")],
    table: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Table to show; may be repeated. Without it: the first rows of all tables."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of rows of each table.")] = 8,
) -> None:
    """Print the findings and the tables of saved studies.

    For reports, print the verdicts; those of several reports stand side by side.

    Example: moe-lens show runs/routing --table most_specialised --rows 50

    Two models: moe-lens show moe-lens-report-a moe-lens-report-b
    """
    reports = [folder for folder in folders if verdict_files(folder)]
    quiet()
    console = _console()
    if len(reports) > 1 and len(reports) == len(folders):
        if table:
            raise InputError("--table is about one study, and several reports show their verdicts; give one folder")
        _show_verdicts(console, [verdicts for report in reports for verdicts in _verdicts(report)])
        return
    for folder in folders:
        if folder in reports and not table:
            _show_report(console, folder)
        else:
            _show_studies(console, folder, table or [], rows)


def findings_in(folder: Path) -> str:
    """What a folder's result says: a study's findings, or the verdicts of a report."""
    from moe_lens.studies import Collected, StudyResult

    if verdict_files(folder):
        return "\n".join(_verdict_findings(folder, found) for found in _verdicts(folder))
    (inside,) = studies_in(folder)[:1]
    if read_manifest(inside)["plan"]["study"] == "collect":
        return str(Collected.load(inside).findings())
    return str(StudyResult.load(inside).findings())


def _verdicts(folder: Path) -> list[dict[str, Any]]:
    """Of each model of a report's page."""
    return [_read_verdicts(path) for path in verdict_files(folder)]


def _read_verdicts(path: Path) -> dict[str, Any]:
    from moe_lens.studies.verdicts import FORMAT

    found = read_object(path, "the verdicts of a report")
    sealed = found.pop("seal", None)
    if (version := found.get("format")) not in range(1, FORMAT + 1):
        raise InputError(f"{path}: has format {version!r:.40}, and this moe_lens reads 1 to {FORMAT}")
    if (version != 1 and sealed != seal(found)) or not _are_verdicts(found):
        raise InputError(f"{path}: is not as the report wrote it; run its command again")
    return found


def _are_verdicts(found: Mapping[str, Any]) -> bool:
    """Whether everything that is shown of them is text; what has no verdict on its number holds None there."""
    rows, texts = found.get("verdicts"), found.get("texts")
    if not isinstance(found.get("model"), str) or not isinstance(rows, list) or not isinstance(texts, list):
        return False
    told = all(isinstance(row, dict) and isinstance(row.get("number"), str | None) for row in rows)
    said = [row.get(part) for row in rows for part in ("key", "claim", "inference")] if told else [None]
    return all(isinstance(one, str) for one in (*texts, *said))


def _verdict_findings(folder: Path, found: Mapping[str, Any]) -> str:
    from moe_lens.studies.findings import Findings

    answers: dict[str, list[str]] = {}
    for row in found["verdicts"]:
        answers.setdefault(str(row["inference"]).partition(":")[0], []).append(row["key"])
    said = [f"the inference {answer}: claim {', '.join(keys)}" for answer, keys in answers.items()]
    about = f"verdicts on the paper's claims, of {found['model']} on {', '.join(found['texts'])}"
    then = f"moe-lens show {folder}, the claims and their numbers; open report.html in a browser"
    return str(Findings(tuple(said), (), then, about))


def _show_verdicts(console: Any, verdicts: list[dict[str, Any]]) -> None:
    from moe_lens.studies.verdicts import side_by_side

    _print(console, "verdicts", side_by_side(verdicts), len(verdicts) * 100)


def _show_report(console: Any, folder: Path) -> None:
    from rich.text import Text

    console.print(Text(visible(findings_in(folder))))
    _show_verdicts(console, _verdicts(folder))
    if (inside := studies_in(folder)) != [folder]:
        console.print(Text("studies: " + ", ".join(map(str, inside))))


def _show_studies(console: Any, folder: Path, wanted: list[str], rows: int) -> None:
    """A study, or all of a report's: the tables that are wanted of those that have one of them."""
    from rich.text import Text

    read = [_tables_of(each) for each in studies_in(folder)]
    there = list(dict.fromkeys(name for tables, _ in read for name in tables))
    for name in wanted:
        if name not in there:
            raise InputError(f"{folder}: has no table {name!r}; there are {', '.join(there)}{near_miss(name, there)}")
    for tables, said in read:
        shown = [name for name in wanted or tables if name in tables]
        if shown:
            console.print(Text(visible(said)))
        for name in shown:
            _print(console, name, tables[name], rows)


def _tables_of(folder: Path) -> tuple[dict[str, "pd.DataFrame"], str]:
    """Of a study, with its findings."""
    from moe_lens.studies import Collected, StudyResult

    if read_manifest(folder)["plan"]["study"] == "collect":
        collected = Collected.load(folder)
        return {"documents": collected.documents()}, str(collected.findings())
    result = StudyResult.load(folder)
    return dict(result.tables), str(result.findings())


def _print(console: Any, name: str, frame: "pd.DataFrame", rows: int) -> None:
    """A table as text: no name or token in it is taken for markup. A wide one in parts, below one another."""
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    title = f"{name}: {len(frame):,} rows" if len(frame) > rows else name
    cells = [[str(column), *map(_cell, frame[column].head(rows))] for column in frame.columns]
    kinds = [frame[column].dtype.kind for column in frame.columns]
    widths = [max(map(cell_len, column)) for column in cells]
    widths = [3 + (width if kind in "iuf" else min(width, _TEXT)) for width, kind in zip(widths, kinds, strict=True)]
    for part in _parts(widths, kinds, console.width - 1):
        shown = Table(title=Text(title), title_justify="left", title_style="bold")
        for at in part:
            number = kinds[at] in "iuf"
            shown.add_column(Text(cells[at][0]), justify="right" if number else "left", overflow="fold")
        for row in zip(*(cells[at][1:] for at in part), strict=True):
            shown.add_row(*map(Text, row))
        console.print(shown)
        title = f"{name}, continued"


def _parts(widths: list[int], kinds: list[str], most: int) -> list[list[int]]:
    """Which columns stand beside one another; those before the first fraction say which row it is, and are in each."""
    keys = next((at for at, kind in enumerate(kinds) if kind == "f"), len(kinds))
    while keys and sum(widths[:keys]) > 3 * most // 5:
        keys -= 1
    parts = [list(range(keys))]
    for at in range(keys, len(widths)):
        if len(parts[-1]) > keys and sum(widths[column] for column in (*parts[-1], at)) > most:
            parts.append(list(range(keys)))
        parts[-1].append(at)
    return parts


def _cell(value: Any) -> str:
    """A value, with no control character that reaches the terminal; of a long list its first items and their number."""
    import pandas as pd

    from moe_lens.viz import readable

    if isinstance(value, str):
        return value if value.isprintable() else readable(value)
    if not pd.api.types.is_scalar(value):
        more = f", … ({len(value)})" if len(value) > _SHOWN else ""
        return ", ".join(map(_cell, value[:_SHOWN])) + more
    if pd.isna(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def visible(text: str) -> str:
    """A text of several lines with every other control character by its code, those of direction, too."""
    return re.sub(
        r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]",
        lambda found: repr(found[0])[1:-1],
        text,
    )


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)
