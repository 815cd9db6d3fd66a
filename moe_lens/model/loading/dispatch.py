"""Putting a memory plan into transformers' words, and finding out afterwards where parameters are."""

import contextlib
import logging
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Self

import torch
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedModel

from moe_lens.model.experts.offloaded_experts import device_of
from moe_lens.model.loading.device_map import Place, Size, gibibytes, plan_memory, room_of
from moe_lens.model.loading.key_mapping import WRAPPER
from moe_lens.model.loading.machine import Machine
from moe_lens.model.loading.quantising import packed_in
from moe_lens.model.loading.streamed_weights import streamed_weights

_LOG = logging.getLogger(__name__)
_ELSEWHERE = ("tp_plan", "tp_size", "device_mesh", "distributed_config")
"""Arguments that place parameters in other ways."""
_LOCK = "in-use.lock"
DIVIDED = ("auto", "balanced", "balanced_low_0", "sequential")
"""Words for `device_map` that let accelerate divide a model."""


def offload_root() -> Path:
    """The folder beside the hub's cache in which parameters are kept that fit nowhere else."""
    return Path(HF_HOME) / "moe_lens-offload"


def is_open(kwargs: Mapping[str, Any]) -> bool:
    """Whether arguments of `from_pretrained` leave open where parameters go."""
    if any(kwargs.get(name) is not None for name in _ELSEWHERE) or torch.get_default_device().type != "cpu":
        return False
    return kwargs.get("device_map") == "auto" if "device_map" in kwargs else True


def needs_disk(kwargs: Mapping[str, Any], total: int) -> bool:
    """Whether loading a model is to leave a part of it on disk.

    Args:
        kwargs: of `from_pretrained`.
        total: bytes of the model.
    """
    device_map = kwargs.get("device_map")
    if not is_open(kwargs):
        return device_map in DIVIDED if isinstance(device_map, str) else "disk" in dict(device_map or {}).values()
    machine = Machine.here(Path(kwargs.get("offload_folder") or offload_root()))
    return total > sum(room_of(machine, kwargs.get("max_memory")).values())


class Placing:
    """Loading a model into the places that were chosen, or else into those of a plan; a context manager.

    Args:
        kwargs: of `from_pretrained`.
        size: of the model; None if it is kept in fewer bits than it is counted in: transformers then divides it.
            One with `modules` is never written to disk: `streamed` says whether it is to be read from there.

    Raises:
        InputError: there is no room for the model.
    """

    def __init__(self, kwargs: Mapping[str, Any], size: Size | None):
        self.arguments = dict(kwargs)
        """Of `from_pretrained`, with places for all parameters."""
        self._folder: Path | None = None
        self._offloads = ""
        self._model: PreTrainedModel | None = None
        if is_open(kwargs):
            self._plan(size)
        device_map = self.arguments.get("device_map")
        divided = isinstance(device_map, str) and device_map in DIVIDED
        if isinstance(device_map, Mapping):
            divided = "disk" in device_map.values()
        self.streamed = divided and size is not None and bool(size.modules)
        """Whether some parameters are to be read from the checkpoint in every pass, as `device_map` says."""
        if divided and not self.streamed and self.arguments.get("offload_folder") is None:
            self._folder, self._lock = _new_folder(offload_root())
            self.arguments["offload_folder"] = str(self._folder)
        if self._offloads:
            folder = self.arguments.get("offload_folder")
            first = f". What is on disk is first written to {folder}" if divided and not self.streamed else ""
            removed = ", which is removed with the model" if self._folder is not None else ""
            _LOG.warning("The model does not fit into memory: %s%s%s", self._offloads, first, removed)

    def _plan(self, size: Size | None) -> None:
        machine = Machine.here(Path(self.arguments.get("offload_folder") or offload_root()))
        self.arguments.pop("device_map", None)
        if size is None:
            self.arguments |= {"device_map": "auto"} if machine.gpus or self.arguments.get("max_memory") else {}
            return
        plan = plan_memory(size, machine, self.arguments.pop("max_memory", None))
        self.arguments |= plan.arguments
        if plan.offloads:
            self._offloads = str(plan)

    def __enter__(self) -> Self:
        return self

    def keep(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model that was loaded; what it keeps on disk is there as long as it is."""
        self._model = model
        return model

    def __exit__(self, *_: object) -> None:
        if self._folder is None:
            return
        written = sum(file.stat().st_size for file in self._folder.iterdir() if file.name != _LOCK)
        if self._model is None or not written:
            _remove(self._folder, self._lock)
        else:
            _LOG.warning("%s of parameters are kept in %s while the model is", gibibytes(written), self._folder)
            weakref.finalize(self._model, _remove, self._folder, self._lock)


def _new_folder(root: Path) -> tuple[Path, FileLock]:
    """A folder, and what says that it is in use; those of processes that were killed are removed."""
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / _LOCK):
        for folder in filter(Path.is_dir, root.iterdir()):
            lock = FileLock(folder / _LOCK)
            with contextlib.suppress(Timeout, OSError):
                lock.acquire(blocking=False)
                _remove(folder, lock)
        folder = Path(mkdtemp(dir=root))
        lock = FileLock(folder / _LOCK)
        lock.acquire()
    return folder, lock


def _remove(folder: Path, lock: FileLock) -> None:
    lock.release()
    shutil.rmtree(folder, ignore_errors=True)


def places(model: Any) -> dict[Place, int]:
    """Bytes of a transformers model's parameters, packed ones too, in each place: GPUs by number, "cpu", "disk".

    What is read from the checkpoint in every pass counts as it is stored.
    """
    device_map: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    parameters, streamed = dict(model.named_parameters()), None
    if any(parameter.is_meta for parameter in parameters.values()):
        streamed = streamed_weights(model)
    found: dict[Place, int] = {}
    for name, parameter in parameters.items():
        at: Any = parameter.device
        bytes_ = parameter.numel() * parameter.element_size()
        if at.type == "meta":  # kept elsewhere: transformers' map says where
            at = place_of(name, device_map)
            if streamed is not None and at == "disk":
                bytes_ = streamed.stored_bytes(name.replace(WRAPPER, ""))
        if isinstance(at, torch.device):
            at = _place(at)
        found[at] = found.get(at, 0) + bytes_
    for _, packed in packed_in(model):
        at = _place(packed.device)
        found[at] = found.get(at, 0) + packed.nbytes
    return found


def place_of(name: str, places: Mapping[str, Any], otherwise: Any = "disk") -> Any:
    """The place of a parameter, where a map has names of modules around it; the innermost counts."""
    parts = name.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), -1, -1))
    return next((places[prefix] for prefix in prefixes if prefix in places), otherwise)


def _place(device: Any) -> Place:
    return device.type if device.index is None else device.index


def input_device(model: Any) -> torch.device:
    """Where a transformers model wants its tokens: where its embedding is, or comes to when it is kept elsewhere."""
    return device_of(model.get_input_embeddings())


def output_place(model: Any) -> tuple[torch.device, torch.dtype]:
    """Where a transformers model's unembedding is, or comes to when it is kept elsewhere, and in which dtype."""
    head = model.get_output_embeddings()
    if not hasattr(head, "weight"):  # somebody's own, around a linear layer
        parameter = next(head.parameters())
        return parameter.device, parameter.dtype
    packed = head.weight.element_size() == 1  # in 8 bits, of floats too
    return device_of(head), model.dtype if packed else head.weight.dtype
