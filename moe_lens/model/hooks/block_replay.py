"""Blocks run again: what one forward pass gave each block besides the residual stream, kept for other streams.

Masks, positions and rotary tables are those that the model itself made, whatever the family, the padding or the
window; nothing is rebuilt. Blocks before the first one of interest are not run at all (TransformerLens's
`start_at_layer` runs them and throws the result away).
"""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Replay:
    """Arguments of every block in one forward pass."""

    model: Any
    batch: int
    """Items of that pass."""
    pos: int
    """Positions of that pass."""
    arguments: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    """Of each block, positional and by keyword, without the residual stream."""

    def block(
        self,
        layer: int,
        resid: Float[Tensor, "rows pos d_model"],
        items: Int[Tensor, " rows"],
        only: Bool[Tensor, "rows pos"] | None = None,
    ) -> Float[Tensor, "rows pos d_model"]:
        """The residual stream leaving a block which `resid` enters.

        Args:
            layer: the block.
            resid: the stream entering it.
            items: which item of the recorded pass each row stands for: whose mask and positions it gets.
            only: tokens whose MLP is computed, where `takes_some`; at the others the result lacks what the MLP adds.
                Hooks inside that MLP would see these tokens as one row.
        """
        args, kwargs = self.arguments[layer]
        block = self.model.blocks[layer]
        mlp = block._modules.get("mlp")  # none in a layer that only mixes positions
        with nullcontext() if only is None or mlp is None else _only(mlp, only):
            out = block(resid, *self._of(items, args), **self._of(items, kwargs))
        return out[0] if isinstance(out, tuple) else out

    def takes_some(self, layer: int) -> bool:
        """Whether a block's MLP can be run for some tokens alone: not where its router stands outside."""
        return not getattr(self.model.blocks[layer]._modules.get("mlp"), "flat", False)

    def logits(self, resid: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_vocab"]:
        """Logits of rows of the residual stream that leaves the last block."""
        logits = self.model.unembed(self.model.ln_final(resid[None]))[0]
        return self.model.adapter.apply_output_logits_transform(logits)

    def _of(self, items: Tensor, value: Any) -> Any:
        """What belongs to some items; what has no batch axis, or one of length 1, goes with all of them."""
        if isinstance(value, dict):
            return {key: self._of(items, part) for key, part in value.items()}
        if isinstance(value, tuple):
            return tuple(self._of(items, part) for part in value)
        if not isinstance(value, Tensor) or value.ndim < 2 or self.batch == 1 or len(value) != self.batch:
            return value
        if value.ndim == 2 and value.shape[1] != self.pos:
            return value
        return value.index_select(0, items.to(value.device))


@contextmanager
def recording(model: Any) -> Generator[list[Replay]]:
    """Record the forward pass made inside: the list holds its `Replay` afterwards."""
    seen: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    shape: list[int] = []

    def note(layer: int) -> Any:
        def pre(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
            stream = args[0] if args else kwargs["hidden_states"]
            shape[:] = stream.shape[:2]
            seen[layer] = args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}

        return pre

    handles = []
    recorded: list[Replay] = []
    try:
        for layer, block in enumerate(model.blocks):
            handles.append(block.register_forward_pre_hook(note(layer), with_kwargs=True))
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
    recorded.append(Replay(model, shape[0], shape[1], tuple(seen[layer] for layer in range(len(model.blocks)))))


@contextmanager
def _only(mlp: nn.Module, tokens: Bool[Tensor, "rows pos"]) -> Generator[None]:
    """Let an MLP or MoE layer compute some tokens alone, as one row; it adds nothing to the others."""

    def part(hidden: Tensor) -> Tensor:
        return hidden[tokens.to(hidden.device)][None]

    def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:  # noqa: ARG001
        if args:
            return (part(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": part(kwargs["hidden_states"])}

    def scatter(module: nn.Module, args: Any, out: Any) -> Any:  # noqa: ARG001
        first = out[0] if isinstance(out, tuple) else out
        whole = first.new_zeros(*tokens.shape, first.shape[-1])
        whole[tokens.to(whole.device)] = first[0]
        return (whole, *out[1:]) if isinstance(out, tuple) else whole

    before = mlp.register_forward_pre_hook(gather, with_kwargs=True)
    try:
        after = mlp.register_forward_hook(scatter)
        try:
            yield
        finally:
            after.remove()
    finally:
        before.remove()
