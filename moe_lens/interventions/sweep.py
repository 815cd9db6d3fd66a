"""Sweeps: many interventions on one input, at the cost of what they change.

A sweep computes once what all its variants share. A variant starts at the block where it begins, from the residual
stream of the clean run; variants that begin at the same block are stacked into one batch; items of the batch that a
variant does not change are not run, nor are MLPs at positions before its first change; and logits are made only where
the metric reads them and where they can have changed.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moe_lens.checked import AnyModel, Positive
from moe_lens.errors import InputError
from moe_lens.interventions.batched_variants import RoutingMode, Stack, inside
from moe_lens.interventions.clean_run import CleanRun, Variant, check_even_slots
from moe_lens.interventions.metrics import Metric, TokenMetric, among, describe, evaluate, finite
from moe_lens.model.hooks.edits import hooked_by_hand
from moe_lens.model.loading.batch_sizes import tokens_at_once

__all__ = ["CleanRun", "RoutingMode", "Variant", "sweep", "token_sweep"]

LOGITS = 2**25
"""Logits that exist at a time at most."""

Read = Callable[[int, Tensor, Tensor, Tensor], None]
"""Takes a variant's number, rows of its logits [rows, d_vocab], and the item and the position of each."""


@torch.no_grad()
def sweep(
    model: AnyModel,
    run: CleanRun,
    variants: Sequence[Variant],
    metric: Metric,
    *,
    routing: RoutingMode = "free",
    batch_size: Positive | None = None,
) -> Float[Tensor, " variants"]:
    """The metric of every variant, as if each had been a forward pass of its own.

    Hooks that are on the model already, as inside of `with model.ablate(…)`, act on variants too. Where some are no
    intervention's and no cache's, each variant is run by itself, with the whole batch: they may look at several items.

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
        InputError: the metric is not a scalar or not a finite number; a layer or hook that the sweep does not run;
            frozen routing where tokens have different numbers of experts.
    """
    metric = among(metric, run.cache.mask)
    if isinstance(metric, TokenMetric):
        return token_sweep(model, run, variants, metric, routing=routing, batch_size=batch_size).mean(-1)
    clean = evaluate(metric, run.logits).double().cpu()
    found = clean.expand(len(variants)).clone()

    def read(number: int, logits: Tensor, batch: Tensor, pos: Tensor) -> None:
        whole = run.logits.clone()
        whole[batch, pos] = logits.to(whole)
        found[number] = finite(metric(whole), metric).double().cpu()

    everything = torch.ones(run.batch, run.pos, dtype=torch.bool)
    _Sweep(model, run, variants, everything, routing, at_once=None).run(read, batch_size)
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
    """What `sweep` takes the mean of: the value at each position that is read, in order of (item, position).

    Raises:
        InputError: a value is not a finite number; otherwise as `sweep`.
    """
    reads = metric.reads(run.batch, run.pos).to(run.logits.device)
    batch, pos = reads.nonzero().unbind(-1)
    column = torch.zeros_like(reads, dtype=torch.long)
    column[batch, pos] = torch.arange(len(batch), device=batch.device)
    clean = metric.values(run.logits[batch, pos], batch, pos).double().cpu()
    found = clean.expand(len(variants), -1).clone()

    def read(number: int, logits: Tensor, batch: Tensor, pos: Tensor) -> None:
        found[number, column[batch, pos].cpu()] = metric.values(logits, batch, pos).double().cpu()

    at_once = max(1, LOGITS // run.logits.shape[-1])
    _Sweep(model, run, variants, reads, routing, at_once).run(read, batch_size)
    bad = (~found.isfinite()).nonzero()
    if len(bad):
        number, which = bad[0].tolist()
        raise InputError(
            f"the metric {describe(metric)} is {found[number, which].item()} in variant {number} at (item, position) "
            f"{tuple(reads.nonzero()[which].tolist())}; expected finite numbers"
        )
    return found


class _Sweep:
    """What is to be run, in which order, and how far it has come."""

    def __init__(
        self,
        model: Any,
        run: CleanRun,
        variants: Sequence[Variant],
        reads: Bool[Tensor, "batch pos"],
        routing: RoutingMode,
        at_once: int | None,
    ) -> None:
        self.model, self.clean, self.variants, self.at_once = model, run, variants, at_once
        self.routing: RoutingMode = routing
        self.n_layers = model.cfg.n_layers
        for layer in model.moe_layers if routing == "frozen" else ():
            check_even_slots([run.indices(layer)], "frozen routing")
        self.reads = reads.to(run.logits.device)
        listened = [name for name, point in model.hook_dict.items() if point.has_hooks()]
        self.alone = hooked_by_hand(model)
        """Whether each variant is run by itself, with all items."""
        self.foreign = {layer for layer in range(self.n_layers) if any(inside(name, layer) for name in listened)}
        self.changed = [self._check(number, variant) for number, variant in enumerate(variants)]
        self.queue = [number for number in range(len(variants)) if self._counts(number)]
        self.queue.sort(key=lambda number: variants[number].layer)
        self.done = 0

    def _check(self, number: int, variant: Variant) -> Bool[Tensor, "batch pos"]:
        if not 0 <= variant.layer <= self.n_layers:
            raise InputError(f"variant {number} starts at layer {variant.layer}; expected 0 to {self.n_layers}")
        for name, _ in variant.hooks:
            if not any(inside(name, layer) for layer in range(variant.layer, self.n_layers)):
                raise InputError(
                    f"variant {number} has a hook on {name}, which it does not run; expected hooks of "
                    f"blocks.{variant.layer} to blocks.{self.n_layers - 1}"
                )
        shape = tuple(self.reads.shape)
        if variant.changed is None:
            return torch.ones(shape, dtype=torch.bool, device=self.reads.device)
        if tuple(variant.changed.shape) != shape:
            raise InputError(f"variant {number} has changes of shape {tuple(variant.changed.shape)}; expected {shape}")
        return variant.changed.to(self.reads.device)

    def _counts(self, number: int) -> bool:
        """Whether anything that the metric reads can change."""
        changed = self.changed[number]
        reached = changed if self.variants[number].layer == self.n_layers else changed.cumsum(1) > 0
        if self.alone and bool(changed.any()):
            reached = torch.ones_like(changed)
        return bool((reached & self.reads).any())

    def run(self, read: Read, batch_size: int | None) -> None:
        """Run everything, handing on the logits that are read."""
        from accelerate.utils.memory import find_executable_batch_size, should_reduce_batch_size
        from rich.console import Console
        from rich.progress import Progress

        tokens = tokens_at_once(self.model, self.reads.device)
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("sweep", total=len(self.queue))

            def rest(batch_size: int) -> None:
                while self.done < len(self.queue):
                    numbers = self._next(batch_size)
                    self._run(numbers, read)
                    self.done += len(numbers)
                    progress.update(bar, completed=self.done)

            start = batch_size or max(1, tokens // self.clean.pos)
            try:
                rest(start)
                return
            except Exception as error:
                if start == 1 or not should_reduce_batch_size(error):
                    raise
            # Only now: it collects garbage before it begins, which takes longer than a small sweep.
            smaller: Any = find_executable_batch_size(rest, starting_batch_size=start // 2)
            smaller()

    def _next(self, batch_size: int) -> list[int]:
        """The next variants: of one layer, and no more than `batch_size` items but for a single one that has more."""
        taken: list[int] = []
        items = 0
        for number in itertools.islice(self.queue, self.done, None):
            items += int(self.changed[number].any(1).sum())
            other = taken and self.variants[number].layer != self.variants[taken[0]].layer
            if taken and (self.alone or other or items > batch_size):
                break
            taken.append(number)
        return taken

    def _run(self, numbers: list[int], read: Read) -> None:
        """Run some variants of one layer, one behind the other along the batch."""
        variants, changes = [self.variants[n] for n in numbers], [self.changed[n] for n in numbers]
        stack = Stack(self.clean, variants, changes, self.alone)
        needed, changed, resid = self.reads[stack.items], stack.changed, stack.resid()
        with stack.hooks(self.model, self.routing):
            for layer in range(stack.first, self.n_layers):
                last = layer == self.n_layers - 1
                changed = changed.cumsum(1) > 0  # attention carries a change to all later positions
                only = changed & needed if last else changed
                whole = only.all() or layer in stack.hooked_layers | self.foreign
                stack.only = None if whole or not self.clean.replay.takes_some(layer) else only
                resid = self.clean.replay.block(layer, resid, stack.items, stack.only)
                if stack.only is not None and not last:
                    clean = self.clean.stream(layer + 1, stack.items).to(resid)
                    resid = torch.where(only.to(resid.device)[..., None], resid, clean)
        for number, part in zip(numbers, stack.parts, strict=True):
            row, pos = (changed & needed)[part].nonzero().unbind(-1)
            batch, states = stack.items[part][row], resid[part][row, pos]
            for some in torch.arange(len(row), device=row.device).split(self.at_once or max(1, len(row))):
                if len(some):
                    read(number, self.clean.replay.logits(states[some]), batch[some], pos[some])
