"""`moe-lens report`: the main job, or one page of studies that were saved."""

from pathlib import Path
from typing import Annotated

import typer

from moe_lens.cli.model_loading import quiet
from moe_lens.cli.study_command import Work, command
from moe_lens.manifest import read_manifest, studies_in


@command("report", "moe-lens-report", tokens=2048, window=128)
def report(
    out: Path,
    saved: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]...", help="Saved studies, of any kind, or reports, to show instead."),
    ] = None,
) -> Work | None:
    """What the experts of a model do on real text: three studies, and one HTML page of them that opens offline.

    Which experts each domain is sent to, beside what an untrained router and the token alone would give; one expert
    against the ensemble, with controls; what fewer experts cost; and what each expert would predict next. The folder
    receives report.html and, in routing, single-expert and lens, what `moe-lens routing --nulls`, `single-expert` and
    `lens` save. With folders that were saved: one page of all of them.

    Example: moe-lens report runs/routing runs/single-expert --out page
    """
    found = [study for folder in saved or () for study in studies_in(folder)]
    for folder in found:
        read_manifest(folder)

    from moe_lens.report import run, write_page

    if not found:
        return run
    quiet()
    print(write_page(found, out).resolve())
    return None
