"""Processes of their own, forked from one that has imported the package: a fresh interpreter takes seconds for that."""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["moe_lens.hooked_moe", "moe_lens.studies", "moe_lens.report"])


class Forked:
    """A process that calls a function of a module and ends with what that returns; it says things into files."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, said: Path, cwd: Path | None = None, **env: str):
        said.mkdir(parents=True, exist_ok=True)
        self._out, self._err = said / "stdout", said / "stderr"
        self._process = SERVER.Process(target=_work, args=(function, arguments, said, cwd, env))
        self._process.start()

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8") if self._err.exists() else ""

    def send(self, number: int) -> None:
        os.kill(self._process.pid or 0, number)

    def end(self) -> tuple[int | None, str, str]:
        """Wait for it: its status, less than 0 for a signal, and what it said."""
        self._process.join(300)
        assert not self.running, "it does not end"
        return self._process.exitcode, self._out.read_text(encoding="utf-8"), self.err


def group(n: int, function: Callable[..., Any], *arguments: Any, said: Path) -> list[Forked]:
    """As many processes as torchrun would start, which find one another as its do."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    env: dict[str, Any] = {"WORLD_SIZE": str(n), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for rank in range(n):
        (said / "try" / str(rank)).mkdir(parents=True)
    ranks: list[dict[str, Any]] = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_ERROR_FILE": f"{said}/try/{rank}/error.json"}
        for rank in range(n)
    ]
    return [Forked(function, *arguments, said=said / rank["RANK"], **env, **rank) for rank in ranks]


def _work(function: Callable[..., Any], arguments: Any, said: Path, cwd: Path | None, env: dict[str, str]) -> None:
    os.environ.update(env)
    os.chdir(cwd or ".")
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        with (said / name).open("w") as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background ignores
    torch.set_num_threads(1)
    sys.exit(function(*arguments))
