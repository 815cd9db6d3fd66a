"""`collect`: activations and routing of a corpus, in shards: what probes, SAEs and transcoders are trained on."""

import fnmatch
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from moe_lens import distributed, names
from moe_lens.checked import AnyModel, Positive
from moe_lens.data import Domains, Reading, Shard, TokenBatch, as_domains, batch_windows, shards
from moe_lens.errors import InputError, near_miss, several
from moe_lens.manifest import file_digest
from moe_lens.model.loading import batch_sizes
from moe_lens.model.loading.dispatch import places
from moe_lens.routing import LayerRouting
from moe_lens.stats.observation import Hooks, check_packing, routing_hooks
from moe_lens.studies.batch_halving import Halving
from moe_lens.studies.collected import DOCUMENTS, Collected, Format, rows_of, write_shard
from moe_lens.studies.forward_passes import forward, token_places
from moe_lens.studies.model_facts import model_facts
from moe_lens.studies.run_study import agreed, pinned, versions
from moe_lens.studies.study_folder import SPACE, StudyFolder


def collect(
    model: AnyModel,
    domains: Domains,
    out: str | Path,
    *,
    hooks: Sequence[str] = (),
    reading: Reading | None = None,
    dtype: torch.dtype = torch.float32,
    kind: Format = "safetensors",
    name: str | None = None,
    batch_tokens: Positive | None = None,
    watch: Callable[[str, int], None] = lambda what, tokens: None,  # noqa: ARG005
) -> Collected:
    """Save routing, and the activations at hook points, of every token; or resume an interrupted run.

    Interrupted, it goes on from its last shard. Under `torch.distributed` each process writes its own shards.

    Args:
        model: A `HookedMoE`.
        domains: Texts in memory or corpora, each with a name of its own; or a dictionary `{name: texts}`.
        out: The folder that appears when all shards are there.
        hooks: Names of hook points whose tensors are [batch, pos, …], or patterns such as `blocks.*.hook_resid_mid`.
            Single experts are named or matched as `blocks.5.mlp.experts.*.hook_out`, which keeps their rows only.
        reading: How texts are read; a shard of `reading.shard_tokens` tokens is a file, and is held in memory.
        dtype: Of activations and weights on disk.
        kind: safetensors, or parquet, which `datasets` reads as well; that has no bfloat16.
        name: What the model was loaded as.
        batch_tokens: Rows × columns that the model reads at once to begin with; see `run`.
        watch: Called with what is being read and how many tokens were, after every shard.

    Raises:
        InputError: No such hook, too little space on the disk, a folder with something else in it (such as what was
            collected under other hooks, or none), one that vanished during the work, a number that `dtype` is too
            narrow for, or tokens with different numbers of experts.
    """
    reading = Reading() if reading is None else reading
    out = Path(out)
    if reading.packed:
        check_packing(model)
    domains = pinned(as_domains(domains))
    points = hook_points(model, several(hooks, "hooks"))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype is {dtype!r}; expected a floating-point dtype of torch, such as torch.float16")
    if kind == "parquet" and dtype not in (torch.float16, torch.float32, torch.float64):
        narrow = str(dtype).removeprefix("torch.")
        raise InputError(f"parquet has no {narrow}; choose float16 or float32, or safetensors")
    if kind == "parquet" and (single := [name for name in points if names.parse_expert(name)]):
        raise InputError(f"parquet has a row for each token, and {single[0]} for some only; choose safetensors")
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
    made: list[str] = []
    at_once = batch_sizes.batch_tokens(model, kept=bool(points)) if batch_tokens is None else batch_tokens
    with folder.filled():
        for number, domain in enumerate(domains):
            mine = f"{number:02d}-{distributed.rank():03d}"
            done = 0
            while folder.has(stem := f"{mine}-{done:06d}") and (folder.unfinished / f"{stem}.{kind}").is_file():
                done += 1
            collector = _Collector(model, points, dtype, reading, at_once)
            processes = {"rank": distributed.rank(), "world_size": distributed.world_size()}
            for shard in shards(domain, model, reading, start=done, **processes):
                tensors = collector.shard(shard)
                stem = f"{mine}-{shard.number:06d}"
                file = f"{stem}.{kind}"
                folder.there()
                write_shard(folder.unfinished / file, tensors, model.moe_layers)
                # The note is written last: a shard without one is made again.
                about = {"file": file, "domain": domain.name, "tokens": len(tensors["token"])}
                folder.note(stem, {**about, "digest": file_digest(folder.unfinished / file), **_passages(shard)})
                watch(domain.name, sum(window.counted for window in shard.windows))
                done = shard.number + 1
            made += [f"{mine}-{shard:06d}" for shard in range(done)]
        every = [stem for stems in distributed.gather(made) for stem in stems]
        agreed(lambda: _assemble(folder, sorted(every), places(model.original_model)))
    return Collected.load(out)


Experts = dict[tuple[int, int], dict[str, Tensor]]
"""By layer and expert: its rows by the name of the hook, and of each the `token` and the `rank`."""


class _Collector:
    """Runs the model over a shard, and keeps what was asked for."""

    def __init__(self, model: Any, points: Sequence[str], dtype: torch.dtype, reading: Reading, batch_tokens: int):
        self.model, self.points, self.dtype, self.reading = model, points, dtype, reading
        self.halving = Halving(batch_tokens)

    def shard(self, shard: Shard) -> dict[str, Tensor]:
        """Every token of a shard, in the order of its windows."""
        parts = self.halving.run(self._batches, shard)
        number = {(window.document, window.start): place for place, window in enumerate(shard.windows)}
        windows = [window for batch, _, _ in parts for window in batch.windows]
        place = torch.cat([torch.full((len(window.ids),), number[window.document, window.start]) for window in windows])
        order = place.argsort(stable=True)
        whole = {name: torch.cat([tensors[name] for _, tensors, _ in parts])[order] for name in parts[0][1]}
        return whole | _in_order([(len(tensors["token"]), experts) for _, tensors, experts in parts], order)

    def _batches(self, batch_tokens: int, shard: Shard) -> list[tuple[TokenBatch, dict[str, Tensor], Experts]]:
        packed = min(self.reading.context, int(self.model.cfg.n_ctx)) if self.reading.packed else None
        found = []
        for batch in batch_windows(shard.windows, self.model, batch_tokens=batch_tokens, packed=packed):
            layers: dict[int, LayerRouting] = {}
            kept: dict[str, Tensor] = {}
            experts: Experts = {}
            forward(self.model, batch, [*routing_hooks(self.model, layers), *_keep(self.points, batch, kept, experts)])
            if any(bool((routing.indices < 0).any()) for routing in layers.values()):
                raise InputError(
                    "tokens have different numbers of experts, as in `use_experts(mass=…)`: a shard has as many of each"
                )
            routing = {
                name: torch.stack([batch.unpack(getattr(layers[at], name)).cpu() for at in self.model.moe_layers], 2)
                for name in ("indices", "weights")
            }
            tensors = {
                **_about(batch),
                "indices": routing["indices"][batch.mask].to(torch.int16),
                "weights": _narrowed("weights", routing["weights"][batch.mask], self.dtype),
                **{name: _narrowed(name, value[batch.mask], self.dtype) for name, value in kept.items()},
            }
            for rows in experts.values():
                rows.update({name: _narrowed(name, value, self.dtype) for name, value in rows.items()})
            found.append((batch, tensors, experts))
        return found


def _narrowed(name: str, value: Shaped[Tensor, "*axes"], dtype: torch.dtype) -> Shaped[Tensor, "*axes"]:
    """A tensor in the dtype that it is saved in; truth values and whole numbers, such as ids, as they are.

    Raises:
        InputError: A number is too large for that.
    """
    if not value.is_floating_point():
        return value
    found, most = value.to(dtype), torch.finfo(dtype).max
    # Beyond the greatest number some dtypes have infinity, and some that number again.
    beyond = ~found.float().isfinite() | (value.abs() > most * (1 + torch.finfo(dtype).eps / 2))
    if bool((lost := value.isfinite() & beyond).any()):
        said = str(dtype).removeprefix("torch.")
        raise InputError(
            f"{name} reaches {float(value[lost].abs().max()):.4g}, and {said} holds {most:.4g} at "
            "most; choose bfloat16 or float32, and another folder"
        )
    return found


def _keep(points: Sequence[str], batch: TokenBatch, into: dict[str, Tensor], experts: Experts) -> Hooks:
    """Hooks that put activations into `into`, and the rows of single experts, of real tokens only, into `experts`."""
    read = batch.tokens.shape if batch.packing is None else batch.packing.tokens.shape
    number = torch.full(read, -1)  # of each token that is read among the real ones of the batch
    real = batch.mask.flatten().nonzero()[:, 0] if batch.packing is None else batch.packing.at[batch.mask]
    number.view(-1)[real] = torch.arange(len(real))

    def keep(value: Tensor, hook: Any, name: str) -> None:  # noqa: ARG001
        if value.shape[:2] != read:
            raise InputError(
                f"{name} has shape {tuple(value.shape)}; collect needs [batch, pos, …] = {tuple(read)} first"
            )
        into[name] = batch.unpack(value.detach()).cpu()

    def keep_rows(value: Tensor, hook: Any, name: str, at: tuple[int, int]) -> None:
        token = number[hook.ctx["batch"].cpu(), hook.ctx["pos"].cpu()]
        rows = {"token": token, "rank": hook.ctx["rank"].cpu(), name: value.detach().cpu()}
        experts.setdefault(at, {}).update({key: column[token >= 0] for key, column in rows.items()})

    hooks: Hooks = []
    for name in points:
        if (one := names.parse_expert(name)) is not None:
            hooks.append((name, lambda value, hook, name=name, at=one[:2]: keep_rows(value, hook, name, at)))
        else:
            hooks.append((name, lambda value, hook, name=name: keep(value, hook, name)))
    return hooks


def _in_order(parts: Sequence[tuple[int, Experts]], order: Int[Tensor, " token"]) -> dict[str, Tensor]:
    """The rows of single experts in all batches of a shard, in the order of its tokens.

    Args:
        parts: Of each batch, how many tokens it has, and the rows.
        order: The tokens of all batches, in the order of the shard.
    """
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    starts = torch.tensor([0, *(length for length, _ in parts)]).cumsum(0).tolist()
    found = {}
    for layer, expert in parts[0][1]:
        rows = [experts[layer, expert] for _, experts in parts]
        together = {name: torch.cat([one[name] for one in rows]) for name in rows[0]}
        token = torch.cat([place[one["token"] + start] for one, start in zip(rows, starts, strict=False)])
        by_token = token.argsort()
        together["token"] = token
        for name, value in together.items():
            key = rows_of(layer, expert, name) if name in ("token", "rank") else name
            found[key] = value[by_token]
    return found


def _about(batch: TokenBatch) -> dict[str, Tensor]:
    """The columns `PER_TOKEN`."""
    at, mask = token_places(batch), batch.mask
    return {
        "token": batch.tokens[mask],
        "document": at["document"][mask],
        "position": at["position"][mask],
        "counted": batch.counted[mask],
    }


def hook_points(model: Any, patterns: Sequence[str]) -> list[str]:
    """The names of hook points that match, each once, in the model's order; those of single experts last.

    A pattern finds hooks of single experts if it names experts (`.experts.`).

    Raises:
        InputError: A pattern matches none.
    """
    whole = [name for name in model.hook_dict if names.parse_expert(name) is None]
    single: list[str] = []
    if any(_EXPERTS in pattern for pattern in patterns):
        places = [(layer, expert) for layer in model.moe_layers for expert in range(model.n_experts)]
        single = [names.expert(hook.name, *at) for at in places for hook in names.EXPERT_HOOKS]
    found: set[str] = set()
    for pattern in patterns:
        matching = fnmatch.filter(single if _EXPERTS in pattern else whole, pattern)
        matching = [name for name in matching if _EXPERTS not in pattern or model.get_hook_point(name) is not None]
        if not matching:
            known = single if _EXPERTS in pattern else whole
            there = f"for example {names.block(names.RESID_MID, 0)}{near_miss(pattern, known)}"
            raise InputError(f"--hook {pattern!r}: no such hook point; {there}")
        silent = {name: why for name in matching if (why := _why_silent(model, name)) is not None}
        if len(silent) == len(matching):
            raise InputError(f"--hook {pattern!r}: {silent[matching[0]]}")
        found |= set(matching) - silent.keys()
    return [name for name in (*whole, *single) if name in found]


_EXPERTS = ".experts."


def _why_silent(model: Any, name: str) -> str | None:
    """Why a hook point never fires: TransformerLens has a switch for some."""
    try:
        model.check_hooks_to_add(model.get_hook_point(name), name, print)
    except ValueError as error:
        return str(error)
    return None


@torch.no_grad()
def bytes_per_token(model: Any, points: Sequence[str], dtype: torch.dtype) -> int:
    """What a token takes on disk, seen on a text of two tokens; of single experts, what it takes on average."""
    kept: dict[str, Tensor] = {}
    experts: Experts = {}
    one = TokenBatch(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2).bool(), torch.ones(1, 2).bool(), ("",))
    forward(model, one, _keep(points, one, kept, experts))
    routing = len(model.moe_layers) * model.top_k
    numbers = sum(value[0, 0].numel() for value in kept.values()) + routing
    rows = sum(value.shape[-1] for rows in experts.values() for value in rows.values() if value.ndim > 1)
    numbers += -(-rows * model.top_k // model.n_experts)
    return numbers * dtype.itemsize + routing * 2 + 8 * 3 + 1


def _passages(shard: Shard) -> dict[str, Any]:
    counts: dict[int, list[Any]] = {}
    for window in shard.windows:
        counts.setdefault(window.document, [window.source, 0])[1] += window.counted
    return {"documents": [[number, source, tokens] for number, (source, tokens) in counts.items()]}


def _assemble(folder: StudyFolder, stems: Sequence[str], bytes_in: Mapping[Any, int]) -> None:
    """Put all shards into the folder, with what is known of them and of where the model was."""
    if not stems:
        raise InputError("the texts hold no passage of two tokens or more")
    folder.there()
    notes = [folder.noted(stem) for stem in stems]
    counts: dict[tuple[str, int, str], int] = {}
    for note in notes:
        for number, source, tokens in note.pop("documents"):
            key = note["domain"], number, source
            counts[key] = counts.get(key, 0) + tokens
    scratch = folder.scratch()
    for note in notes:
        made = folder.unfinished / note["file"]
        try:
            (scratch / note["file"]).hardlink_to(made)
        except OSError:  # some file systems have no links
            shutil.copyfile(made, scratch / note["file"])
    documents = pd.DataFrame(
        [(*key, tokens) for key, tokens in counts.items()], columns=["domain", "document", "source", "tokens"]
    )
    documents.to_parquet(scratch / DOCUMENTS, index=False)
    whole = {"documents": file_digest(scratch / DOCUMENTS), "shards": notes}
    held = {str(place): bytes_ for place, bytes_ in bytes_in.items()}
    folder.finish(scratch, {"bytes_in": held, "versions": versions(), "command": shlex.join(sys.argv), **whole})
