"""Several processes on one machine count what one counts: whole numbers exactly, others within 1e-6."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from moe_lens import distributed
from moe_lens.errors import InputError, PeerError
from tests import type_hook
from tests.stats.test_protocol import KINDS, update

BATCHES = 6


def counted(name: str, rank: int, world: int) -> Any:
    stats = KINDS[name]()
    for i in range(rank, BATCHES, world):
        update(name, stats, i)
    return stats


def process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        assert (distributed.rank(), distributed.world_size(), distributed.is_distributed()) == (rank, world, True)
        assert distributed.gather(f"from {rank}") == [f"from {i}" for i in range(world)]
        mine = torch.tensor([rank, -rank])
        assert distributed.all_reduce(mine).tolist() == [world * (world - 1) // 2, -world * (world - 1) // 2]
        assert distributed.all_reduce(mine, "max").tolist() == [world - 1, 0]
        assert mine.tolist() == [rank, -rank]
        large = torch.tensor(2**62 // world + rank)  # whole numbers pass through no float
        assert int(distributed.all_reduce(large)) == world * (2**62 // world) + world * (world - 1) // 2
        found = {}
        for name in KINDS:
            # The last process has seen nothing of this kind: others must not wait for it, nor trip over it.
            share = counted(name, rank, world - 1) if rank < world - 1 else KINDS[name]()
            found[name] = share.all_reduce().result()
            with pytest.raises(InputError, match="already holds the sums of all processes"):
                share.all_reduce()
        distributed.barrier()
        torch.save((found, type_hook.REACHED), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


# Forked, because importing everything anew in each process takes longer than the test.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.typed), 4])
def test_processes_together_count_what_one_counts(world, tmp_path):
    mp.start_processes(process, (world, str(tmp_path)), nprocs=world, start_method="fork")
    alone = {name: counted(name, 0, 1).result() for name in KINDS}
    for rank in range(world):
        found, reached = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        type_hook.REACHED |= reached  # what a forked process checks is checked
        for name, expected in alone.items():
            for field in fields(expected):
                ours, theirs = getattr(found[name], field.name), getattr(expected, field.name)
                if isinstance(theirs, Tensor) and theirs.dtype.is_floating_point:
                    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6, equal_nan=True), (name, field.name)
                elif isinstance(theirs, Tensor):
                    assert torch.equal(ours, theirs), (name, field.name)
                else:
                    assert ours == theirs, (name, field.name)


def test_without_a_process_group_nothing_happens():
    value = torch.tensor([1.5, 2.5])
    assert (distributed.rank(), distributed.world_size(), distributed.is_distributed()) == (0, 1, False)
    shared = distributed.all_reduce(value)
    assert torch.equal(shared, value) and shared.data_ptr() != value.data_ptr()
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    distributed.barrier()


def left_alone(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    distributed.barrier()
    if rank == 1:
        return
    calls = (lambda: distributed.gather(1), lambda: distributed.all_reduce(torch.ones(1)), distributed.barrier)
    for call in calls:
        with pytest.raises(PeerError, match="another process has ended, .*; run the same command again to resume it"):
            call()
    (Path(folder) / "said").touch()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_is_left_alone_says_so(tmp_path):
    mp.start_processes(left_alone, (str(tmp_path),), nprocs=2, start_method="fork")
    assert (tmp_path / "said").exists()
