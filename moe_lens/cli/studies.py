"""The commands that run a study: arguments → study → a saved folder."""

import inspect
import time
from collections.abc import Callable
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
from moe_lens.studies import RoutingStudy, Study, run

Out = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER",
        help="Where the result goes. It appears when it is complete; until then FOLDER.unfinished keeps what was done, "
        "and the same command goes on from there.",
    ),
]


def _study(
    context: typer.Context,
    model: options.Model = "tiny-deepseekmoe",
    domain: options.Domains = None,
    text_column: options.TextColumn = "text",
    source_column: options.SourceColumn = None,
    split: options.Split = "train",
    streaming: options.Streaming = False,
    tokens: options.Tokens = 4096,
    context_length: Annotated[int, typer.Option("--context", min=3, help="Greatest length of a window of text.")] = 256,
    packed: options.Packed = False,
    seed: options.Seed = 0,
    batch_tokens: options.BatchTokens = 2048,
    shard_tokens: options.ShardTokens = 2**15,
    dtype: options.DtypeOption = options.Dtype.float32,
    device: options.Device = "cpu",
    config: options.Config = None,
) -> None:
    """The arguments of every study; never called."""
    raise AssertionError


def command(name: str, folder: str) -> Callable[[Callable[..., Study]], Callable[..., Study]]:
    """Make a command of a function from its own options to a study.

    Args:
        name: Of the command.
        folder: Where its result goes if --out is not given.
    """

    def decorate(make: Callable[..., Study]) -> Callable[..., Study]:
        own = inspect.signature(make).parameters
        shared = inspect.signature(_study).parameters
        out = inspect.Parameter("out", inspect.Parameter.KEYWORD_ONLY, default=Path(folder), annotation=Out)

        def called(context: typer.Context, **given: Any) -> None:
            settings = {key: given.pop(key) for key in own}
            _run(context, make(**settings), **given)

        called.__doc__ = make.__doc__
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in shared.values()]
        called.__signature__ = inspect.Signature([*parameters, out, *own.values()])  # pyright: ignore[reportFunctionMemberAccess]
        called.__annotations__ = {each.name: each.annotation for each in called.__signature__.parameters.values()}  # pyright: ignore[reportFunctionMemberAccess]
        app.command(name)(called)
        return make

    return decorate


def _run(
    context: typer.Context,
    study: Study,
    *,
    model: str,
    domain: list[str] | None,
    text_column: str,
    source_column: str | None,
    split: str,
    streaming: bool,
    tokens: int,
    context_length: int,
    packed: bool,
    seed: int,
    batch_tokens: int,
    shard_tokens: int,
    dtype: options.Dtype,
    device: str,
    config: Path | None,  # noqa: ARG001  # its callback has read it
    out: Path,
) -> None:
    quiet()
    started = time.monotonic()
    shared = {"text": text_column, "source": source_column, "split": split, "streaming": streaming}
    domains = options.open_domains(context, domain, **shared)
    reading = Reading(
        tokens=tokens or None, context=context_length, packed=packed, seed=seed, shard_tokens=shard_tokens
    )
    join_processes(device)
    try:
        console = Console(stderr=True, quiet=distributed.rank() > 0)
        with console.status(f"loading {model}"):
            loaded = load_model(model, dtype.value, device)
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
            task, read = progress.add_task("reading"), 0

            def watch(what: str, n: int) -> None:
                nonlocal read
                read += n
                progress.update(task, description=f"{what} · {read:,} tokens read")

            run(
                study, loaded, domains, reading=reading, out=out, name=model, batch_tokens=batch_tokens, watch=watch
            )
        console.print(f"done in {time.monotonic() - started:.0f} s", highlight=False)
        if distributed.rank() == 0:
            print(out.resolve())
    finally:
        leave_processes()


@command("routing", "moe-lens-routing")
def routing() -> Study:
    """Which experts each domain's tokens are sent to, with intervals over sources and tests between domains.

    Tables: specialisation (share of tokens that have the expert among their active ones), most_specialised, layers
    (Gini, entropies, margin, experts for 50 and 80 %), pairs (co-activation, transitions), persistence.

    Example: moe-lens routing --domain prose=prose.jsonl --domain code=code.jsonl --tokens 100000 --out runs/routing

    Several processes: torchrun --nproc-per-node 4 -m moe_lens routing …
    """
    return RoutingStudy()
