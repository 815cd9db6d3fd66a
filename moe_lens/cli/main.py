"""Arguments in, exit code out: 0 done, 2 something to put right (in one line), 130 interrupted, 143 terminated."""

import _thread
import contextlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

import moe_lens
from moe_lens.cli import atlas as _atlas
from moe_lens.cli import comparing as _comparing
from moe_lens.cli import models as _models
from moe_lens.cli import predicting as _predicting
from moe_lens.cli import processes
from moe_lens.cli import prune as _prune
from moe_lens.cli import removing_experts as _removing_experts
from moe_lens.cli import report as _report
from moe_lens.cli import show as _show
from moe_lens.cli import studies as _studies
from moe_lens.cli.app import app
from moe_lens.cli.config_file import defaults
from moe_lens.cli.show import visible
from moe_lens.cli.study_command import SHARED
from moe_lens.errors import InputError, MoELensError, PeerError, one_line

__all__ = [
    "_atlas",
    "_comparing",
    "_models",
    "_predicting",
    "_prune",
    "_removing_experts",
    "_report",
    "_show",
    "_studies",
    "main",
]  # the modules of commands are imported to add them to the application

INTERRUPTED, TERMINATED = 130, 143

COMMANDS = (
    *("report", "atlas", "routing", "single-expert", "lens", "experts-per-token", "ablate", "localise", "contrast"),
    *("explain", "probe", "checkpoints", "collect", "prune", "compare", "show", "models", "info"),
)
"""In the order in which help lists them."""
app.registered_commands.sort(key=lambda registered: COMMANDS.index(registered.name or ""))


@processes.leaving()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; those of the process if not given.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a letter is no reason to fail
    with _termination() as terminated, no_interrupt_lost():
        try:
            if sys.flags.optimize > 1:
                raise InputError(
                    "python -OO (PYTHONOPTIMIZE=2) drops docstrings, which transformers reads; -O does not"
                )
            _readable(arguments)
            _shared(arguments)
            program: Any = typer.main.get_command(app)
            code = program.main(
                arguments or ["--help"],
                prog_name="moe-lens",
                standalone_mode=False,
                default_map=defaults(arguments, program.commands),
            )
            sys.stdout.flush()
        except BrokenPipeError:  # `moe-lens models | head`: whoever read has read enough
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (TyperException, MoELensError, OSError) as error:
            said = getattr(error, "format_message", error.__str__)()
            if isinstance(error, FileNotFoundError) and error.filename is None:  # of Path.cwd: a path has its name
                said = "the working directory is not there any more; change to another one"
            _say(f"error: {one_line(said)}", patient=isinstance(error, PeerError))
            return 2
        except Exception as error:
            if not _out_of_memory(error):
                raise
            _say(f"error: out of memory ({str(error).splitlines()[0][:200] if str(error) else 'no more is known'})")
            return 2
        except (typer.Abort, KeyboardInterrupt):
            code = INTERRUPTED
    if code == INTERRUPTED:
        what, code = ("terminated", TERMINATED) if terminated else ("interrupted", INTERRUPTED)
        kept = "any progress is kept: run the same command to go on"  # before there is a folder, none was made
        _say(
            f"{what}; {kept if _command(arguments) in SHARED else 'no progress is kept: the same command starts anew'}"
        )
    return code if isinstance(code, int) else 0


@contextlib.contextmanager
def _termination() -> Generator[list[bool]]:
    """SIGTERM ends the program as Ctrl-C does, so that it cleans up; what is yielded then holds True."""
    found: list[bool] = []

    def end(number: int, frame: Any) -> None:  # noqa: ARG001
        found.append(True)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield found
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


@contextlib.contextmanager
def no_interrupt_lost() -> Generator[None]:
    """Interrupt once more where Python has dropped an interrupt, as all that is raised while an object is freed."""
    before, waiting = sys.unraisablehook, []

    def again(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        waiting.append(threading.Timer(0.05, _thread.interrupt_main))  # when the object is gone
        waiting[-1].start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in waiting:
            timer.cancel()


def _readable(arguments: Sequence[str]) -> None:
    """Refuse arguments in another encoding, which no result could be saved with, and empty ones.

    What is empty would mean the working directory, a model of that name, or a default.

    Raises:
        InputError: One of them; says which.
    """
    for number, argument in enumerate(arguments, start=1):
        if not argument or re.fullmatch("--[a-z-]+=", argument):
            where = argument or (arguments[number - 2] if number > 1 else "the first")
            raise InputError(f"argument {number} ({where}) is empty; is a variable of the shell not set?")
        try:
            argument.encode()
        except UnicodeEncodeError:
            shown = argument.encode(errors="surrogateescape").decode(errors="backslashreplace")
            raise InputError(
                f"argument {number} ({shown}) is not UTF-8; rename the file, or give a link to it"
            ) from None


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of the machine or of a device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's: it may not be imported
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _command(arguments: Sequence[str]) -> str | None:
    return next((argument for argument in arguments if argument in COMMANDS), None)


def _shared(arguments: Sequence[str]) -> None:
    """Refuse several processes of a command that does not share its work: each would do all of it.

    Raises:
        InputError: It is one, started by a launcher.
    """
    name = _command(arguments)
    if name is not None and name not in SHARED and processes.several():
        raise InputError(f"{name} runs in a single process: start it without torchrun (WORLD_SIZE is set)")


def _say(what: str, patient: bool = False) -> None:
    if not processes.speaks(patient):
        return
    what = visible(what)
    rank = os.environ.get("RANK", "0")  # of processes that all speak to the same terminal
    line = f"moe-lens: {what}" if rank == "0" else f"moe-lens (process {rank}): {what}"
    print(line, file=sys.stderr)
    processes.tell_torchrun(line)


def _say_version(wanted: bool) -> bool:
    if wanted:
        print(moe_lens.__version__)
        raise typer.Exit
    return wanted


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Show the version and exit.")
    ] = False,
) -> None:
    del version  # the option's callback has said it
