"""`collect`: activations and routing of a corpus, in shards: what probes, SAEs and transcoders are trained on."""

import fnmatch
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Shaped
from torch import Tensor

from moe_lens import distributed, names
from moe_lens.data import Corpus, Domain, Reading, Shard, TokenBatch, batched, shards
from moe_lens.errors import InputError
from moe_lens.routing import LayerRouting
from moe_lens.stats.observation import Hooks, routing_hooks
from moe_lens.storage import load_tensors, save_tensors
from moe_lens.studies.batch_halving import Halving
from moe_lens.studies.forward_passes import forward
from moe_lens.studies.model_facts import model_facts
from moe_lens.studies.study import agreed, one_by_one, pinned, versions
from moe_lens.studies.study_folder import SPACE, StudyFolder, read_manifest

Format = Literal["safetensors", "parquet"]
KIND = "collected shard"
PER_TOKEN = ("token", "document", "position", "counted")
"""What every shard has of each token: id; number of the passage in its domain; place in the passage, BOS at the place
of the token that follows it; whether it is text, and no special token."""


@dataclass(frozen=True)
class Collected:
    """What `collect` saved: shards of tokens, read one at a time."""

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> "Collected":
        """Open a folder.

        Raises:
            InputError: It holds something else.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest["plan"]["study"] != "collect":
            raise InputError(f"{folder} holds the result of the study {manifest['plan']['study']}; expected of collect")
        return cls(folder, manifest)

    @property
    def n_tokens(self) -> int:
        """Of all shards."""
        return sum(shard["tokens"] for shard in self.manifest["shards"])

    def documents(self) -> pd.DataFrame:
        """A row per passage that was read: domain, document, source, tokens."""
        return pd.read_parquet(self.folder / "documents.parquet")

    def shards(self, domain: str | None = None) -> Iterator[dict[str, Tensor]]:
        """The shards of a domain, or of all, as tensors by name with a token in each row.

        Names are `PER_TOKEN`, `indices` and `weights` [token, layer, rank], and those of the hooks.
        """
        for shard in self.manifest["shards"]:
            if domain is None or shard["domain"] == domain:
                yield _read(self.folder / shard["file"])

    def dataset(self, domain: str | None = None) -> Any:
        """The tokens of a domain, or of all, as a `datasets.IterableDataset` with the same columns, and the domain."""
        import datasets

        wanted = [shard for shard in self.manifest["shards"] if domain is None or shard["domain"] == domain]
        return datasets.IterableDataset.from_generator(_rows, gen_kwargs={"folder": self.folder, "wanted": wanted})


def collect(
    model: Any,
    domains: Sequence[Domain | Corpus],
    out: Path,
    *,
    hooks: Sequence[str] = (),
    reading: Reading | None = None,
    dtype: torch.dtype = torch.float32,
    kind: Format = "safetensors",
    name: str | None = None,
    batch_tokens: int = 2048,
    watch: Callable[[str, int], None] = lambda what, tokens: None,  # noqa: ARG005
) -> Collected:
    """Save routing, and the activations at hook points, of every token; or go on with it.

    Interrupted, it goes on from its last shard. Under `torch.distributed` each process writes its own shards.

    Args:
        model: A `HookedMoE`.
        domains: Texts in memory or corpora, each with a name of its own.
        out: The folder that appears when all shards are there.
        hooks: Names of hook points whose tensors are [batch, pos, …], or patterns such as `blocks.*.hook_resid_mid`.
        reading: How texts are read; a shard of `reading.shard_tokens` tokens is a file, and is held in memory.
        dtype: Of activations and weights on disk.
        kind: safetensors, or parquet, which `datasets` reads as well; that has no bfloat16.
        name: What the model was loaded as.
        batch_tokens: Rows × columns that the model reads at once to begin with; halved where memory runs out.
        watch: Called with what is being read and how many tokens were, after every shard.

    Raises:
        InputError: No such hook, too little space on the disk, or a folder with something else in it.
    """
    reading = Reading() if reading is None else reading
    one_by_one(domains)
    domains = pinned(domains)
    points = hook_points(model, hooks)
    if kind == "parquet" and dtype == torch.bfloat16:
        raise InputError("parquet has no bfloat16; choose float16 or float32, or safetensors")
    plan = {
        "study": "collect",
        "settings": {"hooks": points, "dtype": str(dtype).removeprefix("torch."), "format": kind},
        "reading": vars(reading),
        "model": model_facts(model, name or str(model.cfg.model_name)),
        "domains": [{"name": domain.name, **domain.identity} for domain in domains],
        "processes": distributed.world_size(),
    }
    folder = StudyFolder(out, plan)
    if agreed(folder.finished):
        return Collected.load(out)
    per_token = bytes_per_token(model, points, dtype)
    agreed(lambda: folder.begin(SPACE + per_token * (reading.tokens or 0) * len(domains)))
    for number, domain in enumerate(domains):
        done = len(list(folder.unfinished.glob(f"{number:02d}-{distributed.rank():03d}-*.json")))
        collector = _Collector(model, points, dtype, reading, batch_tokens)
        places = {"rank": distributed.rank(), "world_size": distributed.world_size()}
        for shard in shards(domain, model, reading, start=done, **places):
            tensors = collector.shard(shard)
            stem = f"{number:02d}-{distributed.rank():03d}-{shard.number:06d}"
            file = f"{stem}.{kind}"
            _write(folder.unfinished / file, tensors)
            # The note is written last: a shard without one is made again.
            folder.note(
                stem, {"file": file, "domain": domain.name, "tokens": len(tensors["token"]), **_passages(shard)}
            )
            watch(domain.name, sum(window.counted for window in shard.windows))
    distributed.barrier()
    agreed(lambda: _assemble(folder))
    return Collected.load(out)


class _Collector:
    """Runs the model over a shard, and keeps what was asked for."""

    def __init__(self, model: Any, points: Sequence[str], dtype: torch.dtype, reading: Reading, batch_tokens: int):
        self.model, self.points, self.dtype, self.reading = model, points, dtype, reading
        self.halving = Halving(batch_tokens)

    def shard(self, shard: Shard) -> dict[str, Tensor]:
        """Every token of a shard, in the order of its windows."""
        parts = self.halving.run(self._batches, shard)
        number = {(window.document, window.start): place for place, window in enumerate(shard.windows)}
        windows = [window for batch, _ in parts for window in batch.windows]
        place = torch.cat([torch.full((len(window.ids),), number[window.document, window.start]) for window in windows])
        order = place.argsort(stable=True)
        return {name: torch.cat([tensors[name] for _, tensors in parts])[order] for name in parts[0][1]}

    def _batches(self, batch_tokens: int, shard: Shard) -> list[tuple[TokenBatch, dict[str, Tensor]]]:
        packed = min(self.reading.context, int(self.model.cfg.n_ctx)) if self.reading.packed else None
        found = []
        for batch in batched(shard.windows, self.model, batch_tokens=batch_tokens, packed=packed):
            layers: dict[int, LayerRouting] = {}
            kept: dict[str, Tensor] = {}
            forward(self.model, batch, [*routing_hooks(self.model, layers), *_keep(self.points, batch, kept)])
            chosen = {"indices": torch.int16, "weights": self.dtype}
            routing = {
                name: torch.stack([batch.unpack(getattr(layers[at], name)).cpu() for at in self.model.moe_layers], 2)
                for name in chosen
            }
            tensors = {
                **_about(batch),
                **{name: value[batch.mask].to(chosen[name]) for name, value in routing.items()},
                **{name: value[batch.mask].to(self.dtype) for name, value in kept.items()},
            }
            found.append((batch, tensors))
        return found


def _rows(folder: Path, wanted: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The tokens of shards, one by one. Not a closure: `datasets` pickles what it calls."""
    for shard in wanted:
        tensors = {
            name: value.float() if value.dtype == torch.bfloat16 else value
            for name, value in _read(folder / shard["file"]).items()
        }
        arrays = {name: value.numpy() for name, value in tensors.items()}
        for row in range(shard["tokens"]):
            yield {"domain": shard["domain"], **{name: array[row] for name, array in arrays.items()}}


def _keep(points: Sequence[str], batch: TokenBatch, into: dict[str, Tensor]) -> Hooks:
    read = batch.tokens.shape if batch.packing is None else batch.packing.tokens.shape

    def keep(value: Tensor, hook: Any, name: str) -> None:  # noqa: ARG001
        if value.shape[:2] != read:
            raise InputError(
                f"{name} has shape {tuple(value.shape)}; collect needs [batch, pos, …] = {tuple(read)} first"
            )
        into[name] = batch.unpack(value.detach()).cpu()

    return [(name, lambda value, hook, name=name: keep(value, hook, name)) for name in points]


def _about(batch: TokenBatch) -> dict[str, Tensor]:
    """The columns `PER_TOKEN`."""
    shape, mask = batch.tokens.shape, batch.mask
    document = torch.tensor([window.document for window in batch.windows])[:, None].expand(shape)
    start = torch.tensor([window.start for window in batch.windows])[:, None]
    place = start + (batch.counted.cumsum(-1) - 1).clamp(min=0)
    return {
        "token": batch.tokens[mask],
        "document": document[mask],
        "position": place[mask],
        "counted": batch.counted[mask],
    }


def hook_points(model: Any, patterns: Sequence[str]) -> list[str]:
    """The names of hook points that match, each once, in the model's order.

    Raises:
        InputError: A pattern matches none.
    """
    found: set[str] = set()
    known = list(model.hook_dict)
    for pattern in patterns:
        matching = fnmatch.filter(known, pattern)
        if not matching:
            raise InputError(f"--hook {pattern!r}: no such hook point; for example {names.block(names.RESID_MID, 0)}")
        found |= set(matching)
    return [name for name in known if name in found]


@torch.no_grad()
def bytes_per_token(model: Any, points: Sequence[str], dtype: torch.dtype) -> int:
    """What a token takes on disk, seen on a text of two tokens."""
    kept: dict[str, Tensor] = {}
    one = TokenBatch(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2).bool(), torch.ones(1, 2).bool(), ("",))
    forward(model, one, _keep(points, one, kept))
    routing = len(model.moe_layers) * model.top_k
    numbers = sum(value[0, 0].numel() for value in kept.values()) + routing
    return numbers * dtype.itemsize + routing * 2 + 8 * 3 + 1


def _passages(shard: Shard) -> dict[str, Any]:
    counts: dict[int, list[Any]] = {}
    for window in shard.windows:
        counts.setdefault(window.document, [window.source, 0])[1] += window.counted
    return {"documents": [[number, source, tokens] for number, (source, tokens) in counts.items()]}


def _write(path: Path, tensors: Mapping[str, Shaped[Tensor, "token *rest"]]) -> None:
    if path.suffix == ".safetensors":
        save_tensors(path, KIND, tensors, {})
        return
    import datasets

    columns = {name: value.numpy() for name, value in tensors.items()}
    try:
        datasets.Dataset.from_dict(columns).to_parquet(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_tensors(path, KIND)[0]
    import datasets

    rows: Any = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    return dict(rows.with_format("torch")[:])


def _assemble(folder: StudyFolder) -> None:
    """Put all shards into the folder, with what is known of them."""
    notes = [folder.noted(stem) for stem in sorted(path.stem for path in folder.unfinished.glob("[0-9]*-*-*.json"))]
    if not notes:
        raise InputError("the texts hold no passage of two tokens or more")
    counts: dict[tuple[str, int, str], int] = {}
    for note in notes:
        for number, source, tokens in note.pop("documents"):
            key = note["domain"], number, source
            counts[key] = counts.get(key, 0) + tokens
    scratch = folder.scratch()
    for note in notes:
        (scratch / note["file"]).hardlink_to(folder.unfinished / note["file"])
    documents = pd.DataFrame(
        [(*key, tokens) for key, tokens in counts.items()], columns=["domain", "document", "source", "tokens"]
    )
    documents.to_parquet(scratch / "documents.parquet", index=False)
    folder.finish(scratch, {"versions": versions(), "command": shlex.join(sys.argv), "shards": notes})
