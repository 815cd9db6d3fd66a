"""Blocks run again: what one forward pass gave each block besides the residual stream, kept for other streams.

Masks, positions and rotary tables are those that the model itself made, whatever the family, the padding or the
window; nothing is rebuilt. Blocks before the first one of interest are not run at all (TransformerLens's
`start_at_layer` runs them and throws the result away).
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe_lens.model.hooks.hook_scope import ModuleHooks
from moe_lens.model.hooks.interrupts import uninterrupted
from moe_lens.model.hooks.restarts import check_one_stream, check_reads


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
        with nullcontext() if only is None or mlp is None else _Only(self.model, mlp, only):
            out = block(resid, *self._of(items, args), **self._of(items, kwargs))
        return out[0] if isinstance(out, tuple) else out

    def takes_some(self, layer: int) -> bool:
        """Whether a block's MLP can be run for some tokens alone.

        Not where its router stands outside, or where a convolution reads what it gives earlier tokens (Inkling).
        """
        parts = self.model.blocks[layer]._modules
        behind = parts.get("ln2_post")
        mixes = behind is not None and any(isinstance(part, nn.Conv1d) for part in behind.modules())
        return not mixes and not getattr(parts.get("mlp"), "flat", False)

    def logits(self, resid: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_vocab"]:
        """Logits of rows of the residual stream that leaves the last block."""
        # Rows of a larger tensor would be multiplied one by one by what torch does with strides in bfloat16.
        logits = self.model.unembed(self.model.ln_final(resid.contiguous()[None]))[0]
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


class Recording(ModuleHooks):
    """Records the forward pass that is made inside `with Recording(model) as recorded`.

    Raises:
        InputError: a layer reads more of earlier layers than the residual stream; see `restarts`.
        UnsupportedModelError: likewise.
    """

    __slots__ = ("_seen", "entering", "model")

    def __init__(self, model: Any):
        check_one_stream(model.family)
        super().__init__(model, "a recorded pass")
        self.model = model
        self.entering: dict[int, Tensor] = {}
        """By layer, what enters the block: before hooks at its `hook_resid_pre`, which a replay runs again."""
        self._seen: dict[int, tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = {}

    @uninterrupted
    def __enter__(self) -> "Recording":
        super().__enter__()
        for layer, block in enumerate(self.model.blocks):
            self.before(block, partial(Recording._note, layer=layer))
        return self

    def _note(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        check_reads(block, layer, stream.shape[1])
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        self._seen[layer] = tuple(stream.shape), args[1:], rest
        self.entering[layer] = stream.detach().clone()

    @property
    def replay(self) -> Replay:
        """The pass, once it has been made."""
        seen = [self._seen[layer] for layer in range(len(self.model.blocks))]
        batch, pos = seen[-1][0][:2]
        return Replay(self.model, batch, pos, tuple((args, kwargs) for _, args, kwargs in seen))


class _Only(ModuleHooks):
    """Lets an MLP or MoE layer compute some tokens alone, as one row; it adds nothing to the others."""

    __slots__ = ("_mlp", "_tokens")

    def __init__(self, model: Any, mlp: nn.Module, tokens: Bool[Tensor, "rows pos"]):
        super().__init__(model, "a pass of some tokens")
        self._mlp, self._tokens = mlp, tokens

    @uninterrupted
    def __enter__(self) -> "_Only":
        super().__enter__()
        self.before(self._mlp, _Only._gather)
        self.after(self._mlp, _Only._scatter)
        return self

    def _part(self, hidden: Tensor) -> Tensor:
        return hidden[self._tokens.to(hidden.device)][None]

    def _gather(self, mlp: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:  # noqa: ARG002
        if args:
            return (self._part(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._part(kwargs["hidden_states"])}

    def _scatter(self, mlp: nn.Module, args: Any, out: Any) -> Any:  # noqa: ARG002
        first = out[0] if isinstance(out, tuple) else out
        whole = first.new_zeros(*self._tokens.shape, first.shape[-1])
        whole[self._tokens.to(whole.device)] = first[0]
        return (whole, *out[1:]) if isinstance(out, tuple) else whole
