"""Several processes under torchrun: how they find one another, and which of them says why all of them end."""

import json
import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lens.errors import InputError

if TYPE_CHECKING:
    import torch

MOMENT = 2.0
"""Seconds that the first process is given to say what others have met as well."""


def several() -> bool:
    """Whether a launcher has started several processes."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def speaks(patient: bool = False) -> bool:
    """Whether this process is to say why it ends: of those that torchrun has started on a machine, one is.

    Where all of them meet the same error, that is the first one, or else the one that met it: the others are only ended
    by torchrun. Other launchers have no place in which to agree on that, and every process speaks.

    Args:
        patient: Whether another process is likely to know more.
    """
    errors = os.environ.get("TORCHELASTIC_ERROR_FILE")  # in a folder that all processes of one try have
    if not several() or errors is None:
        return True
    said = Path(errors).parents[1] / "moe_lens_said"
    if patient or os.environ.get("LOCAL_RANK") != "0":
        end = time.monotonic() + MOMENT
        with suppress(KeyboardInterrupt):  # torchrun ends the others when the first has ended
            while not said.exists() and time.monotonic() < end:
                time.sleep(0.02)
    try:
        said.open("x").close()
    except FileExistsError:
        return False
    except OSError:  # better twice than not at all
        return True
    return True


def tell_torchrun(line: str) -> None:
    """Let torchrun, which ends with words of its own, say for what reason, where it would speak of a traceback."""
    if several() and (errors := os.environ.get("TORCHELASTIC_ERROR_FILE")) is not None:
        about = {"py_callstack": line, "timestamp": str(int(time.time()))}  # as torchelastic reads it
        with suppress(OSError):
            Path(errors).write_text(json.dumps({"message": {"message": line, "extraInfo": about}}), encoding="utf-8")


_GROUPS = count()
"""Of this process, one after another; every other process counts the same ones."""


@cache
def _store(*where: str) -> "tuple[torch.distributed.Store, int, int]":  # noqa: ARG001  # told apart by it
    """Where processes leave their addresses for one another; and the rank of this one, and how many there are."""
    import torch

    return next(iter(torch.distributed.rendezvous("env://")))


def join_processes(device: str) -> None:
    """Under torchrun, let this process find the others; without it, nothing.

    Raises:
        InputError: They are not there.
    """
    import torch

    if several() and not torch.distributed.is_initialized():
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        on_gpu = place(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(place(device))
        try:
            store, rank, size = _store(*(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK")))
            # Torchrun's store outlives a group: another one must not find the addresses that an earlier one left there.
            own = torch.distributed.PrefixStore(f"moe_lens_{next(_GROUPS)}", store)
            backend = "nccl" if on_gpu else "gloo"
            torch.distributed.init_process_group(backend, store=own, rank=rank, world_size=size)
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and the other processes cannot be found "
                f"({str(error).splitlines()[0]}); start all of them by torchrun, or unset WORLD_SIZE"
            ) from None


@contextmanager
def leaving() -> Generator[None]:
    """At the end, the end of `join_processes`: not before this process has said why it ends.

    The others notice that one has left, and would otherwise say so before the one that knows why.
    """
    try:
        yield
    finally:
        torch = sys.modules.get("torch")  # seconds, where nothing has needed it
        if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def place(device: str) -> "torch.device":
    """The device of this process.

    Raises:
        InputError: There is none of this name.
    """
    import torch

    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        found = torch.device(device)
        torch.empty(1, device=found).cpu()  # fails where the device is absent, and on meta, which holds no numbers
    except (RuntimeError, AssertionError) as error:  # the latter: this torch was built without CUDA
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device}: {reason}") from None
    return found
