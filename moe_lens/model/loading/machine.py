"""What this machine has: bytes that are free on GPUs, in main memory, on disk; and what its processor is slow at.

Nothing is decided here.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
import torch

ROWS = 256
"""Of the square matrices that are multiplied to learn how fast a processor is: .25 ms in float32."""


def slowdown(dtype: torch.dtype) -> float:
    """How many times longer this processor takes for a product of matrices in a dtype than in float32.

    Seven to eleven in bfloat16, where a processor has no instructions for it (x86 with AVX2 alone).
    """
    return _seconds(dtype) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype, runs: int = 5) -> float:
    """The shortest of some runs: others are longer because other programs ran."""
    matrix = torch.ones(ROWS, ROWS, dtype=dtype)
    taken = []
    for _ in range(1 + runs):  # the first chooses how to compute
        begun = time.perf_counter()
        torch.nn.functional.linear(matrix, matrix)
        taken.append(time.perf_counter() - begun)
    return min(taken[1:])


@dataclass(frozen=True)
class Machine:
    """Bytes that are free. Under torchrun, those that this process may take: its own GPU, its share of the memory."""

    gpus: Mapping[int, int]
    """By the number of the GPU."""
    memory: int
    """Main memory: what the operating system and every control group around this process leave."""
    disk: int
    """Where parameters go that fit nowhere else."""
    slowdown: Callable[[torch.dtype], float] = lambda _: 1.0
    """How many times longer the processor takes for a product in a dtype than in float32."""

    @classmethod
    def here(cls, folder: Path) -> Self:
        """This machine, now.

        Args:
            folder: where parameters go that fit nowhere else; it need not exist yet.
        """
        gpus, shared = {}, False
        if torch.cuda.is_available():
            every = range(torch.cuda.device_count())
            local = os.environ.get("LOCAL_RANK")
            for gpu in every if local is None else [int(local) % len(every)]:
                gpus[gpu] = torch.cuda.mem_get_info(gpu)[0]
                shared = shared or bool(getattr(torch.cuda.get_device_properties(gpu), "is_integrated", False))
        memory = 0 if shared else free_memory() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return cls(gpus, memory, free_disk(folder), slowdown)


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is or would be; none where this process may not write."""
    while not os.path.exists(folder):  # noqa: PTH110  # Path's raises where a folder above is closed to this process
        folder = folder.parent
    return shutil.disk_usage(folder).free if os.access(folder, os.W_OK | os.X_OK) else 0


def free_memory(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of main memory that this process can still take.

    A container is a control group with a limit: the operating system tells what the whole machine has. Both versions of
    control groups are read, and the groups around the process's own. Pages of files count as free, as they do to Linux.

    Args:
        groups: where control groups are mounted.
        own: the file that names this process's.
    """
    free = psutil.virtual_memory().available
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return free
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2, which stands beside version 1 on some machines
            mounts = [(mount, "memory.max", "memory.current", "") for mount in (groups, groups / "unified")]
        elif "memory" in controllers.split(","):
            mounts = [(groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")]
        else:
            continue
        for mount, limit, usage, prefix in mounts:
            group = mount / path.strip("/")
            # Inside a container its own group may be mounted as the root, while the path is the one outside.
            around = [group, *group.parents] if group.exists() else [mount]
            for folder in around:
                free = min(free, _left(folder, limit, usage, prefix, free))
                if folder == mount:
                    break
    return max(0, free)


def _left(folder: Path, limit: str, usage: str, prefix: str, otherwise: int) -> int:
    """What a control group's limit leaves; `otherwise` where it has none."""
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group here
        return otherwise
    if most == "max":
        return otherwise
    files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return int(most) - used + min(files, used)
