"""What the commands that read texts have in common: their options, the processes, the model, the progress."""

import inspect
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.cli import options
from moe_lens.cli.app import app
from moe_lens.cli.model_loading import load_model, quiet, where_it_is
from moe_lens.cli.processes import join_processes
from moe_lens.cli.show import findings_in, visible
from moe_lens.data import Reading

if TYPE_CHECKING:
    from moe_lens.studies import Study

SHARED: set[str] = set()
"""Names of the commands whose work several processes can share."""

Out = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER",
        callback=options.at_home,
        help="Folder for the result. It appears when it is complete; until then progress is kept in FOLDER.unfinished, "
        "and the same command resumes from there.",
    ),
]


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
    batch_tokens: options.BatchTokens = None
    shard_tokens: options.ShardTokens = 2**15
    dtype: options.DtypeOption = options.Dtype.auto
    quantize: options.QuantizeOption = None
    device: options.Device = "auto"
    max_memory: options.MaxMemory = None
    trust_tokenizer_code: options.TrustTokenizer = False
    config: options.Config = None

    def domains(self, out: Path) -> options.Opened:
        """The texts, for a result that goes elsewhere."""
        names = {"text": self.text_column, "source": self.source_column}
        return options.open_domains(self.domain, self.config, out, **names, split=self.split, streaming=self.streaming)

    def memory(self) -> dict[int | str, int | str] | None:
        """What bounds an automatic device."""
        return options.max_memory(self.max_memory, self.device)

    def load(self, name: str) -> Any:
        """A model, as the options say."""
        packing = self.quantize and self.quantize.value
        return load_model(name, self.dtype.value, self.device, self.memory(), packing, self.trust_tokenizer_code)

    def reading(self) -> Reading:
        """How they are read."""
        return Reading(
            tokens=self.tokens or None,
            context=self.window,
            packed=self.packed,
            seed=self.seed,
            shard_tokens=self.shard_tokens,
        )


Work = Callable[..., Any]
"""Takes a model, domains, and the rest by name: out, reading, name, batch_tokens, watch, say. What it gives, or else
the folder, is what the command prints, if it is a path; of what it gives, the findings."""

Make = Callable[..., "Study | Work | None"]
"""From a command's own options to a study, to other work, or to nothing more to do."""


_ASKED = ("out", "changed", "arguments")


def command(name: str, folder: str, **defaults: Any) -> Callable[[Make], Make]:
    """Make a command of a function from its own options to a study, or to other work on the same arguments.

    A function that asks for `out` is given it, and may do everything by itself and give None. One that asks for
    `changed` is given the options of `Arguments` that are not as they are by default, for what has no use for them, and
    one that asks for `arguments` all of them.

    Args:
        name: Of the command.
        folder: Where its result goes if --out is not given.
        defaults: Of `Arguments`, where they differ from those of all other commands.
    """

    def decorate(make: Make) -> Make:
        own = inspect.signature(make).parameters

        def called(**given: Any) -> None:
            out = given["out"]
            changed = [f"--{key.replace('_', '-')}" for key, default in usual.items() if given[key] != default]
            asked = {key: given.pop(key) for key in own if key not in _ASKED}
            given.pop("out", None)
            arguments = Arguments(**given)
            chosen = asked | {key: of for key, of in zip(_ASKED, (out, changed, arguments), strict=True) if key in own}
            domains = arguments.domains(out)  # before anything that imports torch: what is not there is said at once
            made = make(**chosen)
            if made is not None:
                _run(made, domains, out, arguments)

        keyword = inspect.Parameter.KEYWORD_ONLY
        usual = {field.name: defaults.get(field.name, field.default) for field in fields(Arguments)}
        shared = [
            inspect.Parameter(field.name, keyword, default=usual[field.name], annotation=field.type)
            for field in fields(Arguments)
        ]
        out = inspect.Parameter("out", keyword, default=Path(folder), annotation=Out)
        every = [*shared, out, *(of.replace(kind=keyword) for of in own.values() if of.name not in _ASKED)]
        called.__doc__ = make.__doc__
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
        called.__signature__ = inspect.Signature(every)
        app.command(name)(called)
        SHARED.add(name)
        return make

    return decorate


def _run(made: "Study | Work", domains: options.Opened, out: Path, given: Arguments) -> None:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.text import Text

    from moe_lens import distributed
    from moe_lens.studies import Study, run

    given.memory()  # said before anything is loaded
    quiet()
    started = time.monotonic()
    work = partial(run, made) if isinstance(made, Study) else made
    join_processes(given.device)
    console = Console(stderr=True, quiet=distributed.rank() > 0)
    with console.status(Text(f"loading {given.model}")):
        model = given.load(given.model)
    if (where := where_it_is(model)) is not None:
        console.print(Text(where))
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task, read = progress.add_task("reading"), 0

        def watch(what: str, tokens: int) -> None:
            nonlocal read
            read += tokens
            progress.update(task, description=visible(f"{what} · {read:,} tokens read"))

        def say(line: str) -> None:
            if where is not None:  # small models are quick
                console.print(Text(visible(line)))

        how = {"reading": given.reading(), "name": given.model, "batch_tokens": given.batch_tokens}
        found = work(model, domains, out=out, watch=watch, say=say, **how)
    console.print(f"done in {time.monotonic() - started:.0f} s", highlight=False)
    if distributed.rank() == 0:
        said = findings_in(out) if found is None or isinstance(found, Path) else str(found.findings())
        typed = f"./{out}" if str(out).startswith("-") else str(out)  # and no option
        more = "" if isinstance(found, Path) else f"\nall of it: moe-lens show {shlex.quote(typed)}"
        console.print(Text(visible(f"{said}{more}")), soft_wrap=True)
        print((found if isinstance(found, Path) else out).resolve())
