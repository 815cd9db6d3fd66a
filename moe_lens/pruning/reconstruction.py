"""How far a layer's output moves when one of its experts is pruned: NAEE's criterion (arXiv 2402.14800)."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens import names
from moe_lens.data import Tokens
from moe_lens.model.cache.identity import identity
from moe_lens.pruning.plans import Plan
from moe_lens.pruning.preview import preview
from moe_lens.studies.forward_passes import Hooks, each_layer, forward, nothing


@torch.no_grad()
def reconstruction_error(
    model: Any, tokens: Tokens, on_batch: Callable[[], None] = nothing
) -> Float[Tensor, "layer n_experts"]:
    """Mean over tokens of ‖F(x) − F₋ₑ(x)‖², F the MoE layer, F₋ₑ the layer without expert e, x its input in the model.

    "Not All Experts are Equal" minimises ‖F(x) − F₋C(x)‖ over all sets C of experts to drop, layer by layer. That is
    feasible for 8 experts and not for 64 ((64 choose 32) ≈ 10¹⁸ sets); this is its criterion for each expert alone.

    Args:
        model: A `HookedMoE`.
        tokens: Calibration texts.
        on_batch: Called after every batch.
    """
    size = len(model.moe_layers), model.n_experts
    error = torch.zeros(size, dtype=torch.float64)
    for batch in tokens:
        clean: dict[int, dict[str, Tensor]] = {}

        def keep(layer: int, of: dict[str, Tensor], clean: Any = clean) -> None:
            clean[layer] = {name: value.clone() for name, value in of.items()}

        forward(model, batch, each_layer(model, _OF_LAYER, keep), blocks_only=True)
        for expert in range(model.n_experts):
            with preview(_without(model, expert), model):
                forward(model, batch, _layers_moved(clean, expert, batch.counted, error[:, expert]), blocks_only=True)
        on_batch()
    return error / tokens.n_tokens


_OF_LAYER = (names.MLP_IN, names.ROUTER_LOGITS, names.MLP_OUT)


def _layers_moved(clean: dict[int, dict[str, Tensor]], expert: int, counted: Tensor, error: Tensor) -> Hooks:
    """Hooks that give every layer what it reads in the whole model, and add how far its output moved to `error`."""
    hooks: Hooks = []
    for row, (layer, of) in enumerate(sorted(clean.items())):

        def read(value: Tensor, hook: Any, of: Any = of) -> Tensor:  # noqa: ARG001
            return of[names.MLP_IN]

        def choose(value: Tensor, hook: Any, of: Any = of) -> Tensor:  # noqa: ARG001
            # Given again, since a router may read something else than hook_in, as Gemma 4's does.
            return of[names.ROUTER_LOGITS].index_fill(-1, torch.tensor(expert, device=value.device), -torch.inf)

        def compare(value: Tensor, hook: Any, of: Any = of, row: int = row) -> None:  # noqa: ARG001
            moved = (value - of[names.MLP_OUT])[counted.to(value.device)]
            error[row] += float(moved.double().square().sum())

        found = {names.MLP_IN: read, names.ROUTER_LOGITS: choose, names.MLP_OUT: compare}
        hooks += [(names.mlp(name, layer), of_hook) for name, of_hook in found.items()]
    return hooks


def _without(model: Any, expert: int) -> Plan:
    """A plan that drops one expert of every layer."""
    kept = tuple(other for other in range(model.n_experts) if other != expert)
    return Plan(
        model=identity(model),
        layers=model.moe_layers,
        kept=(kept,) * len(model.moe_layers),
        top_k=model.top_k,
        values=torch.zeros(len(model.moe_layers), model.n_experts),
        method="all but one",
    )
