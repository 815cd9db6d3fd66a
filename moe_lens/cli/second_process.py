"""Studies of a report in a second process, where a small model leaves a core idle.

The second process is the same command again, told by its environment to run but a part of it into the same folder.
Nothing depends on it: what it has not finished when it is waited for, for whatever reason, the first process does.
Numbers are the same, since each study is run by one process from its beginning to its end.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOLD = "MOE_LENS_PART_OF_REPORT"
"""Set in the environment of a second process."""
MEMORY = 2**32
"""Bytes that must be free: a second process takes one GiB, most of it libraries."""


@contextmanager
def second_process(wanted: bool) -> Generator[Callable[[], None]]:
    """The command of this process once more, for as long as it takes; what is yielded waits for its end.

    Args:
        wanted: Whether to start it at all.
    """
    if not wanted:
        yield lambda: None
        return
    silent: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    again = [sys.executable, *sys.orig_argv[1:]]
    process = subprocess.Popen(again, env={**os.environ, TOLD: "1"}, **silent)  # noqa: S603  # our own command

    def wait() -> None:
        process.wait()

    try:
        yield wait
    finally:
        if process.poll() is None:
            process.terminate()  # as Ctrl-C does: it cleans up, and keeps its progress
            process.wait()


def worth_it(small: bool, domains: Iterable[Any], folders: Iterable[Path]) -> bool:
    """Whether to start a second process.

    Args:
        small: Whether the model is: others use all cores by themselves, and two of them may not fit.
        domains: Those of a hub, which would be downloaded twice, are left to one process.
        folders: What it would make; one of them must not be there yet.
    """
    from moe_lens import distributed
    from moe_lens.data import Domain
    from moe_lens.model.loading.machine import free_memory

    program = Path(sys.argv[0])
    ours = program.stem == "moe-lens" or program.parts[-2:] == ("moe_lens", "__main__.py")  # not a script that calls us
    alone = ours and TOLD not in os.environ and not distributed.is_distributed()
    here = all(isinstance(domain, Domain) for domain in domains) and not all(folder.exists() for folder in folders)
    return small and alone and here and _cores() > 1 and free_memory() > MEMORY


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
