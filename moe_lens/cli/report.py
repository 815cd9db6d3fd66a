"""`moe-lens report`: the main job, or one page of studies that were saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from moe_lens.cli.model_loading import quiet
from moe_lens.cli.study_command import Work, command
from moe_lens.errors import InputError
from moe_lens.manifest import read_manifest, studies_in


@command("report", "moe-lens-report", tokens=2048, window=128)
def report(
    out: Path,
    saved: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]...", help="Saved studies, of any kind, or reports, to show instead."),
    ] = None,
    changed: Sequence[str] = (),
) -> Work | None:
    """What the experts of a model do on real text: five studies, and one HTML page of them that opens offline.

    Which experts each domain is sent to, with a random router and routing by the token alone as nulls; one expert
    against the ensemble, with controls; the cost of fewer experts; what each expert would predict next; the cost of
    pruning a quarter of the experts, and of removing those that a domain prefers, with random and matched controls;
    and verdicts on the paper's claims. The folder receives report.html, verdicts.json, and the studies in routing,
    single-expert, lens, pruning and localisation. The last two read a quarter of --tokens, and are left out where a
    domain has a single source. With FOLDER arguments nothing is run: one page shows these saved studies.

    Example: moe-lens report runs/routing runs/single-expert --out page
    """
    found = [study for folder in saved or () for study in studies_in(folder)]
    if found and changed:
        raise InputError(f"{changed[0]} applies to studies that are run; with FOLDER arguments none is: leave it out")
    for folder in found:
        read_manifest(folder)

    from moe_lens.report import run, write_page

    if not found:
        return run
    quiet()
    print(write_page(found, out).resolve())
    return None
