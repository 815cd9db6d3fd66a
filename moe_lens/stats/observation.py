"""Statistics of a live model: hooks that hand on activations while the model runs, so that no cache is kept."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens import names
from moe_lens.protocols import HookedModel
from moe_lens.routing import LayerRouting, Routing, affinity
from moe_lens.stats.routed_batch import RoutedBatch

Hooks = list[tuple[str | Callable[..., Any], Callable[..., Any]]]


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
        wanted: Names of hooks of a MoE layer, or of the block.
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
        full = names.block(name, layer) if name in in_block else names.mlp(name, layer)
        return full, lambda value, hook: keep(layer, name, value)  # noqa: ARG005  # TransformerLens passes hook by name

    return [hook(layer, name) for layer in model.moe_layers for name in wanted]


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


@torch.no_grad()
def observe(model: Any, batch: TextBatch, *, predicted: bool = False) -> RoutedBatch:
    """Run a model over a batch and note its routing: one forward pass, and nothing else is kept.

    Without `predicted` the unembedding sees the last position alone: routing does not ask for it.

    Args:
        model: A `HookedMoE`.
        batch: Tokens, which of them are real, which to count, and the source of each row.
        predicted: Whether to note the most likely next token, too.
    """
    layers: dict[int, LayerRouting] = {}
    device = model.original_model.get_input_embeddings().weight.device
    tokens, mask = batch.tokens.to(device), batch.mask.to(device)
    logits = model.run_with_hooks(
        tokens,
        fwd_hooks=routing_hooks(model, layers),
        return_type="logits",
        attention_mask=mask.long(),
        use_cache=False,
        logits_to_keep=0 if predicted else 1,  # 0: all, as transformers has it
    )
    return RoutedBatch(
        routing=replace(Routing.stack([layers[layer] for layer in model.moe_layers]), mask=batch.mask),
        tokens=batch.tokens,
        counted=batch.counted & batch.mask,
        sources=batch.sources,
        predicted=logits.argmax(-1) if predicted else None,
    )
