"""The commands that run a study: arguments → study → a saved folder."""

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from moe_lens import distributed
from moe_lens.cli import options
from moe_lens.cli.app import app
from moe_lens.cli.loading import join_processes, leave_processes, load_model, quiet
from moe_lens.data import Reading
from moe_lens.studies import TREATMENTS, RoutingStudy, SingleExpertStudy, Study, run

Out = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER",
        help="Where the result goes. It appears when it is complete; until then FOLDER.unfinished keeps what was done, "
        "and the same command goes on from there.",
    ),
]


class Together(StrEnum):
    """Where experts are left out."""

    together = "together"
    each = "each"
    both = "both"


class Treated(StrEnum):
    """What is done to experts that are not kept."""

    dropped = "dropped"
    renormalised = "renormalised"
    random = "random"
    replaced = "replaced"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The options that all studies have."""

    model: options.Model = "tiny-deepseekmoe"
    domain: options.Domains = None
    text_column: options.TextColumn = "text"
    source_column: options.SourceColumn = None
    split: options.Split = "train"
    streaming: options.Streaming = False
    tokens: options.Tokens = 4096
    window: options.Window = 256
    packed: options.Packed = False
    seed: options.Seed = 0
    batch_tokens: options.BatchTokens = 2048
    shard_tokens: options.ShardTokens = 2**15
    dtype: options.DtypeOption = options.Dtype.float32
    device: options.Device = "cpu"
    config: options.Config = None

    def domains(self) -> options.Opened:
        """The texts."""
        names = {"text": self.text_column, "source": self.source_column}
        return options.open_domains(self.domain, self.config, **names, split=self.split, streaming=self.streaming)

    def reading(self) -> Reading:
        """How they are read."""
        return Reading(
            tokens=self.tokens or None,
            context=self.window,
            packed=self.packed,
            seed=self.seed,
            shard_tokens=self.shard_tokens,
        )


def command(name: str, folder: str) -> Callable[[Callable[..., Study]], Callable[..., Study]]:
    """Make a command of a function from its own options to a study.

    Args:
        name: Of the command.
        folder: Where its result goes if --out is not given.
    """

    def decorate(make: Callable[..., Study]) -> Callable[..., Study]:
        own = inspect.signature(make).parameters

        def called(**given: Any) -> None:
            study = make(**{key: given.pop(key) for key in own})
            _run(study, given.pop("out"), Arguments(**given))

        keyword = inspect.Parameter.KEYWORD_ONLY
        shared = [
            inspect.Parameter(field.name, keyword, default=field.default, annotation=field.type)
            for field in fields(Arguments)
        ]
        out = inspect.Parameter("out", keyword, default=Path(folder), annotation=Out)
        every = [*shared, out, *(parameter.replace(kind=keyword) for parameter in own.values())]
        called.__doc__ = make.__doc__
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
        called.__signature__ = inspect.Signature(every)
        app.command(name)(called)
        return make

    return decorate


def _run(study: Study, out: Path, given: Arguments) -> None:
    quiet()
    started = time.monotonic()
    domains, reading = given.domains(), given.reading()
    join_processes(given.device)
    try:
        console = Console(stderr=True, quiet=distributed.rank() > 0)
        with console.status(f"loading {given.model}"):
            model = load_model(given.model, given.dtype.value, given.device)
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=console) as progress:
            task, read = progress.add_task("reading"), 0

            def watch(what: str, tokens: int) -> None:
                nonlocal read
                read += tokens
                progress.update(task, description=f"{what} · {read:,} tokens read")

            how = {"reading": reading, "name": given.model, "batch_tokens": given.batch_tokens}
            run(study, model, domains, out=out, watch=watch, **how)
        console.print(f"done in {time.monotonic() - started:.0f} s", highlight=False)
        if distributed.rank() == 0:
            print(out.resolve())
    finally:
        leave_processes()


@command("routing", "moe-lens-routing")
def routing(
    nulls: Annotated[
        bool,
        typer.Option("--nulls", help="Measure a random router, token-unigram and uniform routing, too: reads twice."),
    ] = False,
) -> Study:
    """Which experts each domain's tokens are sent to, with intervals over sources and tests between domains.

    Tables: specialisation (share of tokens that have the expert among their active ones), most_specialised, layers
    (Gini, entropies, margin, experts for 50 and 80 %), pairs (co-activation, transitions), persistence, vocabulary; of
    two domains or more: domain_experts, domain_layers, domain_pairs, the tests that permute domains over sources.

    Example: moe-lens routing --domain prose=prose.jsonl --domain code=code.jsonl --tokens 100000 --out runs/routing

    Several processes: torchrun --nproc-per-node 4 -m moe_lens routing …
    """
    return RoutingStudy(nulls=nulls)


@command("single-expert", "moe-lens-single-expert")
def single_expert(
    layers: Annotated[
        Together, typer.Option(help="Leave experts out in all layers at once, in one at a time, or both.")
    ] = (Together.together),
    treatment: Annotated[
        list[Treated] | None,
        typer.Option(
            help="What is done to the experts that are not kept; give it several times. Without it: all four."
        ),
    ] = None,
    k: Annotated[
        list[int] | None,
        typer.Option("--k", min=0, help="How many experts are kept; give it several times.  [0 … top-k]"),
    ] = None,
) -> Study:
    """One expert against all active ones: cosines with their controls, and what fewer experts cost.

    Treatments of the experts that are not kept: dropped; renormalised (dropped, and the kept weights rescaled to the
    same sum); random (the kept ones are drawn at random); replaced (by their mean output, taken from other sources).

    Tables: perplexity (a row for each treatment, layer and k, token-weighted and as a geometric mean over windows, with
    ratios to the whole model paired by source), similarity (cosine of residual + top expert with residual + all
    experts, beside its controls).

    Every text is read twice, and once more for each variant: 2 + 22 times for 6 active experts and all treatments, and
    22 times more for each layer with --layers both.

    Example: moe-lens single-expert --k 1 --k 3 --treatment dropped --treatment random --out runs/single
    """
    chosen = tuple(each.value for each in treatment) if treatment else tuple(TREATMENTS)
    return SingleExpertStudy(treatments=chosen, layers=layers.value, k=tuple(k) if k else None)
