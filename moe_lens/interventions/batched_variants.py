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
    """Variants that begin at the same block, and the items that each of them changes.

    Args:
        run: What they depart from.
        variants: Some of them.
        changed: Where each of them changes something.
        whole: Whether the items that a variant does not change are run with the others.
    """

    def __init__(
        self,
        run: CleanRun,
        variants: Sequence[Variant],
        changed: Sequence[Bool[Tensor, "batch pos"]],
        whole: bool = False,
    ):
        self.run, self.variants = run, variants
        own = [rows.any(1).nonzero()[:, 0] for rows in changed]
        if whole:
            changed = [torch.ones_like(rows) for rows in changed]
        of_each = [rows.any(1).nonzero()[:, 0] for rows in changed]
        starts = [0, *torch.tensor([len(part) for part in of_each]).cumsum(0).tolist()]
        self.parts = [slice(start, end) for start, end in zip(starts, starts[1:], strict=False)]
        """The rows of each variant."""
        self.own = [
            torch.isin(items, mine).nonzero()[:, 0] + part.start
            for items, mine, part in zip(of_each, own, self.parts, strict=True)
        ]
        """Those that its hooks see: of the items that it changes."""
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
        for variant, part, own in zip(self.variants, self.parts, self.own, strict=True):
            stream = self.run.stream(self.first, self.items[part])
            if variant.resid is not None:
                rows = (own - part.start).to(stream.device)
                stream = stream.index_copy(0, rows, variant.resid(self.items[own]).to(stream))
            streams.append(stream)
        return torch.cat(streams)

    @contextmanager
    def hooks(self, model: Any, routing: RoutingMode) -> Generator[None]:
        """The variants' hooks in place, behind those that freeze the routing."""
        added: list[tuple[str, Any]] = []
        if routing == "frozen":
            frozen = [layer for layer in self._layers if layer in model.moe_layers]
            added += [(names.mlp(names.EXPERT_INDICES, layer), self._frozen(layer)) for layer in frozen]
        functions_at: dict[str, list[tuple[Tensor, HookFunction]]] = {}
        for variant, own in zip(self.variants, self.own, strict=True):
            for name, function in variant.hooks:
                functions_at.setdefault(name, []).append((own, function))
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


def _dispatch(name: str, functions: Sequence[tuple[Tensor, HookFunction]]) -> Any:
    """One hook for all variants: each function gets a copy of its own rows, which it may change in place."""
    ragged = names.parse_expert(name) is not None

    def each(value: Tensor, hook: HookPoint) -> Tensor:
        whole = value.clone()
        for rows, function in functions:
            items = rows.to(value.device)
            where = torch.isin(hook.ctx["batch"], items) if ragged else items
            own = whole[where]
            with _counted(items, where, hook) if ragged else nullcontext():
                seen = function(own, hook)
            whole[where] = own if seen is None else seen.to(own)
        return whole

    return each


@contextmanager
def _counted(items: Int[Tensor, " own"], mine: Bool[Tensor, " tokens"], hook: HookPoint) -> Generator[None]:
    """Let `hook.ctx` of a single expert describe the tokens of some items alone, counting from the first of these."""
    whole = dict(hook.ctx)
    batch = torch.searchsorted(items, whole["batch"][mine])
    hook.ctx.update(batch=batch, pos=whole["pos"][mine], rank=whole["rank"][mine])
    try:
        yield
    finally:
        hook.ctx.update(whole)
