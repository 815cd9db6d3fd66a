"""Sweeps: many interventions on one input, at the cost of what they change.

A sweep computes once what all its variants share. A variant starts at the block where it begins, from the residual
stream of the clean run; variants that begin at the same block are stacked into one batch; items of the batch that a
variant does not change are not run, nor are MLPs at positions before its first change; and logits are made only where
the metric reads them and where they can have changed.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from moe_lens import names
from moe_lens.errors import InputError, UnsupportedModelError
from moe_lens.interventions.metrics import Metric, TokenMetric, checked, describe, evaluate
from moe_lens.model.cache import MoECache
from moe_lens.model.replay import Replay, recording

HookFunction = Callable[[Tensor, HookPoint], Tensor | None]
Hooks = Sequence[tuple[str, HookFunction]]
RoutingMode = Literal["free", "frozen"]

TOKENS = {"cpu": 2**12, "cuda": 2**16}
"""Tokens of a batch of variants at most, by kind of device; fewer if memory does not suffice."""
LOGITS = 2**25
"""Logits that exist at a time at most."""


@dataclass(frozen=True, eq=False)
class CleanRun:
    """One forward pass, and what is needed to start again at any block of it."""

    replay: Replay
    cache: MoECache
    """Residual streams, routing, and whatever else was asked for; its `tokens` and `mask` are those of the run."""
    logits: Float[Tensor, "batch pos d_vocab"]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: Any,
        input: str | list[str] | Tensor,
        *,
        keep: Sequence[str] = (),
        fwd_hooks: Hooks = (),
        **kwargs: Any,
    ) -> "CleanRun":
        """Run a model.

        Args:
            model: A `HookedMoE`.
            input: Text, texts or tokens.
            keep: Full names of further hooks to cache.
            fwd_hooks: Hooks in place during the run, if the run that variants depart from is itself an edited one.
            kwargs: Of `forward`: `attention_mask`, `prepend_bos`, `padding_side`.

        Raises:
            UnsupportedModelError: the model's logits are not its final norm and unembedding alone.
        """
        n_layers = model.cfg.n_layers
        wanted = [names.block(names.RESID_PRE, layer) for layer in range(n_layers)]
        wanted += [names.block(names.RESID_POST, n_layers - 1)]
        wanted += [names.mlp(n, at) for at in model.moe_layers for n in (names.EXPERT_INDICES, names.ROUTING_WEIGHTS)]
        filtered = list(dict.fromkeys([*wanted, *keep]))
        with recording(model) as recorded, model.hooks(list(fwd_hooks)):
            logits, cache = model.run_with_cache(input, names_filter=filtered, use_cache=False, **kwargs)
        run = cls(recorded[0], cache, logits)
        again = run.replay.logits(run.resid[-1][:, -1].to(logits.device)).to(logits.device)
        if (again - logits[:, -1]).abs().max() > 0.02 * logits[:, -1].abs().max():
            raise UnsupportedModelError(
                f"{model.cfg.model_name} does more to its logits than a norm and an unembedding; sweeps cannot follow"
            )
        return run

    @property
    def batch(self) -> int:
        """Items."""
        return self.logits.shape[0]

    @property
    def pos(self) -> int:
        """Positions, padding included."""
        return self.logits.shape[1]

    @cached_property
    def resid(self) -> tuple[Float[Tensor, "batch pos d_model"], ...]:
        """The residual stream entering each block, and the one leaving the last."""
        n_layers = len(self.replay.arguments)
        entering = [self.cache[names.block(names.RESID_PRE, layer)] for layer in range(n_layers)]
        return (*entering, self.cache[names.block(names.RESID_POST, n_layers - 1)])

    @property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """True at real tokens."""
        mask = self.cache.mask
        device = self.logits.device
        if mask is None:
            return torch.ones(self.batch, self.pos, dtype=torch.bool, device=device)
        return mask.to(device)

    def indices(self, layer: int) -> Int[Tensor, "batch pos top_k"]:
        """Experts chosen in a layer, by rank."""
        return self.cache[names.mlp(names.EXPERT_INDICES, layer)]

    def weights(self, layer: int) -> Float[Tensor, "batch pos top_k"]:
        """Their routing weights."""
        return self.cache[names.mlp(names.ROUTING_WEIGHTS, layer)]


@dataclass(frozen=True, eq=False)
class Variant:
    """A run that departs from the clean one at some block."""

    layer: int
    """The first block that is run; `n_layers` for none, when only the stream leaving the last block differs."""
    resid: Callable[[Int[Tensor, " items"]], Float[Tensor, "items pos d_model"]] | None = None
    """From the items to the stream entering that block; the clean one if not given."""
    hooks: Hooks = ()
    """Hooks in that block or later ones. Each sees this variant's own part of the batch: the items that it changes."""
    changed: Bool[Tensor, "batch pos"] | None = None
    """Where the stream entering the block, or a hook's edit, may differ from the clean run; everywhere if not given.

    Later positions of the same item may change behind the first block. Items without any keep their clean result.
    """


@torch.no_grad()
def sweep(
    model: Any,
    run: CleanRun,
    variants: Sequence[Variant],
    metric: Metric,
    *,
    routing: RoutingMode = "free",
    batch_size: int | None = None,
) -> Float[Tensor, " variants"]:
    """The metric of every variant, as if each had been a forward pass of its own.

    Args:
        model: The `HookedMoE` that made the run.
        run: What the variants depart from.
        variants: The runs to make.
        metric: From logits [batch, pos, d_vocab] to a scalar; a `TokenMetric` saves most of the unembedding.
        routing: "free": routers choose again behind the change. "frozen": they keep the clean run's experts, in every
            layer that is run; the weights follow the router logits. A variant's own hooks come after that.
        batch_size: Greatest number of items to run at a time; found automatically if not given, and reduced when
            memory does not suffice. The items of one variant stay together.

    Returns:
        In float64, on the CPU, in the order of the variants.

    Raises:
        InputError: the metric is not a scalar or not a number; a layer or hook that the sweep does not run.
    """
    if isinstance(metric, TokenMetric):
        return token_sweep(model, run, variants, metric, routing=routing, batch_size=batch_size).mean(-1)
    found = torch.empty(len(variants), dtype=torch.float64)
    clean = evaluate(metric, run.logits).double().cpu()
    everything = torch.ones(run.batch, run.pos, dtype=torch.bool)

    def read(number: int, logits: Tensor, batch: Tensor, pos: Tensor) -> None:
        whole = run.logits.clone()
        whole[batch, pos] = logits.to(whole)
        found[number] = checked(metric(whole), metric).double().cpu()

    found[:] = clean
    _Sweep(model, run, variants, everything, routing).run(read, batch_size, whole=True)
    return found


@torch.no_grad()
def token_sweep(
    model: Any,
    run: CleanRun,
    variants: Sequence[Variant],
    metric: TokenMetric,
    *,
    routing: RoutingMode = "free",
    batch_size: int | None = None,
) -> Float[Tensor, "variants reads"]:
    """What `sweep` takes the mean of: the value at each position that is read, in order of (item, position)."""
    reads = metric.reads(run.batch, run.pos).cpu()
    batch, pos = reads.nonzero().unbind(-1)
    column = torch.zeros(run.batch, run.pos, dtype=torch.long)
    column[batch, pos] = torch.arange(len(batch))
    at = batch.to(run.logits.device), pos.to(run.logits.device)
    clean = metric.values(run.logits[at], *at).double().cpu()
    found = clean.expand(len(variants), -1).clone()

    def read(number: int, logits: Tensor, batch: Tensor, pos: Tensor) -> None:
        values = metric.values(logits, batch.to(logits.device), pos.to(logits.device))
        found[number, column[batch.cpu(), pos.cpu()]] = values.double().cpu()

    _Sweep(model, run, variants, reads, routing).run(read, batch_size)
    if found.isnan().any():
        bad = found.isnan().any(-1).nonzero()[0].item()
        raise InputError(f"the metric {describe(metric)} is not a number in variant {bad}; expected finite logits")
    return found


class _Sweep:
    """The state of a sweep: what is to be run, in which order, and how far it has come."""

    def __init__(
        self, model: Any, run: CleanRun, variants: Sequence[Variant], reads: Tensor, routing: RoutingMode
    ) -> None:
        if routing not in ("free", "frozen"):
            raise InputError(f'routing is {routing!r}; expected "free" or "frozen"')
        self.model, self.clean, self.variants, self.routing = model, run, variants, routing
        self.n_layers = model.cfg.n_layers
        self.device = run.logits.device
        self.reads = reads.to(self.device)
        listened = {name for name, point in model.hook_dict.items() if point.has_hooks()}
        self.foreign = {layer for layer in range(self.n_layers) if any(_inside(name, layer) for name in listened)}
        self.changed = [self._check(number, variant) for number, variant in enumerate(variants)]
        active = [number for number, changed in enumerate(self.changed) if changed.any()]
        self.queue = sorted(active, key=lambda number: variants[number].layer)
        self.done = 0

    def _check(self, number: int, variant: Variant) -> Bool[Tensor, "batch pos"]:
        if not 0 <= variant.layer <= self.n_layers:
            raise InputError(f"variant {number} starts at layer {variant.layer}; expected 0 to {self.n_layers}")
        for name, _ in variant.hooks:
            if not any(_inside(name, layer) for layer in range(variant.layer, self.n_layers)):
                raise InputError(
                    f"variant {number} has a hook on {name}, which it does not run; expected hooks of "
                    f"blocks.{variant.layer} to blocks.{self.n_layers - 1}"
                )
        shape = (self.clean.batch, self.clean.pos)
        changed = torch.ones(shape, dtype=torch.bool) if variant.changed is None else variant.changed
        if tuple(changed.shape) != shape:
            raise InputError(f"variant {number} has changes of shape {tuple(changed.shape)}; expected {shape}")
        changed = changed.to(self.device)
        reached = changed if variant.layer == self.n_layers else changed.cumsum(1) > 0
        return changed & (reached & self.reads).any(1, keepdim=True)  # items where nothing changes that is read

    def run(self, read: Callable[[int, Tensor, Tensor, Tensor], None], batch_size: int | None, whole: bool = False):
        """Run everything and hand on the logits: variant, rows of logits, their item and position."""
        from accelerate.utils import find_executable_batch_size
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        size = (
            max(1, TOKENS.get(self.device.type, TOKENS["cuda"]) // self.clean.pos) if batch_size is None else batch_size
        )
        if size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1")
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("sweep", total=len(self.queue))

            @find_executable_batch_size(starting_batch_size=size)
            def rest(batch_size: int) -> None:
                while self.done < len(self.queue):
                    numbers = self._next(batch_size)
                    self._chunk(numbers, read, whole)
                    self.done += len(numbers)
                    progress.update(bar, completed=self.done)

            rest()

    def _next(self, batch_size: int) -> list[int]:
        """The next variants: of one layer, and no more than `batch_size` items but for a single one that has more."""
        taken: list[int] = []
        items = 0
        for number in itertools.islice(self.queue, self.done, None):
            items += int(self.changed[number].any(1).sum())
            if taken and (items > batch_size or self.variants[number].layer != self.variants[taken[0]].layer):
                break
            taken.append(number)
        return taken

    def _chunk(self, numbers: list[int], read: Callable[[int, Tensor, Tensor, Tensor], None], whole: bool) -> None:
        """Run some variants of one layer, one behind the other along the batch."""
        clean, layer = self.clean, self.variants[numbers[0]].layer
        of_each = [self.changed[number].any(1).nonzero()[:, 0] for number in numbers]
        items = torch.cat(of_each)
        ends = torch.tensor([len(part) for part in of_each]).cumsum(0).tolist()
        slices = {number: slice(end - len(part), end) for number, end, part in zip(numbers, ends, of_each, strict=True)}
        changed = torch.cat([self.changed[number][part] for number, part in zip(numbers, of_each, strict=True)])
        streams = []
        for number, part in zip(numbers, of_each, strict=True):
            make = self.variants[number].resid
            streams.append(clean.resid[layer][part] if make is None else make(part).to(clean.resid[layer]))
        resid = torch.cat(streams)
        needed = self.reads[items]
        with _Stacked(self, numbers, slices, items) as stacked:
            for at in range(layer, self.n_layers):
                changed = changed.cumsum(1) > 0  # attention carries a change to all later positions
                only = changed & needed if at == self.n_layers - 1 else changed
                stacked.only = only = None if at in stacked.heard or at in self.foreign or only.all() else only
                if only is not None and not only.any():
                    return
                resid = clean.replay.block(at, resid, items, only)
                if only is not None and at < self.n_layers - 1:
                    resid = torch.where(only[..., None], resid, clean.resid[at + 1][items].to(resid))
        self._read(numbers, slices, items, resid, changed & needed, read, whole)

    def _read(
        self,
        numbers: list[int],
        slices: dict[int, slice],
        items: Tensor,
        resid: Tensor,
        rows: Tensor,
        read: Callable[[int, Tensor, Tensor, Tensor], None],
        whole: bool,
    ) -> None:
        at_once = max(1, LOGITS // self.clean.logits.shape[-1])
        for number in numbers:
            part = slices[number]
            row, pos = rows[part].nonzero().unbind(-1)
            batch, states = items[part][row], resid[part][row, pos]
            if whole:
                read(number, torch.cat([self.clean.replay.logits(s) for s in states.split(at_once)]), batch, pos)
                continue
            for some in torch.arange(len(row), device=row.device).split(at_once):
                if len(some):
                    read(number, self.clean.replay.logits(states[some]), batch[some], pos[some])


def _inside(name: str, layer: int) -> bool:
    return name.startswith(f"blocks.{layer}.")


class _Stacked:
    """The hooks of stacked variants, each shown its own part of the batch; in place between enter and exit."""

    def __init__(self, sweep: _Sweep, numbers: list[int], slices: dict[int, slice], items: Tensor) -> None:
        self.sweep, self.slices, self.items = sweep, slices, items
        self.only: Tensor | None = None
        """Tokens that the MLP of the present layer computes, when not all."""
        named = [(name, number, fn) for number in numbers for name, fn in sweep.variants[number].hooks]
        layers = range(sweep.variants[numbers[0]].layer, sweep.n_layers)
        self.heard = {layer for layer in layers if any(_inside(name, layer) for name, *_ in named)}
        hooks: list[tuple[str, Any]] = []
        if sweep.routing == "frozen":
            frozen = [layer for layer in layers if layer in sweep.model.moe_layers]
            hooks += [(names.mlp(names.EXPERT_INDICES, layer), self._frozen(layer)) for layer in frozen]
        for name in dict.fromkeys(name for name, *_ in named):
            hooks.append((name, self._dispatch(name, [(number, fn) for at, number, fn in named if at == name])))
        self.context = sweep.model.hooks(hooks)

    def __enter__(self) -> "_Stacked":
        self.context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)

    def _frozen(self, layer: int) -> Any:
        def force(indices: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001
            clean = self.sweep.clean.indices(layer)[self.items.to(indices.device)]
            return clean if self.only is None else clean[self.only.to(indices.device)][None]

        return force

    def _dispatch(self, name: str, functions: list[tuple[int, HookFunction]]) -> Any:
        ragged = names.parse_expert(name) is not None

        def each(value: Tensor, hook: HookPoint) -> Tensor:
            whole = value.clone()
            for number, function in functions:
                part = self.slices[number]
                where = _rows_of(part, hook) if ragged else part
                own = whole[where].clone()
                with _counted(hook, part) if ragged else nullcontext():
                    seen = function(own, hook)
                whole[where] = own if seen is None else seen.to(own)
            return whole

        return each


def _rows_of(part: slice, hook: HookPoint) -> Bool[Tensor, " rows"]:
    """Which rows of one expert belong to a part of the batch."""
    return (hook.ctx["batch"] >= part.start) & (hook.ctx["batch"] < part.stop)


@contextmanager
def _counted(hook: HookPoint, part: slice) -> Iterator[None]:
    """Let `hook.ctx` describe the rows of a part of the batch alone, counting from its first item."""
    whole, mine = dict(hook.ctx), _rows_of(part, hook)
    hook.ctx.update(batch=whole["batch"][mine] - part.start, pos=whole["pos"][mine], rank=whole["rank"][mine])
    try:
        yield
    finally:
        hook.ctx.update(whole)
