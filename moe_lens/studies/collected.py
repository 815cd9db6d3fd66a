"""What `collect` saved: shards of tokens, read one at a time and only if they are as they were written."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Shaped
from torch import Tensor

from moe_lens import names
from moe_lens.errors import InputError
from moe_lens.manifest import file_digest, read_manifest
from moe_lens.reprs import Summary
from moe_lens.storage import load_tensors, save_tensors
from moe_lens.studies.findings import Findings

Format = Literal["safetensors", "parquet"]
KIND = "collected shard"
DOCUMENTS = "documents.parquet"
PER_TOKEN = ("token", "document", "position", "counted")
"""What every shard has of each token: id; number of the passage in its domain; place among the ids that the tokenizer
gives for the passage without adding special tokens, those that it adds in front at the place of the token that follows;
whether it is text, and no special token."""


@dataclass(frozen=True)
class Collected(Summary):
    """What `collect` saved: shards of tokens, read one at a time."""

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> "Collected":
        """Open a folder.

        Raises:
            InputError: It holds something else, or lacks a shard.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest["plan"]["study"] != "collect":
            raise InputError(f"{folder} holds the result of the study {manifest['plan']['study']}; expected of collect")
        if missing := [shard["file"] for shard in manifest["shards"] if not (folder / shard["file"]).is_file()]:
            raise InputError(f"{folder}: {missing[0]} is not there; run its command again, with another --out")
        return cls(folder, manifest)

    @property
    def n_tokens(self) -> int:
        """Of all shards."""
        return sum(shard["tokens"] for shard in self.manifest["shards"])

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of the model that the layer axis of `indices` and `weights` stands for, in its order."""
        return tuple(self.manifest["plan"]["model"]["moe_layers"])

    def findings(self) -> Findings:
        """What was saved; see `StudyResult.findings`."""
        plan = self.manifest["plan"]
        domains: dict[str, int] = {}
        for shard in self.manifest["shards"]:
            domains[shard["domain"]] = domains.get(shard["domain"], 0) + shard["tokens"]
        said = ", ".join(f"{name} {tokens:,}" for name, tokens in domains.items())
        lines = [f"{self.n_tokens:,} tokens in {len(self.manifest['shards'])} shards: {said}"]
        lines.append(f"routing of {len(self.layers)} layers; hooks: {', '.join(plan['settings']['hooks']) or 'none'}")
        then = f"in Python: moe_lens.studies.Collected.load({str(self.folder)!r}).shards()"
        return Findings(tuple(lines), (), then, f"collect of {plan['model'].get('name')}")

    def documents(self) -> pd.DataFrame:
        """A row per passage that was read: domain, document, source, tokens.

        Raises:
            InputError: The file is not as `collect` wrote it.
        """
        return pd.read_parquet(_whole(self.folder / DOCUMENTS, self.manifest["documents"]))

    def shards(self, domain: str | None = None) -> Iterator[dict[str, Tensor]]:
        """The shards of a domain, or of all, as tensors by name with a token in each row.

        Names are `PER_TOKEN`, `indices` and `weights` [token, layer, rank] (`layers` says which), and those of the
        hooks. Hooks of single experts hold that expert's rows alone; `….experts.26.token` and `….experts.26.rank` say
        of each which token of the shard it belongs to, and which rank the expert had there.

        Raises:
            InputError: A shard is missing, or is not as `collect` wrote it.
        """
        for shard in self._of(domain):
            yield _read(self.folder, shard)

    def _of(self, domain: str | None) -> list[dict[str, Any]]:
        names_ = [one["name"] for one in self.manifest["plan"]["domains"]]
        if domain is not None and domain not in names_:
            raise InputError(f"{self.folder} has no domain {domain!r}; it has {', '.join(names_)}")
        return [shard for shard in self.manifest["shards"] if domain is None or shard["domain"] == domain]

    def dataset(self, domain: str | None = None) -> Any:
        """The tokens of a domain, or of all, as a `datasets.IterableDataset` with the same columns, and the domain.

        Hooks of single experts are None at tokens that the expert did not get.
        """
        import datasets

        given = {"folder": self.folder, "wanted": self._of(domain)}
        return datasets.IterableDataset.from_generator(_rows, gen_kwargs=given)


def rows_of(layer: int, expert: int, what: str) -> str:
    """`blocks.5.mlp.experts.26.token`: what is told of the rows of a single expert, `token` or `rank`."""
    return names.expert(what, layer, expert)


def _rows(folder: Path, wanted: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The tokens of shards, one by one. Not a closure: `datasets` pickles what it calls."""
    for shard in wanted:
        columns: dict[str, Any] = {}
        tensors = _read(folder, shard)
        for name, value in tensors.items():
            array = (value.float() if value.is_floating_point() and value.itemsize <= 2 else value).numpy()
            if (one := names.parse_expert(name)) is not None:
                columns[name] = [None] * shard["tokens"]
                for token, row in zip(tensors[rows_of(*one[:2], "token")].tolist(), array, strict=True):
                    columns[name][token] = row
            elif ".experts." not in name:
                columns[name] = array
        for row in range(shard["tokens"]):
            yield {"domain": shard["domain"], **{name: column[row] for name, column in columns.items()}}


def write_shard(path: Path, tensors: Mapping[str, Shaped[Tensor, "..."]], layers: Sequence[int]) -> None:
    """Write a shard, with the layers that its layer axis stands for.

    Raises:
        InputError: It cannot be written.
    """
    about = {"layers": list(layers)}
    if path.suffix == ".safetensors":
        save_tensors(path, KIND, tensors, about)
        return
    import datasets
    import pyarrow.parquet

    table = datasets.Dataset.from_dict({name: value.numpy() for name, value in tensors.items()}).data.table
    labelled = table.replace_schema_metadata({**(table.schema.metadata or {}), "moe_lens": json.dumps(about)})
    try:
        pyarrow.parquet.write_table(labelled, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error


def _read(folder: Path, shard: Mapping[str, Any]) -> dict[str, Tensor]:
    path = _whole(folder / shard["file"], shard["digest"])
    if path.suffix == ".safetensors":
        return load_tensors(path, KIND)[0]
    import datasets

    rows: Any = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    found: dict[str, Tensor] = {}
    for name, feature in rows.features.items():
        while hasattr(feature, "feature"):
            feature = feature.feature
        # Without a dtype, `datasets` makes every float float32 and every integer int64.
        found |= rows.select_columns(name).with_format("torch", dtype=getattr(torch, feature.dtype))[:]
    return found


def _whole(path: Path, digest: str) -> Path:
    """A file, if it is still what was written."""
    try:
        same = file_digest(path) == digest
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not same:
        raise InputError(f"{path}: is not as collect wrote it; run its command again, with another --out")
    return path
