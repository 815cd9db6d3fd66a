"""TransformerLens's scan of a model for hook points, which it makes twice.

Its own reads every attribute of every module, and took half of the time to wrap a model.
"""

from typing import Any

from torch import nn
from transformer_lens.hook_points import HookPoint

_ORIGINAL = frozenset(("original_component", "_original_component", "original_model"))
"""Where a component holds what transformers computes: no hook points of ours are in there."""


def scan(model: nn.Module, registry: dict[str, HookPoint]) -> None:
    """Enter the hook points of a model by each of their names, and name those that have none.

    Args:
        model: A TransformerBridge.
        registry: Of its hook points; those in it keep their names.
    """
    named = {id(point) for point in registry.values() if point.name is not None}
    visited: set[int] = set()

    def enter(name: str, point: HookPoint) -> None:
        if id(point) not in named:
            named.add(id(point))
            point.name = name
        registry[name] = point

    def visit(module: nn.Module, path: str) -> None:
        if id(module) in visited or isinstance(module, HookPoint):
            return
        visited.add(id(module))
        get_hooks: Any = getattr(module, "get_hooks", dict)
        held = (*module._modules.items(), *vars(module).items())
        points = {name: each for name, each in held if isinstance(each, HookPoint) and not name.startswith("_")}
        for name, point in (*get_hooks().items(), *sorted(points.items())):
            enter(path + name, point)
        for name, child in module.named_children():
            if name not in _ORIGINAL:
                visit(child, f"{path}{name}.")

    visit(model, "")
