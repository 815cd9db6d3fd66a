"""Variants side by side along the batch: whose rows are whose, and hooks that each see their own."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from moe_lens import names
from moe_lens.interventions.clean_run import CleanRun, HookFunction, Variant

RoutingMode = Literal["free", "frozen"]


class Stack:
    """Variants that begin at the same block, and the items that each of them changes."""

    def __init__(self, run: CleanRun, variants: Sequence[Variant], changed: Sequence[Bool[Tensor, "batch pos"]]):
        self.run, self.variants = run, variants
        of_each = [rows.any(1).nonzero()[:, 0] for rows in changed]
        starts = [0, *torch.tensor([len(part) for part in of_each]).cumsum(0).tolist()]
        self.parts = [slice(start, end) for start, end in zip(starts, starts[1:], strict=False)]
        """The rows of each variant."""
        self.items: Int[Tensor, " rows"] = torch.cat(of_each)
        """Item of the clean run's batch that each row stands for."""
        self.changed: Bool[Tensor, "rows pos"] = torch.cat([c[p] for c, p in zip(changed, of_each, strict=True)])
        self.first = variants[0].layer
        self.hooked_layers = {
            layer for layer in self._layers if any(inside(n, layer) for v in variants for n, _ in v.hooks)
        }
        """Layers in which a variant has hooks."""
        self.only: Bool[Tensor, "rows pos"] | None = None
        """The tokens that the MLP computes in the block that is now run; None for all."""

    @property
    def _layers(self) -> range:
        return range(self.first, len(self.run.resid) - 1)

    def resid(self) -> Float[Tensor, "rows pos d_model"]:
        """The residual stream entering the first block."""
        streams = []
        for variant, part in zip(self.variants, self.parts, strict=True):
            clean = self.run.stream(self.first, self.items[part])
            streams.append(clean if variant.resid is None else variant.resid(self.items[part]).to(clean))
        return torch.cat(streams)

    @contextmanager
    def hooks(self, model: Any, routing: RoutingMode) -> Generator[None]:
        """The variants' hooks in place, behind those that freeze the routing."""
        added: list[tuple[str, Any]] = []
        if routing == "frozen":
            frozen = [layer for layer in self._layers if layer in model.moe_layers]
            added += [(names.mlp(names.EXPERT_INDICES, layer), self._frozen(layer)) for layer in frozen]
        functions_at: dict[str, list[tuple[slice, HookFunction]]] = {}
        for variant, part in zip(self.variants, self.parts, strict=True):
            for name, function in variant.hooks:
                functions_at.setdefault(name, []).append((part, function))
        added += [(name, _dispatch(name, functions)) for name, functions in functions_at.items()]
        with model.hooks(added):
            yield

    def _frozen(self, layer: int) -> Any:
        def force(indices: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001
            clean = self.run.indices(layer).to(indices.device)[self.items.to(indices.device)]
            return clean if self.only is None else clean[self.only.to(indices.device)][None]

        return force


def inside(name: str, layer: int) -> bool:
    """Whether a hook stands in a block."""
    return name.startswith(f"blocks.{layer}.")


def _dispatch(name: str, functions: Sequence[tuple[slice, HookFunction]]) -> Any:
    """One hook for all variants: each function gets a copy of its own rows, which it may change in place."""
    ragged = names.parse_expert(name) is not None

    def each(value: Tensor, hook: HookPoint) -> Tensor:
        whole = value.clone()
        for part, function in functions:
            where = _rows(part, hook) if ragged else part
            own = whole[where].clone()
            with _counted(part, hook) if ragged else nullcontext():
                seen = function(own, hook)
            whole[where] = own if seen is None else seen.to(own)
        return whole

    return each


def _rows(part: slice, hook: HookPoint) -> Bool[Tensor, " rows"]:
    """Which rows of a single expert belong to a part of the batch."""
    return (hook.ctx["batch"] >= part.start) & (hook.ctx["batch"] < part.stop)


@contextmanager
def _counted(part: slice, hook: HookPoint) -> Generator[None]:
    """Let `hook.ctx` describe the rows of a part of the batch alone, counting from its first item."""
    whole, mine = dict(hook.ctx), _rows(part, hook)
    hook.ctx.update(batch=whole["batch"][mine] - part.start, pos=whole["pos"][mine], rank=whole["rank"][mine])
    try:
        yield
    finally:
        hook.ctx.update(whole)
