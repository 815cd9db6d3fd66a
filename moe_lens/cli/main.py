"""Arguments in, exit code out: 0 done, 2 something to put right (one line says what), 130 interrupted."""

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

import moe_lens
from moe_lens.cli.report import make_report
from moe_lens.errors import InputError, MoELensError

app = typer.Typer(
    help="Look into the experts of Mixture-of-Experts language models.", add_completion=False, rich_markup_mode=None
)


INTERRUPTED = 130


class Dtype(StrEnum):
    """Floating-point types that a model can be loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; those of the process if not given.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = typer.main.get_command(app).main(arguments or ["--help"], prog_name="moe-lens", standalone_mode=False)
    except (TyperException, MoELensError, OSError) as error:
        said = getattr(error, "format_message", error.__str__)()
        print("moe-lens: error:", " ".join(said.split()), file=sys.stderr)
        return 2
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("moe-lens: interrupted; nothing was written", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _say_version(wanted: bool) -> bool:
    if wanted:
        print(moe_lens.__version__)
        raise typer.Exit
    return wanted


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Say the version and exit.")
    ] = False,
) -> None:
    del version  # the option's callback has said it


@app.command()
def report(
    model: Annotated[
        str, typer.Option(metavar="NAME_OR_PATH", help="A model on the hub, a folder, or the embedded model.")
    ] = "tiny-deepseekmoe",
    domain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Texts to read; give it once for each domain. FILE.jsonl: an object a line with `text`, and `source` "
            "to say which texts were taken from one document. FILE.txt: passages separated by blank lines, one source. "
            "Without --domain: the five embedded domains.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of text to read in each domain.")] = 4096,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the page and its numbers go.")] = Path(
        "moe-lens-report"
    ),
    seed: Annotated[int, typer.Option(help="Of the choice of texts.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="What the model computes in.")] = Dtype.float32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; auto spreads a large model over devices.")] = "cpu",
) -> None:
    """What the experts of a model do on real text: one HTML page that opens offline, its numbers as JSON and parquet.

    Which experts each domain is sent to; one expert against the ensemble, with controls; what fewer experts cost; and
    what each expert would say next.
    """
    make_report(model, _named_files(domain or []), tokens=tokens, out=out, seed=seed, dtype=dtype.value, device=device)


def _named_files(arguments: Sequence[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for argument in arguments:
        name, equals, file = argument.partition("=")
        if not (equals and name.strip() and file):
            raise InputError(f"--domain {argument!r}: expected NAME=FILE, for example --domain code=code.jsonl")
        if name in files:
            raise InputError(f"--domain {name!r} is given twice; give each domain a name of its own")
        files[name] = Path(file)
    return files
