"""`moe-lens report`: the main job, or one page of studies that were saved."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_lens.cli import options
from moe_lens.cli.model_loading import is_small, quiet
from moe_lens.cli.second_process import TOLD, second_process, worth_it
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
    """Five studies of a model, on one page.

    What the experts of a model do on real text, on one HTML page that opens offline: which experts the tokens of each
    domain choose, with a random router and routing by the token alone as nulls; one expert compared with the ensemble
    of all active experts, with controls; the loss with fewer experts; what a lens reads after each expert; the loss
    after pruning a quarter of the experts, and after removing those that a domain prefers, with random and matched
    controls; and verdicts on the paper's claims. The folder receives report.html, verdicts.json, and the studies in
    routing, single-expert, lens, pruning and localisation. The last two read a quarter of --tokens, in windows of at
    most 32 tokens, and are left out if a domain has a single source. With FOLDER arguments nothing is run: the page
    shows these saved studies.

    Example: moe-lens report runs/routing runs/single-expert --out page
    """
    found = [study for folder in saved or () for study in studies_in(folder)]
    if found and changed:
        raise InputError(f"{changed[0]} applies to studies that are run; with FOLDER arguments none is: leave it out")
    found = list({folder.resolve(): folder for folder in found}.values())  # a study given twice is one
    for folder in found:
        read_manifest(folder)
        if folder.resolve() in (out.resolve(), *out.resolve().parents):
            raise InputError(f"--out {out} is in the folder of a study that is shown; choose another")

    from moe_lens.report import write_page

    if not found:
        return _run
    quiet()
    print(write_page(found, out).resolve())
    return None


def _run(model: Any, domains: options.Opened, *, out: Path, watch: Any, **how: Any) -> Path:
    """The studies and the page; some of them, where that is quicker, in a second process meanwhile."""
    from moe_lens.report import run
    from moe_lens.report.run_report import SECOND

    if TOLD in os.environ:
        return run(model, domains, out, watch=watch, part="second", **how)
    wanted = worth_it(is_small(model), domains, [out / name for name in SECOND])
    with second_process(wanted) as finished:

        def wait() -> None:
            watch(", ".join(SECOND), 0)
            finished()

        return run(model, domains, out, watch=watch, wait=wait if wanted else None, **how)
