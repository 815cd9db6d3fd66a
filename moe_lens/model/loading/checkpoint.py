"""Checkpoints on disk or on the hub: which files, which tensors in them, and whether all of it is there.

Only headers are read here (names, shapes, dtypes). Transformers loads several kinds of broken checkpoints silently,
with random numbers for what is missing; whatever headers can tell is refused here, naming file and tensor.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_lens.errors import CheckpointError, near_miss
from moe_lens.model.hf_compat import cached_file, is_offline_mode
from moe_lens.model.loading.config_json import believed_config, read_object

EMBEDDED = "tiny-deepseekmoe"
"""Name of the model that is part of the package."""

HUB_ARGUMENTS = frozenset(
    {"cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder"}
)
"""Arguments of `from_pretrained` that say where files come from."""

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""By the names that safetensors has for them."""


class OpenFiles:
    """Safetensors files, each opened when something of it is first read; for one thread."""

    def __init__(self) -> None:
        self._handles: dict[Path, Any] = {}

    def read(self, file: Path, name: str) -> Tensor:
        """A tensor as it is stored."""
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        return self._handles[file].get_tensor(name)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in one safetensors file."""

    file: Path
    name: str
    """In the file."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors calls it."""

    def read(self, files: OpenFiles) -> Tensor:
        """The tensor as it is stored."""
        return files.read(self.file, self.name)

    @property
    def files(self) -> set[Path]:
        """The file that it is in."""
        return {self.file}

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the file."""
        width = re.search(r"\d+", self.dtype)  # BOOL alone has no number
        return math.prod(self.shape) * (int(width[0]) if width else 8) // 8


def find_file(source: str, name: str, hub: Mapping[str, Any]) -> Path | None:
    """Path of a checkpoint's file, downloaded where need be; None where the checkpoint has no such file.

    Raises:
        CheckpointError: the folder or the hub's repository is not there or cannot be reached.
    """
    folder = Path(source) / (hub.get("subfolder") or "")
    if Path(source).is_file():
        beside = Path(source).parent
        whole = f", such as {beside}" if (beside / "config.json").is_file() else ""
        raise CheckpointError(f"{source} is a file; expected a checkpoint's folder{whole} or its name on the hub.")
    if (folder / name).is_dir():
        raise CheckpointError(f"{folder / name} is a folder; expected a file.")
    try:
        found = cached_file(source, name, **hub, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"No checkpoint {source!r}: it is no folder here, and the hub's answer was: {error}"
        ) from error
    return None if found is None else Path(found)


def read_config(source: str, hub: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Path and content of config.json, which must name a model_type."""
    path = find_file(source, "config.json", hub)
    if path is None:
        # transformers answers alike for both
        unanswered = "the hub's repository has none or the hub cannot be reached"
        hub_says = "the hub may not be asked (HF_HUB_OFFLINE)" if is_offline_mode() else unanswered
        revision = "" if hub.get("revision") is None else f" in its revision {str(hub['revision'])!r}"
        raise CheckpointError(
            f"{source} has no config.json{revision}"
            + ("" if Path(source).is_dir() else f": there is no such folder, and {hub_says}")
            + ". Expected a folder with config.json and safetensors, or a name on the hub"
            + f"{_meant(source)}."
        )
    return path, believed_config(path)


def _meant(source: str) -> str:
    """The embedded model, or a folder beside where one was looked for, if it has nearly the name."""
    try:
        beside = [str(path) for path in Path(source).parent.iterdir() if path.is_dir()]
    except OSError:
        beside = []
    return near_miss(source, [EMBEDDED, *beside])


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint, from the headers of its safetensors files."""

    files: tuple[Path, ...]
    """All weight files, in order."""
    tensors: Mapping[str, StoredTensor]
    """Every tensor by name; none is in two files."""

    @classmethod
    def locate(cls, source: str, hub: Mapping[str, Any], variant: str | None = None) -> "Checkpoint":
        """Find the safetensors files of a checkpoint and read their headers.

        Raises:
            CheckpointError: no weights, or pickled ones only; an index that is not JSON or contradicts its shards; a
                shard that is missing, empty, truncated or no safetensors file; one tensor in two shards.
        """
        stem = f"model.{variant}" if variant else "model"
        single = find_file(source, f"{stem}.safetensors", hub)
        if single is not None:
            return cls((single,), _header(single))
        index_name = f"model.safetensors.index.{variant}.json" if variant else "model.safetensors.index.json"
        index = find_file(source, index_name, hub)
        if index is not None:
            return cls._from_index(source, index, hub)
        for pickled in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
            if find_file(source, pickled, hub) is not None:
                raise CheckpointError(
                    f"{source} has pickled weights only ({pickled}), and reading a pickle can run code. If you "
                    f"trust them, convert them once: HookedMoE.from_pretrained({source!r}, use_safetensors=False)"
                    ".save_pretrained(folder). In Python, use_safetensors=False alone reads them each time."
                )
        raise CheckpointError(f"{source} has no weights: neither {stem}.safetensors nor {index_name}.")

    @classmethod
    def _from_index(cls, source: str, index: Path, hub: Mapping[str, Any]) -> "Checkpoint":
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map from tensors to files.")
        for tensor, shard in weight_map.items():
            if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & {"/", "\\"}:
                raise CheckpointError(f"{index} places {tensor} in {shard!r}; expected a file beside the index.")
        files: list[Path] = []
        tensors: dict[str, StoredTensor] = {}
        for shard in sorted(set(weight_map.values())):
            claimed = {tensor for tensor, place in weight_map.items() if place == shard}
            file = find_file(source, shard, hub)
            if file is None:
                raise CheckpointError(f"{source} lacks the shard {shard}, which should hold {_some(claimed)}.")
            header = _header(file)
            for tensor in header:
                if tensor in tensors:
                    raise CheckpointError(f"{tensor} is in both {tensors[tensor].file.name} and {shard}.")
            if absent := claimed - header.keys():
                raise CheckpointError(f"{index.name} says that {shard} holds {_some(absent)}; {file} does not.")
            if unnamed := header.keys() - claimed:
                raise CheckpointError(f"{file} holds {_some(unnamed)}, which {index.name} does not place there.")
            files.append(file)
            tensors.update(header)
        return cls(tuple(files), tensors)

    def check(
        self, expected: Mapping[str, tuple[int, ...]], left_out: Mapping[str, tuple[int, ...] | None] | None = None
    ) -> None:
        """Refuse the checkpoint unless it has exactly the tensors of `expected`, in those shapes, as floating point.

        Args:
            expected: Shapes of the tensors that are needed, by name.
            left_out: Shapes of those that may be there too; None for any.

        Raises:
            CheckpointError: tensors that are missing, unexpected, misshapen or not floating point, and their files.
        """
        known = {**(left_out or {}), **expected}
        problems = [
            f"{tensor.file.name}: {name} has shape {tensor.shape}, config.json asks for {shape}"
            for name, tensor in self.tensors.items()
            if (shape := known.get(name)) is not None and tensor.shape != shape
        ]
        problems += [
            f"{tensor.file.name}: {name} is {tensor.dtype}, expected one of {', '.join(FLOATS)}"
            for name, tensor in self.tensors.items()
            if name in expected and tensor.dtype not in FLOATS
        ]
        problems += [
            f"{tensor.file.name}: {name} is unexpected, config.json has no place for it"
            for name, tensor in self.tensors.items()
            if name not in known
        ]
        problems += [f"{self.places}: {name} is missing" for name in expected if name not in self.tensors]
        if problems:
            raise not_whole(str(self.files[0].parent), problems)

    @property
    def places(self) -> str:
        """The names of all files, as an error gives them."""
        return ", ".join(file.name for file in self.files)

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every tensor of floating point without rounding; float32 if there is none."""
        dtypes = {FLOATS[tensor.dtype] for tensor in self.tensors.values() if tensor.dtype in FLOATS}
        return reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def not_whole(source: str, problems: list[str], limit: int = 8) -> CheckpointError:
    """One error that lists what is wrong with a checkpoint."""
    lines = problems[:limit]
    if len(problems) > limit:
        lines.append(f"and {len(problems) - limit} more")
    listed = "".join(f"\n  {line}" for line in lines)
    return CheckpointError(f"The checkpoint {source} is not whole, or its config.json is another model's:{listed}")


def _header(file: Path) -> dict[str, StoredTensor]:
    """Names, shapes and dtypes in a safetensors file; reading them also proves that the file is as long as it says."""
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  no mapping
            return {
                name: StoredTensor(file, name, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} ({file.stat().st_size:,} bytes) is no whole safetensors file: {error}. Copy or download it again."
        ) from error


def _some(names: set[str], limit: int = 3) -> str:
    shown = ", ".join(sorted(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
