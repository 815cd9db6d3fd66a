"""Ratios of interleaved runs, and how much memory a run takes."""

import ctypes
import gc
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

Run = Callable[[], Any]


class Timed(NamedTuple):
    """Of one run among others."""

    seconds: float
    """Median over rounds."""
    ratio: float
    """Median over rounds of the ratio to the first run of the same round."""


def interleaved(runs: dict[str, Run], rounds: int, device: str = "cpu") -> dict[str, Timed]:
    """Time runs in turn, round after round, so that a slow moment of the machine falls on all of them.

    On a processor it is processor time, which other programs of the machine disturb least. Every other round goes
    backwards: what a run leaves behind in caches is not always the same run's advantage. A first round warms up and is
    not counted.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name in list(runs)[:: -1 if i % 2 else 1]:
            settle(device)
            start = clock()
            result = runs[name]()
            settle(device)
            times[name].append(clock() - start)
            del result
    first = times[next(iter(runs))][1:]
    return {
        name: Timed(statistics.median(of[1:]), statistics.median(a / b for a, b in zip(of[1:], first, strict=True)))
        for name, of in times.items()
    }


def settle(device: str) -> None:
    """Wait for what a GPU still computes."""
    if device != "cpu":
        torch.cuda.synchronize()


def peak_memory(run: Run, device: str = "cpu") -> int:
    """Bytes that a run takes at its greatest, above what was there before; its result is held until the end.

    On a processor that is the process's resident memory, whose peak the kernel of Linux notes (0 elsewhere). What was
    freed before goes back to the system first, so that taking it again is seen.
    """
    run()
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM") - before
    del result
    return max(0, peak)


def tensor_memory(run: Run) -> tuple[int, int]:
    """Bytes of tensors on a processor: the most that a run holds at once, and what is left of them with its result.

    Counted by torch's own allocator, to the byte, whatever the C library and the system do with pages.
    """
    run()  # what is made once and stays, such as masks and tables of angles
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events: list[Any] = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = [0, *itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))]
    del result
    return max(held), held[-1]


def _status(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what + ":"))


def machine(device: str = "cpu") -> str:
    """What the numbers were measured on."""
    if device != "cpu":
        name = torch.cuda.get_device_name()
    else:
        told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
        models = [line.split(":", 1)[1].strip() for line in told.splitlines() if line.startswith("model name")]
        name = models[0] if models else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load {os.getloadavg()[0]:.0f}" if hasattr(os, "getloadavg") else ""
    threads = torch.get_num_threads()
    of_torch = f"torch {torch.__version__.partition('+')[0]}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{name}, {cores} cores{load}, {of_torch}"
