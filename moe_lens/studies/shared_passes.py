"""Several versions of a model in one pass: each has its own rows of the batch.

Where a model's parameters are read from disk in every pass, a pass costs the reading, whatever its batch: so versions
share it. Elsewhere they run one after another, with less memory and the very numbers of a version run alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.data import TokenBatch
from moe_lens.data.packing import Packing
from moe_lens.model.loading.batch_sizes import tokens_at_once, wants_few_passes
from moe_lens.studies.forward_passes import Hooks, input_device, losses

Version = Callable[[slice], Hooks]
"""From the rows of the pass that are its own to hooks that see those rows alone."""


def versions_losses(model: Any, batch: TokenBatch, versions: Sequence[Version]) -> list[Float[Tensor, "batch pos"]]:
    """Nats of every token in each version.

    Args:
        model: A `HookedMoE`.
        batch: What each of them reads.
        versions: What is done to each.
    """
    read = batch.tokens if batch.packing is None else batch.packing.tokens
    together = wants_few_passes(model)
    at_once = max(1, tokens_at_once(model, input_device(model)) // max(1, read.numel())) if together else 1
    found: list[Tensor] = []
    for first in range(0, len(versions), at_once):
        some = versions[first : first + at_once]
        if len(some) == 1:
            found.append(losses(model, batch, some[0](slice(None))))
            continue
        rows = [slice(i * len(read), (i + 1) * len(read)) for i in range(len(some))]
        hooks = _of_own_rows([(own, version(own)) for own, version in zip(rows, some, strict=True)])
        found += losses(model, repeated(batch, len(some)), hooks).split(len(batch.tokens))
    return found


def repeated(batch: TokenBatch, times: int) -> TokenBatch:
    """The same rows again and again."""
    packing = batch.packing
    if packing is not None:
        shifts = torch.arange(times).repeat_interleave(len(packing.at)) * packing.tokens.numel()
        packing = Packing(
            packing.tokens.repeat(times, 1),
            packing.positions.repeat(times, 1),
            packing.at.repeat(times, 1) + shifts[:, None],
        )
    return replace(
        batch,
        tokens=batch.tokens.repeat(times, 1),
        mask=batch.mask.repeat(times, 1),
        counted=batch.counted.repeat(times, 1),
        sources=batch.sources * times,
        windows=batch.windows * times,
        packing=packing,
    )


def _of_own_rows(parts: Sequence[tuple[slice, Hooks]]) -> Hooks:
    """One hook for each name, in which every version's function is given its own rows."""
    by_name: dict[Any, list[tuple[slice, Callable[..., Tensor | None]]]] = {}
    for rows, hooks in parts:
        for name, function in hooks:
            by_name.setdefault(name, []).append((rows, function))

    def hook(functions: list[tuple[slice, Callable[..., Tensor | None]]]) -> Callable[..., Tensor]:
        def each(value: Tensor, hook: Any) -> Tensor:
            whole = value.clone()
            for rows, function in functions:
                edited = function(whole[rows], hook)
                if edited is not None:
                    whole[rows] = edited
            return whole

        return each

    return [(name, hook(functions)) for name, functions in by_name.items()]
