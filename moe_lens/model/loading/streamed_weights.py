"""Parameters that are read from a checkpoint's own files whenever a model needs them: nothing is written.

One thread reads, and goes ahead: while a layer computes, the next one comes.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.model.loading.checkpoint import FLOATS, OpenFiles
from moe_lens.model.loading.checksum import checksum
from moe_lens.model.loading.lazy_parameters import LazyParameter, StoredPart
from moe_lens.model.loading.stored_file import Bytes, Stamp, StoredFile, page_block

AHEAD = 2
"""How many parameters are read before they are asked for: those of a layer's experts are two."""


class StreamedWeights(Mapping[str, Tensor]):
    """By name, parameters in the dtype that a model has them in, each read anew when it is asked for.

    Those that are packed, or that transformers converts, are not read ahead, and are read through safetensors.

    What is read has a buffer that serves again when no tensor looks into it any more: the first touch of fresh memory
    costs as much as the reading.

    Args:
        parameters: What can be read.
        order: Names in the order in which a forward pass is expected to ask for them, over and over; the first pass
            shows how it does.
        tied: Other names of some of them.
        kept: Those that are in main memory, for a GPU that computes.
        stamps: Of the files, when the model was loaded; those of now, if not given.
    """

    def __init__(
        self,
        parameters: Mapping[str, LazyParameter],
        order: Sequence[str] = (),
        tied: Mapping[str, str] | None = None,
        kept: Mapping[str, Tensor] | None = None,
        stamps: Mapping[Path, Stamp] | None = None,
    ):
        self._parameters, self._order = dict(parameters), tuple(order)
        self._tied, self._kept = dict(tied or {}), dict(kept or {})
        ahead = [name for name in self._order if self._parameters[name].plain]
        self._next = dict(zip(ahead, ahead[1:] + ahead[:1], strict=True))
        stored = (parameter.stored(part) for parameter in parameters.values() for part in parameter.parts)
        paths = set[Path]().union(*(each.files for each in stored))
        block = page_block()
        self._files = {path: StoredFile(path, block, (stamps or {}).get(path)) for path in sorted(paths)}
        self._reader = ThreadPoolExecutor(1, "moe_lens-reader")
        self._ahead: dict[str, Future[Bytes]] = {}
        self._last: str | None = None
        self._alive: dict[str, Callable[[], Bytes | None]] = {}
        self._free: dict[int, list[Tensor]] = {}
        self._finite = set[str]()
        self._checksums: dict[str, bytes] | None = None
        self.bytes_read = 0
        """So far, of tensors."""

    def __reduce__(self) -> Any:
        """What it was made of: a copy has its own thread and opens the files itself, if they are the same ones."""
        return type(self), (self._parameters, self._order, self._tied, self._kept, self.stamps)

    def __iter__(self) -> Iterator[str]:
        return iter({**self._parameters, **self._tied})

    def __len__(self) -> int:
        return len(self._parameters) + len(self._tied)

    def __contains__(self, name: object) -> bool:
        """Whether it can be read; a Mapping's own way of asking is to read it."""
        return name in self._parameters or name in self._tied

    def __getitem__(self, name: str) -> Tensor:
        """A parameter. Those that a forward pass asks for next are then being read.

        Raises:
            CheckpointError: It holds NaN or infinities, or its file is not what it was when the model was loaded.
        """
        name = self._tied.get(name, name)
        if name in self._kept:
            return self._kept[name]
        parameter = self._parameters[name]
        if (lease := self._alive.get(name, _gone)()) is not None:  # two that align one module, one inside the other
            return self._tensor(name, lease, parameter.dtype)
        if parameter.plain:
            found = self._numbers(name, self._asked(name))
        else:
            found = self._computed(parameter).view(-1).view(torch.uint8).numpy()
        self._alive[name] = weakref.ref(found)
        return self._tensor(name, found, parameter.dtype)

    def _asked(self, name: str) -> Bytes:
        """A parameter as it is stored; from now on, what a pass asks for next is being read."""
        if name not in self._ahead:  # what was read ahead is not what comes: a pass that ended early
            for future in self._ahead.values():
                future.cancel()
            self._ahead.clear()
        if self._last in self._next:
            self._next[self._last] = name
        self._last = name
        asked = self._ahead.pop(name, None) or self._reader.submit(self._read, name)
        following = self._next.get(name, name)
        for _ in range(AHEAD):
            if following != name and following not in self._ahead:
                self._ahead[following] = self._reader.submit(self._read, following)
            following = self._next.get(following, name)
        return asked.result()

    def some(self, name: str, experts: Sequence[int]) -> Tensor:
        """The matrices of some experts [expert, …]; no others are read.

        Raises:
            CheckpointError: See `__getitem__`.
        """
        name = self._tied.get(name, name)
        if name in self._kept:
            return self._kept[name][list(experts)]
        parameter = self._parameters[name]
        if not parameter.plain:
            return self._computed(parameter, experts)
        whole, size = parameter.parts[0].place is ..., math.prod(parameter.shape[1:])
        out = torch.empty((len(experts), *parameter.shape[1:]), dtype=parameter.dtype)
        for at, expert in enumerate(experts):
            for part in (part for part in parameter.parts if whole or part.place[0] == expert):
                rows = out[at] if whole else out[at, part.place[1]]
                read = torch.empty(rows.shape, dtype=parameter.stored_dtype)
                self._reader.submit(self._fill, parameter, part, read, expert * size if whole else 0).result()
                rows.copy_(parameter.checked(part, read))
        return out

    def checksums(self) -> dict[str, bytes]:
        """Of every parameter that is read in every pass, a checksum; that takes as long as reading all of them once.

        Raises:
            CheckpointError: A file is not what it was when the model was loaded.
        """
        for file in self._files.values():
            file.check()
        if self._checksums is None:
            self._checksums = {name: checksum(self[name]) for name in self._order}
        return self._checksums

    def _computed(self, parameter: LazyParameter, experts: Sequence[int] | None = None) -> Tensor:
        """A parameter whose parts are no plain numbers, or some of its experts; one part at a time."""
        files, whole = OpenFiles(), parameter.parts[0].place is ...
        parts = [part for part in parameter.parts if whole or experts is None or part.place[0] in experts]
        for stored in map(parameter.stored, parts):
            for file in stored.files:
                self._files[file].check()
            self.bytes_read += stored.nbytes
        if experts is None:
            return parameter[...]
        if whole:
            return parameter.read(parts[0], files, experts).to(parameter.dtype)
        out = torch.empty((len(experts), *parameter.shape[1:]), dtype=parameter.dtype)
        for part in parts:
            read = parameter.read(part, files)
            for at, expert in enumerate(experts):
                if part.place[0] == expert:
                    out[at, part.place[1]] = read
        return out

    def _numbers(self, name: str, lease: Bytes) -> Bytes:
        """What was read in the model's dtype, proved to be numbers when it is read for the first time."""
        parameter = self._parameters[name]
        read = self._tensor(name, lease, parameter.stored_dtype)
        if name not in self._finite:
            for part in parameter.parts:
                parameter.checked(part, read[part.place])
            self._finite.add(name)
        if parameter.dtype == parameter.stored_dtype:
            return lease
        numbers = self._lease(name, parameter.dtype)
        self._tensor(name, numbers, parameter.dtype).copy_(read)
        return numbers

    def _tensor(self, name: str, lease: Bytes, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(lease).view(dtype).view(self._parameters[name].shape)

    def _lease(self, name: str, dtype: torch.dtype) -> Bytes:
        """Room for a parameter; it serves again when the last tensor that looks at it is gone."""
        size = math.prod(self._parameters[name].shape) * dtype.itemsize
        free = self._free.setdefault(size, [])
        whole = free.pop() if free else torch.empty(size, dtype=torch.uint8)
        lease = whole.numpy()[:]
        weakref.finalize(lease, free.append, whole).atexit = False
        return lease

    @property
    def files(self) -> tuple[Path, ...]:
        """All that is read."""
        return tuple(self._files)

    @property
    def stamps(self) -> dict[Path, Stamp]:
        """Of all files, when the model was loaded."""
        return {path: file.stamp for path, file in self._files.items() if file.stamp is not None}

    def stored_bytes(self, name: str) -> int:
        """Bytes that a parameter takes in the checkpoint."""
        return self._parameters[self._tied.get(name, name)].stored_bytes

    def settled(self) -> int:
        """Bytes that were read so far, when what is being read ahead has come."""
        self._reader.submit(int).result()
        return self.bytes_read

    # --- in the reading thread, where torch must not compute: it would start threads of its own there ---

    def _read(self, name: str) -> Bytes:
        parameter = self._parameters[name]
        lease = self._lease(name, parameter.stored_dtype)
        read = self._tensor(name, lease, parameter.stored_dtype)
        for part in parameter.parts:
            self._fill(parameter, part, read[part.place])
        return lease

    def _fill(self, parameter: LazyParameter, part: StoredPart, out: Tensor, first: int = 0) -> None:
        """Numbers of a part from the first one on, as many as there is room for."""
        stored, dtype = parameter.stored(part), FLOATS[parameter.stored(part).dtype]
        into = out if dtype == out.dtype else torch.empty(out.shape, dtype=dtype)
        self._files[stored.file].read(stored.name, into.view(-1).view(torch.uint8).numpy(), first * dtype.itemsize)
        self.bytes_read += into.nbytes
        if into is not out:  # a parameter of which parts are stored in several dtypes: seldom, and slow
            out.copy_(into)


def streamed_weights(model: nn.Module) -> StreamedWeights | None:
    """What a model reads its parameters from in every pass; None where it has them in memory, or wrote them down."""
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        found = getattr(getattr(hook, "weights_map", None), "dataset", None)
        found = getattr(found, "state_dict", found)
        if isinstance(found, StreamedWeights):
            return found
    return None


def _gone() -> None:
    return None
