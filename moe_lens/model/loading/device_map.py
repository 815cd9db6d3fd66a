"""Where a model's parameters go: decided from its size and from what is free, before anything is loaded.

The first of these that has room: one GPU; several GPUs; GPUs and main memory; GPUs, main memory and disk. Without a
GPU, main memory is the first. A model that fits is never split. One that is packed in 4 or 8 bits goes to GPUs, or to
main memory, as a whole: packed numbers are not read again and again. Where parameters can be read from the checkpoint
itself, experts stay there first: they are the most, and a token uses few of them. What a machine has is a table of
numbers here (`Machine`), so that every case can be tried on any machine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils.modeling import convert_file_size_to_int

from moe_lens.errors import InputError
from moe_lens.model.loading.machine import Machine

SHARE = 0.9
"""Of what is free, for parameters: the rest is for activations, which a smaller batch makes smaller."""
STREAMED_SHARE = 0.4
"""Of main memory, where a model is read in every pass and the processor computes: what is left makes batches larger,
and so passes fewer."""

SLOW, LARGE = 3.0, 2**30
"""How many times longer than in float32 a product takes that is worth a word; and bytes of a model that is."""

Place = int | str
"""A GPU's number, "cpu" or "disk"."""


@dataclass(frozen=True)
class Size:
    """Bytes that the parameters take in the dtype that they are loaded in."""

    total: int
    largest: int
    """Of the largest layer: what is kept elsewhere comes back layer by layer, and needs that much room."""
    modules: Mapping[str, int] = field(default_factory=dict)
    """Of the modules that own parameters, where those can be read from the checkpoint itself: first what is to stay in
    memory first."""
    stored: Mapping[str, int] = field(default_factory=dict)
    """Of those modules in the checkpoint, where that is not as many."""
    packed: bool = False
    """Whether matrices are packed in 4 or 8 bits: such a model is on GPUs or in main memory, and nowhere else."""


@dataclass(frozen=True)
class Plan:
    """Which bytes go where, and what transformers is told so that they do."""

    places: Mapping[Place, int]
    """Bytes in each place; where a model is split, rounded by at most a layer. On disk, as they are stored there."""
    arguments: Mapping[str, Any]
    """`device_map` and `max_memory` of `from_pretrained`; nothing where the model goes to main memory."""

    @property
    def offloads(self) -> int:
        """Bytes on disk, which are read in every pass."""
        return self.places.get("disk", 0)

    def __str__(self) -> str:
        return said(self.places)


def said(places: Mapping[Place, int]) -> str:
    """Which bytes are where, in words."""
    kinds = {"cpu": "in main memory", "disk": "on disk, read in every pass"}
    return ", ".join(f"{gibibytes(n)} {kinds.get(str(place), f'on GPU {place}')}" for place, n in places.items() if n)


def slow_dtype(dtype: torch.dtype, places: Mapping[Place, int], slowdown: Callable[[torch.dtype], float]) -> str | None:
    """What to say of a processor that computes a large model and is slow in its dtype; None if it is not.

    Args:
        dtype: that the model computes in.
        places: bytes of the model in each place.
        slowdown: how many times longer a product takes in a dtype than in float32. Asked where it matters.
    """
    if dtype not in (torch.bfloat16, torch.float16) or not places.keys() <= {"cpu", "disk"}:
        return None
    if sum(places.values()) < LARGE or (times := slowdown(dtype)) < SLOW:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"this processor takes {times:.0f} times as long for a product in {name} as in float32"


def gibibytes(count: int) -> str:
    """Bytes in GiB, or in MiB where they are fewer."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def plan_memory(size: Size, machine: Machine, max_memory: Mapping[Place, int | str] | None = None) -> Plan:
    """Decide where parameters go.

    Args:
        size: of the model.
        machine: what is free.
        max_memory: bytes to use at most, by GPU and "cpu", as in transformers: what is not named is not used.

    Raises:
        InputError: there is no room, not even for one layer at a time and the rest on disk; or no such place.
    """
    room = room_of(machine, max_memory)
    gpus = [place for place in room if place != "cpu"]
    freest = max(gpus, key=lambda gpu: room[gpu], default="cpu")
    if room.get(freest, 0) >= size.total:
        whole = {} if freest == "cpu" else {"device_map": {"": freest}}
        return Plan({freest: size.total}, whole)
    # With no GPU the processor computes, and the layers on disk pass through main memory.
    first = gpus[0] if gpus else "cpu"
    if size.modules and len(gpus) < 2:
        if first == "cpu" and max_memory is None:
            room["cpu"] = int(STREAMED_SHARE * machine.memory)
        return _streamed(size, room, first)
    if sum(room[gpu] for gpu in gpus) >= size.total + size.largest:
        room.pop("cpu", None)
        return Plan(_fill(size.total, room), {"device_map": "auto", "max_memory": room})
    if size.packed:
        if room.get("cpu", 0) >= size.total:
            return Plan({"cpu": size.total}, {})
        has = " and ".join(f"{_words(place)} has {gibibytes(bytes_)}" for place, bytes_ in room.items())
        raise InputError(
            f"packed, the model takes {gibibytes(size.total)}, and {has} for it. Packed weights are neither divided "
            "between GPUs and main memory nor kept on disk: free some memory, or load the model as it is stored"
        )
    if room.get(first, 0) < size.largest:
        raise _no_room("layer", size.largest, first, room)
    places = _fill(size.total, {**room, first: room[first] - size.largest})
    if (needed := places.get("disk", 0)) > machine.disk:
        raise InputError(
            f"the model takes {gibibytes(size.total)}: {gibibytes(needed)} more than memory has room for, and the disk "
            f"has {gibibytes(machine.disk)}. Free some of either, or set HF_HOME to a folder on a larger disk"
        )
    return Plan(places, {"device_map": "auto", "max_memory": room})


def _streamed(size: Size, room: dict[Place, int], first: Place) -> Plan:
    """Modules in their order, each in the first place that has room; the others are read from the checkpoint.

    What is read needs room for two modules, one that computes and one that is coming.
    """
    coming = 2 * max(size.modules.values())
    if room.get(first, 0) < coming // 2:
        raise _no_room("module", coming // 2, first, room)
    left = {place: max(0, bytes_ - coming) for place, bytes_ in room.items()}
    where: dict[str, Place] = {}
    places: dict[Place, int] = {}
    for module, bytes_ in size.modules.items():
        place: Place = next((place for place, free in left.items() if free >= bytes_), "disk")
        where[module] = place
        if place == "disk":
            bytes_ = size.stored.get(module, bytes_)
        else:
            left[place] -= bytes_
        places[place] = places.get(place, 0) + bytes_
    order = [*room, "disk"]
    return Plan({place: places[place] for place in order if place in places}, {"device_map": where})


def _no_room(what: str, needed: int, place: Place, room: Mapping[Place, int]) -> InputError:
    return InputError(
        f"the model's largest {what} takes {gibibytes(needed)}, and {_words(place)} has "
        f"{gibibytes(room.get(place, 0))} for it. Free some memory, or choose another device or a narrower dtype"
    )


def _words(place: Place) -> str:
    return "main memory" if place == "cpu" else f"GPU {place}"


def room_of(machine: Machine, max_memory: Mapping[Place, int | str] | None) -> dict[Place, int]:
    """Bytes that parameters may take in each place, GPUs first.

    Raises:
        InputError: `max_memory` names no such place, or no size.
    """
    free: dict[Place, int] = {**machine.gpus, "cpu": machine.memory}
    if max_memory is None:
        return {place: int(SHARE * bytes_) for place, bytes_ in free.items()}
    if unknown := [place for place in max_memory if place not in free]:
        raise InputError(f"max_memory names {unknown[0]!r}; there is {', '.join(map(repr, free))}")
    try:
        named = {place: convert_file_size_to_int(most) for place, most in max_memory.items()}
    except ValueError:
        raise InputError(
            f"max_memory is {dict(max_memory)!r}; expected sizes such as '9GiB' or numbers of bytes"
        ) from None
    return {place: named[place] for place in free if place in named}


def _fill(total: int, room: Mapping[Place, int]) -> dict[Place, int]:
    """Fill one place after the other; what is left goes to disk."""
    places: dict[Place, int] = {}
    for place, most in room.items():
        if taken := min(total, most):
            places[place] = taken
        total -= taken
    return {**places, "disk": total} if total else places
