"""`moe-lens report`: load, study, write, say where the page is; or one page of studies that were saved."""

import time
from pathlib import Path
from typing import Annotated

import typer

from moe_lens import __version__
from moe_lens.cli import options
from moe_lens.cli.app import app
from moe_lens.cli.model_loading import load_model, quiet
from moe_lens.data import in_memory
from moe_lens.manifest import read_manifest


@app.command()
def report(
    saved: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]...", help="Saved studies, of any kind, to show instead."),
    ] = None,
    model: options.Model = "tiny-deepseekmoe",
    domain: options.Domains = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of text to read in each domain.")] = 4096,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the page and its numbers go.")] = Path(
        "moe-lens-report"
    ),
    seed: options.Seed = 0,
    dtype: options.DtypeOption = options.Dtype.float32,
    device: options.Device = "cpu",
    config: options.Config = None,
) -> None:
    """What the experts of a model do on real text: one HTML page that opens offline, its numbers as JSON and parquet.

    Which experts each domain is sent to; one expert against the ensemble, with controls; what fewer experts cost; and
    what each expert would predict next. With folders that studies saved: one page of all of them.

    Example: moe-lens report runs/routing runs/single-expert --out page
    """
    started = time.monotonic()
    for folder in saved or ():
        read_manifest(folder)
    domains = [] if saved else in_memory(options.open_domains(domain, config))

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    from moe_lens.report import OutputFolder, ReportSettings, n_steps, report_batches, run, write, write_saved
    from moe_lens.studies import StudyResult

    quiet()
    console = Console(stderr=True)
    if saved:
        results = {folder: StudyResult.load(folder) for folder in saved}
        with OutputFolder(out) as folder, console.status("writing the page"):
            page = write_saved(results, folder, version=__version__)
        print(page.resolve())
        return
    settings = ReportSettings(model, tokens, seed, dtype.value, device)
    with OutputFolder(out) as folder:
        with console.status(Text(f"loading {model}")):
            loaded = load_model(model, dtype.value, device)
        batches = report_batches(loaded, domains, settings)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            steps = progress.add_task("reading the domains", total=n_steps(loaded, batches))
            made = run(loaded, domains, batches, settings, lambda: progress.advance(steps))
        with console.status("writing the page"):
            page = write(made, folder, version=__version__)
    console.print(f"done in {time.monotonic() - started:.0f} s", highlight=False)
    print(page.resolve())
