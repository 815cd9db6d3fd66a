"""Modules of transformers whose computation is done elsewhere, so that hooks are inside it: refused if changed."""

from typing import Any

from torch import nn

from moe_lens.errors import UnsupportedModelError
from moe_lens.model.hooks.output_capture import OutputCapture


def refuse_replaced(module: nn.Module) -> None:
    """Refuse a module whose forward somebody has replaced: hooks are inside the one of transformers.

    Raises:
        UnsupportedModelError: it is another function, on the module or on its class; names it.
    """
    forward = getattr(module, "_old_forward", module.forward)  # where accelerate has put its own around it
    function: Any = getattr(forward, "__func__", getattr(forward, "func", forward))  # a method; a partial of ours
    while _computes(function) and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    if not _computes(function):
        code = getattr(function, "__code__", None)
        name = type(function).__name__ if code is None else code.co_qualname
        raise UnsupportedModelError(
            f"{type(module).__name__}.forward was replaced by {name}, and hooks are inside what it replaces. Wrap the "
            "model as transformers builds it, and change what it computes by hooks or by its parameters"
        )


def refuse_torch_hooks(module: nn.Module) -> None:
    """Refuse a module with a hook of torch, forward or backward, where the module is not called.

    Raises:
        UnsupportedModelError: there is one that is not transformers' own for recording outputs; names it.
    """
    forward = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    for hook in (*forward, *module._backward_hooks.values(), *module._backward_pre_hooks.values()):
        if not isinstance(hook, OutputCapture):
            name = getattr(hook, "__qualname__", type(hook).__name__)
            raise UnsupportedModelError(
                f"torch's hook {name} on a {type(module).__name__} would not be called on what it computes, since "
                "hooks are inside that: remove it, or do what it does with hooks of the wrapped model"
            )


def refuse_exchanged(module: nn.Module, wrapped: nn.Module) -> None:
    """Refuse another module in the place of one that was wrapped, where neither is called.

    Raises:
        UnsupportedModelError: it is another; names it.
    """
    if module is not wrapped:
        raise UnsupportedModelError(
            f"a {type(module).__name__} was put in the place of the {type(wrapped).__name__} that was wrapped, and "
            "would not be called, since hooks are inside what that computes: put that back, and change its parameters "
            "in place, or what it computes by hooks"
        )


def refuse_circular(model: nn.Module) -> None:
    """Refuse a model in which a forward that calls a wrapper's was put, through the wrapper, into what that wraps.

    Args:
        model: Of transformers, wrapped, of which a pass did not end.

    Raises:
        UnsupportedModelError: there may be one; names the module.
    """
    for path, module in model.named_modules():
        inner: Any = getattr(module, "original_component", None)
        if inner is not None and "forward" in vars(inner):
            try:
                refuse_replaced(inner)
            except UnsupportedModelError as error:
                place = path.replace("_original_component.", "")
                raise UnsupportedModelError(
                    f"{place}: its forward was replaced after it was wrapped, by one that calls the wrapper's, which "
                    "calls it in turn. Take it away (del module.original_component.forward), and change what the "
                    "module gives by hooks, torch's (register_forward_hook) included"
                ) from error


def _computes(function: Any) -> bool:
    """Whether it is written where experts are known; `functools.wraps` copies the name of its module, not its names."""
    names = getattr(function, "__globals__", {})
    return names.get("__name__", "").partition(".")[0] in ("transformers", "moe_lens", "torch")
