"""Gradient checkpointing beside hooks: a layer that is computed again in the backward pass must compute the same."""

from typing import Any

import torch
from transformer_lens.hook_points import HookPoint

from moe_lens.model.tl_compat import GeneralizedComponent


class KeptWhileHooked(GeneralizedComponent):
    """A decoder layer that keeps its activations while hooks are in it, though transformers is to compute them anew.

    The backward pass may come when the hooks are gone: it would go through a layer that was never run.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        layer: Any = self.original_component
        saves = getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()
        if not saves or not self._is_hooked():
            return super().forward(*args, **kwargs)
        layer.gradient_checkpointing = False
        try:
            return super().forward(*args, **kwargs)
        finally:
            layer.gradient_checkpointing = True

    def _is_hooked(self) -> bool:
        points = [module for module in self.modules() if isinstance(module, HookPoint)]
        of_experts = getattr(getattr(self._modules.get("mlp"), "hooks", None), "experts", {})
        return any(point.has_hooks() for point in (*points, *of_experts.values()))
