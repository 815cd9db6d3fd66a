"""Arguments in, exit code out: 0 done, 2 something to put right (one line says what), 130 interrupted."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

import moe_lens
from moe_lens.cli import models as _models
from moe_lens.cli import prune as _prune
from moe_lens.cli import report as _report
from moe_lens.cli import studies as _studies
from moe_lens.cli.app import app
from moe_lens.cli.config_file import defaults
from moe_lens.errors import MoELensError

__all__ = [
    "_models",
    "_prune",
    "_report",
    "_studies",
    "main",
]  # the modules of commands are imported to add them to the application

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; those of the process if not given.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        program: Any = typer.main.get_command(app)
        code = program.main(
            arguments or ["--help"],
            prog_name="moe-lens",
            standalone_mode=False,
            default_map=defaults(arguments, program.commands),
        )
    except (TyperException, MoELensError, OSError) as error:
        said = getattr(error, "format_message", error.__str__)()
        _say(f"error: {' '.join(said.split())}")
        return 2
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    if code == INTERRUPTED:
        _say("interrupted; no result was written. A study keeps what it did: the same command goes on from there")
    return code if isinstance(code, int) else 0


def _say(what: str) -> None:
    rank = os.environ.get("RANK", "0")  # of torchrun's processes, which all speak to the same terminal
    print(f"moe-lens: {what}" if rank == "0" else f"moe-lens (process {rank}): {what}", file=sys.stderr)


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
