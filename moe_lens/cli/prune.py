"""`moe-lens prune`: a smaller checkpoint, and what it costs."""

import gc
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_lens.cli import options
from moe_lens.cli.app import app
from moe_lens.cli.model_loading import load_model, quiet, where_it_is
from moe_lens.data import in_memory
from moe_lens.errors import InputError, MoELensError, near_miss


class Scoring(StrEnum):
    """How experts are scored; see `moe_lens.pruning.METHODS`."""

    frequency = "frequency"
    summed_weight = "summed_weight"
    ean = "ean"
    weighted_ean = "weighted_ean"
    reap = "reap"
    naee = "naee"
    gradient = "gradient"
    knockout = "knockout"
    random = "random"
    selected = "selected"


class Budget(StrEnum):
    """What the number of kept experts applies to: each layer, or the whole model."""

    layer = "layer"
    whole = "global"


@app.command("prune")
def prune(
    model: options.Model = "tiny-deepseekmoe",
    domain: options.Domains = None,
    keep: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of experts to keep.")] = 0.5,
    method: Annotated[Scoring, typer.Option(help="Score by which the experts to keep are chosen.")] = Scoring.reap,
    specialist: Annotated[
        str | None,
        typer.Option(
            metavar="DOMAIN", help="Score experts on this domain only, instead of weighting all domains equally."
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Average pruned experts into kept ones instead of dropping them.")
    ] = False,
    budget: Annotated[
        Budget,
        typer.Option(help="Keep the same number in every layer, or the best-scored experts of all layers together."),
    ] = Budget.layer,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform",
            help="With --budget global: give all layers the same number in the end, as a checkpoint's config requires.",
        ),
    ] = False,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Lower the number of active experts per token to this.")
    ] = None,
    against: Annotated[
        list[Scoring] | None,
        typer.Option(metavar="METHOD", help="Method to compare with; may be repeated.  [frequency, random]"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Number of tokens to read in each domain.")] = 8192,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", callback=options.at_home, help="Folder for the checkpoint and the report.")
    ] = Path("moe-lens-pruned"),
    seed: options.Seed = 0,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    max_memory: options.MaxMemory = None,
    trust_tokenizer_code: options.TrustTokenizer = False,
    config: options.Config = None,
) -> None:
    """Write a smaller model, and measure what that costs.

    FOLDER/model is a checkpoint in the family's own format, which plain transformers loads; FOLDER/report.html shows
    the perplexity of each domain by the number of experts kept, for several methods, with intervals, memory and speed.
    Weights keep the precision in which they are stored.

    Methods score experts by their routing and outputs (frequency, summed_weight, ean, weighted_ean, reap), by the
    change of the layer's output (naee) or of the loss (gradient, knockout) without them, by whether any token selected
    them (selected), or at random, as a control (random). knockout runs the model once for each expert; naee runs each
    layer once for each of its experts.

    Example: moe-lens prune --domain french --domain code --keep 0.5 --specialist french --out french-half
    """
    started = time.monotonic()
    domains = in_memory(options.open_domains(domain, config, out))
    if specialist is not None and specialist not in [one.name for one in domains]:
        known = [one.name for one in domains]
        raise InputError(
            f"--specialist is {specialist!r}; the domains are {', '.join(known)}{near_miss(specialist, known)}"
        )
    if uniform and budget is not Budget.whole:
        raise InputError("--uniform evens out what --budget global gives; without that it has no effect: leave it out")
    if Path(model).is_dir() and Path(model).resolve() in (out.resolve(), *out.resolve().parents):
        raise InputError(f"--out is {out}, in the folder of the model itself; choose another")
    if (out / "model").exists() and any((out / "model").iterdir()):
        raise InputError(f"{out / 'model'} is not an empty folder; choose another --out, or remove it")
    from rich.console import Console
    from rich.text import Text

    from moe_lens.pruning.prune_job import PruneSettings, compare
    from moe_lens.pruning.prune_job import prune as run
    from moe_lens.report import OutputFolder
    from moe_lens.report.pruning_page import write_pruning
    from moe_lens.report.report_files import SMALLER, check_place

    check_place(out, SMALLER)
    quiet()
    chosen: Any = [one.value for one in against] if against else ["frequency", "random"]
    settings = PruneSettings(
        model=model,
        keep=keep,
        method=method.value,
        merged=merge,
        budget=budget.value,
        uniform=uniform,
        domain=specialist,
        top_k=top_k,
        compare=tuple(chosen),
        tokens=tokens,
        seed=seed,
    )
    console = Console(stderr=True)
    with OutputFolder(out) as folder, console.status(f"loading {model}") as status:
        if folder.left:
            console.print(
                f"an earlier run was killed in {out}: its unfinished files are removed, and this run starts anew"
            )
        memory, trust = options.max_memory(max_memory, device), trust_tokenizer_code
        loaded = load_model(model, dtype.value, device, memory, trust_tokenizer=trust)
        where = where_it_is(loaded)

        def watch(what: str) -> None:
            status.update(Text(what))
            if where is not None:  # small models are quick
                console.print(Text(what))

        if where is not None:
            console.print(Text(where))
        smaller = folder.scratch / "model"  # appears with the rest
        try:
            made = run(loaded, domains, settings, smaller, watch=watch)
        except (MoELensError, OSError) as error:  # the place where it is made is nobody's but ours
            raise InputError(str(error).replace(str(folder.scratch), str(out))) from error
        del loaded  # the two that are timed take its place
        gc.collect()
        watch("measuring both models")
        page = write_pruning(made, *compare(model, smaller), folder)
    console.print(f"done in {time.monotonic() - started:.0f} s", highlight=False)
    console.print(Text(str(made.frontier.findings())), soft_wrap=True)
    print(page.resolve())
