"""Pruned checkpoints in the family's own format: router rows, experts renumbered, config, tokenizer, card.

Files are read tensor by tensor and written shard by shard: no more than a shard of 2 GB is in memory.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moe_lens.checked import AnyModel
from moe_lens.errors import CheckpointError, InputError, UnsupportedModelError
from moe_lens.model.cache.identity import ROUTERS, identity, router_facts
from moe_lens.model.families.expert_groups import Groups
from moe_lens.model.families.table import FAMILIES
from moe_lens.model.loading.checkpoint import Checkpoint, OpenFiles, read_config
from moe_lens.model.loading.key_mapping import without_wrappers
from moe_lens.model.loading.pretrained import resolve_name
from moe_lens.pruning.checkpoint_formats import (
    format_of,
    parse_expert,
    parse_router,
    parse_rows,
    prediction,
    refuse_packing,
    smaller_config,
)
from moe_lens.pruning.merging import StoredMerges
from moe_lens.pruning.model_card import model_card
from moe_lens.pruning.plans import Plan
from moe_lens.scratch import folder_made, scratch_folder

_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".safetensors.index.json",
    ".bin.index.json",
    ".gguf",
    ".msgpack",
    ".h5",
)
_INDEX = "model.safetensors.index.json"
_SIZES = {
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "d_vocab": "vocab_size",
    "top_k": "num_experts_per_tok",
}
"""What config.json calls parts of a model's identity; its experts and their layers are counted in the tensors."""
_SHARD = 2 * 10**9
"""Bytes of a file at most, unless one tensor has more."""


def export(
    model: AnyModel | str | Path,
    plan: Plan,
    folder: str | Path,
    *,
    measurements: Mapping[str, Any] | None = None,
    **hub: Any,
) -> Path:
    """Write the smaller model, in the format that its family's checkpoints have.

    Layers that predict several tokens ahead are left out, with a warning, and config.json says that there are none.
    It loads in plain transformers where the family is transformers' own, and after `from moe_lens import HookedMoE` for
    `model_type "deepseek"`.

    Args:
        model: A `HookedMoE`, whose parameters in memory are written; or the name or folder of a checkpoint, which is
            pruned file by file without loading it, for models larger than memory.
        plan: What stays.
        folder: A folder that is empty or not there yet.
        measurements: What the card tells of the smaller model, by title.
        hub: Where a checkpoint comes from (`revision`, `cache_dir`, `token`, …).

    Returns:
        The folder.

    Raises:
        UnsupportedModelError: the family, or a plan that its config cannot express: layers that keep different numbers
            of experts, or groups of experts that do; or packed experts (see `refuse_packing`).
        InputError: the plan is for another model, the folder is not empty, or there is no room for the model.
        CheckpointError: the checkpoint is not whole.
    """
    target = Path(folder)
    parent = target.absolute().parent
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is not an empty folder; name one that is empty or does not exist")
    stored = isinstance(model, str | Path)
    if not stored:
        plan.check(identity(model))
    with _source(model, target, hub) as (source, hub_):
        path, raw = read_config(source, hub_)
        sizes = {"name": PurePath(str(model)).name, **{fact: raw[key] for fact, key in _SIZES.items() if key in raw}}
        if stored:
            plan.check({**plan.model, **sizes})
        expressible(raw, plan)
        refuse_packing(raw)
        checkpoint, ahead = _located(source, hub_, raw)
        _holds(checkpoint, plan)
        if stored:
            plan.check({**sizes, ROUTERS: _router_facts(checkpoint)})
        _room(checkpoint, plan, target)
        try:
            with folder_made(parent), scratch_folder(parent, f".{target.name}.") as temporary:
                _write_shards(checkpoint, plan, temporary)
                config = smaller_config(raw, len(plan.kept[0]), plan.top_k)
                (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
                _copy_rest(path.parent, temporary)
                (temporary / "README.md").write_text(model_card(plan, raw, measurements or {}, ahead), encoding="utf-8")
                if target.exists():
                    target.rmdir()
                temporary.replace(target)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{target} cannot be written: {error}") from error
    if ahead:
        warnings.warn(
            f"the layers {', '.join(ahead)} of the checkpoint predict several tokens ahead; they were left out of "
            f"{target}, as plans are for the model's own layers",
            stacklevel=2,
        )
    return target


def _located(source: str, hub: Mapping[str, Any], raw: Mapping[str, Any]) -> tuple[Checkpoint, list[str]]:
    """A checkpoint under the model's own names, without the layers that predict several tokens ahead; and those."""
    checkpoint = without_wrappers(Checkpoint.locate(source, hub))
    ahead = prediction(checkpoint.tensors, int(raw["num_hidden_layers"]))
    own = {name: stored for name, stored in checkpoint.tensors.items() if name not in ahead}
    return replace(checkpoint, tensors=own), sorted(set(ahead.values()))


def _router_facts(checkpoint: Checkpoint) -> list[float]:
    """What is known of the routers of a checkpoint, as `identity` has it of a model.

    Raises:
        CheckpointError: There is none.
    """
    found = {
        router: tensor for name, tensor in checkpoint.tensors.items() if (router := parse_router(name)) is not None
    }
    if not found:
        raise CheckpointError(f"{checkpoint.places}: there is no router in it")
    files = OpenFiles()
    return router_facts(tensor.read(files) for _, tensor in sorted(found.items()))


@contextmanager
def _source(model: Any, target: Path, hub: dict[str, Any]) -> Generator[tuple[str, dict[str, Any]]]:
    """A checkpoint on disk: the one that was named, or what a loaded model is saved as for the time being."""
    if isinstance(model, str | Path):
        source = resolve_name(str(model))
        if "revision" in hub and Path(source).is_dir():
            raise InputError(f"got revision={hub['revision']!r}, and {source} is on the disk, where there are none")
        yield source, hub
        return
    if hub:
        raise InputError(f"got {sorted(hub)}, which say where a checkpoint comes from, for a model that is loaded")
    format_of(model.original_model.config.model_type)
    refuse_packing(model.original_model.config.to_dict())
    parent = target.absolute().parent
    try:
        with folder_made(parent), scratch_folder(parent, f".{target.name}.") as whole:
            try:
                model.save_pretrained(whole)
            except InputError as error:  # nobody else knows that place
                raise InputError(f"{target} cannot be written: {error.__cause__ or error}") from error
            yield str(whole), {}
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error}") from error


def expressible(raw: Mapping[str, Any], plan: Plan) -> None:
    """Refuse a plan that the config of a family, here as plain values, has no words for.

    Raises:
        UnsupportedModelError: the family, layers that keep different numbers of experts, or groups that do.
    """
    format_of(raw["model_type"])
    if not plan.even:
        counts = {layer: len(experts) for layer, experts in zip(plan.layers, plan.kept, strict=True)}
        raise UnsupportedModelError(
            f"the plan keeps different numbers of experts in its layers ({counts}), and the config of "
            f"{raw['model_type']!r} has one number for all; plan.uniform() is the plan of the same size that fits"
        )
    if plan.fewer:
        counts = {layer: plan.active(layer) for layer in plan.layers}
        raise UnsupportedModelError(
            f"the plan has different numbers of active experts in its layers ({counts}), and the config of "
            f"{raw['model_type']!r} has one number for all; give plan(…, top_k=) one number"
        )
    if (groups := Groups.of(FAMILIES[raw["model_type"]], raw)) is None:
        return
    size = plan.n_experts // groups.number
    for layer, experts in zip(plan.layers, plan.kept, strict=True):
        counts = [sum(expert // size == group for expert in experts) for group in range(groups.number)]
        told = f"layer {layer} would keep {counts} experts in the {groups.number} groups that the router chooses from"
        if len(set(counts)) > 1:
            raise UnsupportedModelError(f"{told}; groups must stay equally large")
        if counts[0] < groups.least or counts[0] * groups.chosen < plan.top_k:
            raise UnsupportedModelError(f"{told}; each needs at least {groups.least}, and {groups.chosen} {plan.top_k}")


def _holds(checkpoint: Checkpoint, plan: Plan) -> None:
    """The checkpoint must have the experts that the plan names, no more and no fewer."""
    rows: dict[int, set[int]] = {}
    single: dict[int, dict[int, set[str]]] = {}
    for name, stored in checkpoint.tensors.items():
        if (one := parse_expert(name)) is not None:
            single.setdefault(one.layer, {}).setdefault(one.expert, set()).add(one.rest)
        elif (layer := parse_rows(name)) is not None:
            rows.setdefault(layer, set()).update(range(stored.shape[0]))
    for layer, experts in single.items():
        whole = set().union(*experts.values())
        if lacking := [expert for expert, rests in experts.items() if rests != whole]:
            lost = sorted(whole - experts[lacking[0]])[0]
            raise CheckpointError(f"{checkpoint.places}: expert {lacking[0]} of layer {layer} lacks {lost}")
    there = rows | {layer: set(experts) for layer, experts in single.items()}
    expected = dict.fromkeys(plan.layers, set(range(plan.n_experts)))
    if there != expected:
        found = {layer: len(experts) for layer, experts in sorted(there.items())}
        raise InputError(
            f"the plan is for {plan.n_experts} experts in each of the layers {list(plan.layers)}; "
            f"{checkpoint.places} holds {found} (layer: experts)"
        )


def _size(name: str, shape: tuple[int, ...], item: int, plan: Plan) -> int:
    """Bytes of a stored tensor in the smaller model."""
    count = item
    for length in shape:
        count *= length
    if (one := parse_expert(name)) is not None:
        return count if one.expert in plan.of(one.layer) else 0
    if (layer := parse_rows(name)) is not None:
        return count * len(plan.of(layer)) // plan.n_experts
    return count


def disk_needed(model: str | Path, plan: Plan, folder: str | Path) -> int:
    """Bytes that the checkpoint of a plan takes: another plan that keeps as many experts takes as many.

    Args:
        model: Name or folder of the whole checkpoint, whose headers are read.
        plan: What stays.
        folder: Where it goes; nothing is written.

    Raises:
        InputError: there is no room for it.
        CheckpointError: the checkpoint is not whole.
        UnsupportedModelError: see `refuse_packing`.
    """
    source = resolve_name(str(model))
    raw = read_config(source, {})[1]
    refuse_packing(raw)
    return _room(_located(source, {}, raw)[0], plan, Path(folder))


def _room(checkpoint: Checkpoint, plan: Plan, target: Path) -> int:
    bits = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    needed = sum(_size(n, t.shape, bits.get(t.dtype, 1), plan) for n, t in checkpoint.tensors.items())
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(parent).free) < needed:
        raise InputError(f"{target}: the smaller model takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")
    return needed


def _write_shards(checkpoint: Checkpoint, plan: Plan, folder: Path) -> None:
    """Shards of what stays of the source's, each of one of them; of a large one, several."""
    by_file: dict[Path, list[str]] = {}
    for name, stored in checkpoint.tensors.items():
        by_file.setdefault(stored.file, []).append(name)
    files = sorted(by_file)
    merges = StoredMerges(checkpoint, plan) if plan.merged else None
    weight_map, total = {}, 0
    written, tensors = list[tuple[Path, list[str]]](), dict[str, Tensor]()

    def flush() -> None:
        if tensors:
            written.append((folder / f"shard-{len(written)}", list(tensors)))
            save_file(tensors, written[-1][0], {"format": "pt"})
            tensors.clear()

    for file in files:
        handles = OpenFiles()
        for name in sorted(by_file[file]):
            if (kept := _smaller(name, partial(checkpoint.tensors[name].read, handles), plan, merges)) is None:
                continue
            if sum(value.nbytes for value in tensors.values()) + kept[1].nbytes > _SHARD:
                flush()
            tensors[kept[0]] = kept[1]
            total += kept[1].nbytes
        flush()
    for number, (path, tensor_names) in enumerate(written, start=1):
        name = "model.safetensors" if len(written) == 1 else f"model-{number:05}-of-{len(written):05}.safetensors"
        path.rename(folder / name)
        weight_map |= dict.fromkeys(tensor_names, name)
    if len(written) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _smaller(
    name: str, read: Callable[[], Tensor], plan: Plan, merges: StoredMerges | None
) -> tuple[str, Tensor] | None:
    """A tensor's name and value in the smaller model; None if it goes."""
    if (one := parse_expert(name)) is not None:
        kept = plan.of(one.layer)
        if one.expert not in kept:
            return None
        value = merges(one) if merges else read()
        return one.named(kept.index(one.expert)), value
    if (layer := parse_rows(name)) is not None:
        if merges and ".experts." in name:
            raise UnsupportedModelError(
                f"{name} holds all experts in one tensor; merging works on one tensor an expert"
            )
        return name, read()[torch.tensor(plan.of(layer))]
    return name, read()


def _copy_rest(source: Path, folder: Path) -> None:
    """Everything of the checkpoint that is neither weights, config, card nor code."""
    for file in source.iterdir():
        other = file.name not in ("config.json", "README.md") and file.suffix != ".py" and not file.name.startswith(".")
        if file.is_file() and other and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, folder / file.name)


def folder_size(folder: str | Path) -> int:
    """Bytes of a checkpoint's weights on disk.

    Raises:
        CheckpointError: it has none.
    """
    files = list(Path(folder).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors file")
    return sum(file.stat().st_size for file in files)
