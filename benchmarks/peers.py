"""What others take for the same: hooks of torch by hand, nnsight, and TransformerLens's own bridge.

"The same" is the router's logits and every active expert's output, of all layers. transformers packs experts: none of
them is a module, and their outputs are summed inside one function. By hand, a hook on that function's module
computes the outputs again, from what it was given; TransformerLens's bridge has no hook on them at all.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def moe_modules(model: Any) -> dict[int, tuple[Any, Any]]:
    """Router and experts of each layer that has them, by layer."""
    blocks = enumerate(model.model.layers)
    mlps = {layer: block.mlp for layer, block in blocks if hasattr(block.mlp, "experts")}
    return {layer: (mlp.router if hasattr(mlp, "router") else mlp.gate, mlp.experts) for layer, mlp in mlps.items()}


def expert_outputs(experts: Any, x: Tensor, indices: Tensor) -> Tensor:
    """Every active expert's output, [tokens, slot, d_model], in the router's order of slots."""
    out = x.new_empty(*indices.shape, x.shape[-1])
    for expert in indices.unique().tolist():
        token, slot = (indices == expert).nonzero(as_tuple=True)
        out[token, slot] = _one(experts, x[token], expert)
    return out


def _one(experts: Any, x: Tensor, expert: int) -> Tensor:
    up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
    if hasattr(experts, "gate_up_proj_bias"):  # gpt-oss: transposed, with biases and an activation of its own
        hidden = experts._apply_gate(x @ up + experts.gate_up_proj_bias[expert])
        return hidden @ down + experts.down_proj_bias[expert]
    gate, linear = F.linear(x, up).chunk(2, -1)
    return F.linear(experts.act_fn(gate) * linear, down)


def logits_of(returned: Any) -> Tensor:
    """The router's logits among what it returns."""
    return returned[0] if isinstance(returned, tuple) else returned


def by_hand(model: Any, tokens: Tensor) -> dict[tuple[str, int], Tensor]:
    """Hooks of torch, put on for one pass."""
    kept: dict[tuple[str, int], Tensor] = {}
    handles = []
    for layer, (router, experts) in moe_modules(model).items():

        def keep_logits(module: Any, given: Any, returned: Any, layer: int = layer) -> None:  # noqa: ARG001
            kept["router_logits", layer] = logits_of(returned).clone()

        def keep_outputs(module: Any, given: Any, returned: Any, layer: int = layer) -> None:  # noqa: ARG001
            kept["expert_out", layer] = expert_outputs(module, given[0], given[1])

        handles += [router.register_forward_hook(keep_logits), experts.register_forward_hook(keep_outputs)]
    try:
        model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def nnsight_run(model: Any, tokens: Tensor) -> Callable[[], Any] | None:
    """The same by nnsight, on a copy of the model; None where it is not installed."""
    try:
        import nnsight  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    traced: Any = nnsight.NNsight(copy.deepcopy(model))
    layers = moe_modules(model)
    router_name = {layer: "router" if hasattr(model.model.layers[layer].mlp, "router") else "gate" for layer in layers}

    def run() -> Any:
        with traced.trace(tokens, use_cache=False):
            kept = nnsight.save({})
            for layer in layers:
                mlp = traced.model.layers[layer].mlp
                kept["router_logits", layer] = logits_of(getattr(mlp, router_name[layer]).output).clone()
                given = mlp.experts.inputs[0]
                kept["expert_out", layer] = expert_outputs(mlp.experts._module, given[0], given[1])
        return kept

    return run


def bridge(model: Any) -> Any:
    """TransformerLens's own bridge around a copy of the model; None where it has no adapter for the family."""
    from transformer_lens.model_bridge import TransformerBridge

    from moe_lens.model.tl_compat import ArchitectureAdapterFactory, build_bridge_config_from_hf

    config = build_bridge_config_from_hf(model.config, type(model).__name__, "bench", torch.float32)
    try:
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
        return TransformerBridge(copy.deepcopy(model), adapter, None)
    except (ValueError, NotImplementedError):
        return None
