"""Sums over processes: thin over `torch.distributed`, and without effect where it is not in use."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from moe_lens.errors import PeerError


def is_distributed() -> bool:
    """Whether a process group is set up, as it is under torchrun after `init_process_group`."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Which of the processes this one is, from 0."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if is_distributed() else 1


def all_reduce(value: Shaped[Tensor, "*shape"], how: Literal["sum", "max"] = "sum") -> Shaped[Tensor, "*shape"]:
    """The sum, or the elementwise maximum, of a tensor of the same shape in every process.

    Whole numbers are summed exactly. The argument is left as it is, and the result is on its device.

    Raises:
        PeerError: another process has ended.
    """
    if world_size() == 1:
        return value.clone()
    # NCCL knows GPUs only; gloo would take either, and the sums of accumulators live on the CPU.
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    shared = value.detach().to(device, copy=True).contiguous()
    with _together():
        dist.all_reduce(shared, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
    return shared.to(value.device)


def gather(value: Any) -> list[Any]:
    """What every process passed, in the order of their ranks, in every process. Anything that pickles.

    Raises:
        PeerError: another process has ended.
    """
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    with _together():
        dist.all_gather_object(found, value)
    return found


def barrier() -> None:
    """Wait until every process is here.

    Raises:
        PeerError: another process has ended.
    """
    if world_size() > 1:
        with _together():
            dist.barrier()


@contextmanager
def _together() -> Generator[None]:
    """What only all processes can do: backends say in words of their own, and of many kinds, that one is gone."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerError(
            f"another process has ended, and this one cannot go on alone ({str(error).splitlines()[0]:.200}); run the "
            "same command again to resume it"
        ) from error
