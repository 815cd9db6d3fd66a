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
from moe_lens.studies.forward_passes import each_layer, forward, nothing


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
        inputs: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}

        def keep(layer: int, of: dict[str, Tensor], inputs: Any = inputs, outputs: Any = outputs) -> None:
            inputs[layer], outputs[layer] = of[names.MLP_IN].clone(), of[names.MLP_OUT].clone()

        forward(model, batch, each_layer(model, [names.MLP_IN, names.MLP_OUT], keep), blocks_only=True)
        for expert in range(model.n_experts):
            with preview(_without(model, expert), model):
                for row, layer in enumerate(model.moe_layers):
                    found = model.blocks[layer].mlp(inputs[layer])
                    moved = (found[0] if isinstance(found, tuple) else found) - outputs[layer]
                    counted = batch.counted.to(moved.device)
                    error[row, expert] += float(moved[counted].double().square().sum())
        on_batch()
    return error / tokens.n_tokens


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
