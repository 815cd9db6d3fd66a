"""Statistics of a live model: hooks that hand on activations while the model runs, so that no cache is kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from moe_lens import names
from moe_lens.checked import AnyModel
from moe_lens.errors import InputError
from moe_lens.model.loading import dispatch
from moe_lens.model.loading.batch_sizes import rows_at_once
from moe_lens.model.random_numbers import nothing_drawn
from moe_lens.protocols import HookedModel
from moe_lens.routing import LayerRouting, Routing, affinity
from moe_lens.stats.routed_batch import RoutedBatch

Hooks = list[tuple[str | Callable[..., Any], Callable[..., Any]]]

LOGITS = 2**20
"""About so many logits are looked at, in float32, at a time: as many as a processor's cache holds."""
WHOLE = 2**28
"""Greatest number of logits of a batch that are there at once: half a GiB in 16 bits. Of more, the final norm and the
unembedding are computed a few rows at a time, which changes losses by rounding: less than 1e-5 nats in float32."""
COMPUTED = "experts_in_slots"
"""Asked of `each_layer` like a hook: ids of the experts that were computed, by rank, −1 in slots that are left out."""


@runtime_checkable
class TextBatch(Protocol):
    """Windows of text, one a row, as `moe_lens.data` makes them."""

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """Ids."""
        ...

    @property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """True at real tokens: the model's attention mask."""
        ...

    @property
    def counted(self) -> Bool[Tensor, "batch pos"]:
        """True where statistics are taken."""
        ...

    @property
    def sources(self) -> tuple[str, ...]:
        """Of each row."""
        ...


def each_layer(model: Any, wanted: Sequence[str], consume: Callable[[int, dict[str, Tensor]], None]) -> Hooks:
    """Hooks that gather some activations of a MoE layer and hand them on when they are complete.

    No more than one layer is held at a time, which is what makes it cheaper than a cache.

    Args:
        model: A `HookedMoE`.
        wanted: Names of hooks of a MoE layer, or of the block, or `COMPUTED`.
        consume: Called with the layer and its activations by name.
    """
    held: dict[int, dict[str, Tensor]] = {}

    def keep(layer: int, name: str, value: Tensor) -> None:
        parts = held.setdefault(layer, {})
        parts[name] = value.detach()
        if len(parts) == len(wanted):
            consume(layer, held.pop(layer))

    in_block = {hook.name for hook in names.RESIDUAL_HOOKS}

    def hook(layer: int, name: str) -> tuple[str, Callable[..., None]]:
        if name == COMPUTED:  # by then every hook that leaves experts out has run
            at = names.mlp(names.EXPERT_OUT, layer)
            return at, lambda value, hook: keep(layer, name, model.experts_in_slots(layer))  # noqa: ARG005
        full = names.block(name, layer) if name in in_block else names.mlp(name, layer)
        return full, lambda value, hook: keep(layer, name, value)  # noqa: ARG005  # TransformerLens passes hook by name

    return [hook(layer, name) for layer in model.moe_layers for name in wanted]


def computed_slots(
    indices: Int[Tensor, "batch pos top_k"], counted: Bool[Tensor, "batch pos"], n_experts: int
) -> Bool[Tensor, "batch pos top_k"]:
    """Slots of counted tokens whose expert was computed, which are those that do not hold −1.

    Raises:
        InputError: they hold ids that no expert has.
    """
    slots = counted.to(indices.device)[..., None] & (indices != -1)
    ids = indices[slots]
    if bool(((ids < 0) | (ids >= n_experts)).any()):
        low, high = int(ids.min()), int(ids.max())
        raise InputError(
            f"expert indices from {low} to {high}; expected 0 to {n_experts - 1}, or −1 where none is computed"
        )
    return slots


def routing_hooks(model: HookedModel, layers: dict[int, LayerRouting]) -> Hooks:
    """Hooks that put the routing of every layer into `layers` while the model runs, affinities and logits too.

    Affinities are those of the logits in float32. Tensors stay on the device of their layer.
    """
    wanted = [names.ROUTER_LOGITS, names.EXPERT_INDICES, names.ROUTING_WEIGHTS]

    def keep(layer: int, of: dict[str, Tensor]) -> None:
        logits = of[names.ROUTER_LOGITS]
        layers[layer] = LayerRouting(
            layer=layer,
            n_experts=model.n_experts,
            indices=of[names.EXPERT_INDICES],
            weights=of[names.ROUTING_WEIGHTS],
            logits=logits,
            probs=affinity(logits, model.family.score),
        )

    return each_layer(model, wanted, keep)


def input_device(model: Any) -> torch.device:
    """Where the model wants its tokens."""
    return dispatch.input_device(model.original_model)


@torch.no_grad()
def forward(
    model: Any, batch: TextBatch, hooks: Hooks, *, blocks_only: bool = False
) -> Float[Tensor, "rows columns d_vocab_or_model"]:
    """Logits for what the model reads of a batch, with hooks in place.

    Rows are those of the batch; of one with a `packing` they are packed, and `unpacked` brings them into its rows.

    Args:
        model: A `HookedMoE`.
        batch: What to read.
        hooks: In place while it is read.
        blocks_only: Whether to end before the final norm, and give the residual stream instead of logits.

    Raises:
        InputError: They hold NaN; the message names the layer where that begins. Or dropout or jitter is on, or they
            are packed, and the family cannot keep them apart.
    """
    device, packing = input_device(model), getattr(batch, "packing", None)
    how: dict[str, Any] = {"use_cache": False}
    if packing is None:
        tokens, how["attention_mask"] = batch.tokens, batch.mask.long().to(device)
    else:
        # Positions that start again mark windows that must not see one another, if there is no mask and no cache.
        check_packing(model)
        tokens, how["position_ids"] = packing.tokens, packing.positions.to(device)
    run = {**how, "stop_at_layer": model.cfg.n_layers} if blocks_only else how
    with nothing_drawn(model):
        logits = model.run_with_hooks(tokens.to(device), fwd_hooks=hooks, return_type="logits", **run)
    if not logits.sum(-1).isnan().any():
        return logits
    bad = unpacked(batch, logits.isnan().any(-1)).cpu() & batch.mask
    if bad.any():
        row = int(bad.any(-1).nonzero()[0, 0])
        where = "the residual stream holds NaN" if blocks_only else "the logits hold NaN"
        raise InputError(
            f"{where} in a text of source {batch.sources[row]!r}; {_first_not_finite(model, tokens, how)}. "
            "A parameter may be broken, or the dtype too narrow"
        )
    return logits


def check_packing(model: Any) -> None:
    """Refuse to pack windows for a family in which they would reach one another.

    Raises:
        InputError: It is one.
    """
    if model.family.mixes_packed:
        raise InputError(
            f"windows cannot be packed into one row for {model.family.model_type}: transformers would let them read "
            "one another there; leave out --packed (Reading(packed=True), batch_windows(packed=…))"
        )


def read_logits(
    model: Any, batch: TextBatch, hooks: Hooks, read: Callable[[Tensor, Tensor], Tensor]
) -> Shaped[Tensor, "rows columns"]:
    """Something of the logits at every position that the model reads of a batch, with hooks in place.

    Logits of more than `WHOLE` numbers are never there at once.

    Args:
        model: A `HookedMoE`.
        batch: What to read.
        hooks: In place while it is read.
        read: From rows of logits [rows, d_vocab], and the numbers of the positions that they are of, counted row by row
            through the batch, to a number for each row.
    """
    tokens = batch.tokens if (packing := getattr(batch, "packing", None)) is None else packing.tokens
    whole = tokens.numel() * model.cfg.d_vocab <= WHOLE
    found = forward(model, batch, hooks, blocks_only=not whole).flatten(0, 1)
    size = rows_at_once(LOGITS, model.cfg.d_vocab)
    parts = []
    with torch.no_grad():
        for rows in torch.arange(len(found)).split(size):
            logits = found[rows[0] : rows[-1] + 1]
            if not whole:
                logits = model.adapter.apply_output_logits_transform(model.unembed(model.ln_final(logits[None])))[0]
            parts.append(read(logits, rows.to(logits.device)))
    return torch.cat(parts).view(tokens.shape)


def unpacked(batch: TextBatch, values: Shaped[Tensor, "rows columns *rest"]) -> Shaped[Tensor, "batch pos *rest"]:
    """What the model gave for what it read, by row of the batch."""
    packing = getattr(batch, "packing", None)
    return values if packing is None else packing.unpack(values)


def _first_not_finite(model: Any, tokens: Int[Tensor, "rows columns"], how: dict[str, Any]) -> str:
    found: list[str] = []

    def look(value: Tensor, hook: Any) -> None:
        if not value.isfinite().all():
            found.append(str(hook.name))

    points = [names.block(name, layer) for layer in range(model.cfg.n_layers) for name in _STREAM]
    model.run_with_hooks(tokens.to(input_device(model)), fwd_hooks=[(name, look) for name in points], **how)
    if not found:
        return "the residual stream of every layer is finite, so it is the final norm or the unembedding"
    return f"the first values that are not finite are at {found[0]} (layer {found[0].split('.')[1]})"


_STREAM = (names.RESID_PRE, names.RESID_MID, names.RESID_POST)


def observe(model: AnyModel, batch: TextBatch, *, predicted: bool = False, beside: Hooks | None = None) -> RoutedBatch:
    """Run a model over a batch and note its routing: one forward pass, and nothing else is kept.

    Routing is what the router selects. Slots that an intervention leaves out afterwards (`keep_top`) have weight 0.

    Without `predicted` the model ends before its unembedding: routing does not ask for it.

    Args:
        model: A `HookedMoE`.
        batch: Tokens, which of them are real, which to count, and the source of each row.
        predicted: Whether to note the most likely next token, too.
        beside: Hooks that are in place in the same pass.
    """
    layers: dict[int, LayerRouting] = {}
    hooks = [*routing_hooks(model, layers), *(beside or ())]
    if not predicted:
        forward(model, batch, hooks, blocks_only=True)
        return routed(model, batch, layers)
    best = read_logits(model, batch, hooks, lambda logits, at: logits.argmax(-1))  # noqa: ARG005
    return routed(model, batch, layers, unpacked(batch, best))


def routed(
    model: Any,
    batch: TextBatch,
    layers: Mapping[int, LayerRouting],
    predicted: Int[Tensor, "batch pos"] | None = None,
) -> RoutedBatch:
    """The routing of what the model read of a batch, by layer, as that of the batch's rows."""
    rows = ("indices", "weights", "logits", "probs")
    by_row = [
        replace(of, **{name: unpacked(batch, value) for name in rows if (value := getattr(of, name)) is not None})
        for of in (layers[layer] for layer in model.moe_layers)
    ]
    return RoutedBatch(
        routing=replace(Routing.stack(by_row), mask=batch.mask),
        tokens=batch.tokens,
        counted=batch.counted & batch.mask,
        sources=batch.sources,
        predicted=predicted,
    )
