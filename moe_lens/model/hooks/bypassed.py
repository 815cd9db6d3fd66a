"""Modules of transformers whose computation is done elsewhere, so that hooks are inside it: refused if changed."""

from typing import Any

from torch import nn

from moe_lens.errors import UnsupportedModelError
from moe_lens.model.hooks.output_capture import OutputCapture
from moe_lens.model.tl_compat import GeneralizedComponent


def refuse_replaced(module: nn.Module) -> None:
    """Refuse a module whose forward somebody has replaced: hooks are inside the one of transformers.

    Raises:
        UnsupportedModelError: it is another function, on the module or on its class; names it.
    """
    if (changed := replaced(module)) is not None:
        raise UnsupportedModelError(
            f"{changed}, and hooks are inside what it replaces. Wrap the model as transformers builds it, and change "
            "what it computes by hooks or by its parameters"
        )


def replaced(module: nn.Module) -> str | None:
    """What somebody has put in the place of a module's forward, on the module or on its class; None for nothing."""
    function = forward_of(module)
    if _computes(function):
        return None
    code = getattr(function, "__code__", None)
    name, own = type(function).__name__ if code is None else code.co_qualname, f"{type(module).__name__}.forward"
    return f"{own} is not transformers'" if name == own else f"{own} was replaced by {name}"


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


def forward_of(module: nn.Module) -> Any:
    """The function that a module computes with, without what accelerate or a decorator has put around it."""
    forward = getattr(module, "_old_forward", module.forward)
    function: Any = getattr(forward, "__func__", getattr(forward, "func", forward))  # a method; a partial of ours
    while _computes(function) and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


class Ending(GeneralizedComponent):
    """A component whose pass ends: one that a replaced forward sends back into its own wrapper is refused."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens's.

        Raises:
            UnsupportedModelError: the pass did not end, and a forward was replaced in it; names the module.
        """
        try:
            return super().__call__(*args, **kwargs)
        except RecursionError:
            self._refuse_circular()
            raise

    def _refuse_circular(self) -> None:
        for path, module in self.named_modules():
            inner: Any = getattr(module, "original_component", None)
            if inner is not None and "forward" in vars(inner):
                try:
                    refuse_replaced(inner)
                except UnsupportedModelError as error:
                    place = f"{self.name}.{path}".replace("_original_component.", "").rstrip(".")
                    raise UnsupportedModelError(
                        f"{place}: its forward was replaced by one that calls the wrapper's, which calls it in turn. "
                        "Take it away (del module.original_component.forward), and change what the module gives by "
                        "hooks of the wrapped model"
                    ) from error


def _computes(function: Any) -> bool:
    """Whether it is written where experts are known, or checks shapes; `functools.wraps` copies no global names."""
    names = getattr(function, "__globals__", {})
    return names.get("__name__", "").partition(".")[0] in ("transformers", "moe_lens", "torch", "jaxtyping")
