"""Hooks of torch beside hook points.

On what a wrapper wraps they act before its hook points, which show what they have made of it. On modules whose forward
has hooks inside they may read what is returned, and not change it.
"""

from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_lens.errors import HookError
from moe_lens.model.hooks.output_capture import OutputCapture
from moe_lens.model.tl_compat import GeneralizedComponent


def hook_inside(model: nn.Module) -> None:
    """Have hooks of torch that are put on a wrapper act on what it wraps, as those that were there before it do."""
    for module in model.modules():
        if isinstance(module, GeneralizedComponent) and module.original_component is not None:
            module.__dict__["register_forward_hook"] = partial(_register_inside, module)


def _register_inside(wrapper: Any, hook: Any, **how: Any) -> RemovableHandle:
    return wrapper.original_component.register_forward_hook(hook, **how)


def hooks_of_torch(module: nn.Module) -> list[Any]:
    """Those on what a module returns, but for transformers' own for recording outputs."""
    return [hook for hook in module._forward_hooks.values() if not isinstance(hook, OutputCapture)]


@contextmanager
def unchanged(modules: Iterable[nn.Module], layer: int) -> Generator[None]:
    """While modules run in here, what they return is compared before their hooks of torch and after them.

    Raises:
        HookError: it was changed; names the hooks.
    """
    with ExitStack() as stack:
        for module in modules:
            made: list[list[Tensor]] = []
            by = ", ".join(getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks_of_torch(module))
            said = f"layer {layer}: torch's hook {by} changes what a {type(module).__name__} returns"
            stack.callback(module.register_forward_hook(partial(_note, made), prepend=True).remove)
            stack.callback(module.register_forward_hook(partial(_compare, made, said)).remove)
        yield


def _note(made: list[list[Tensor]], module: nn.Module, args: Any, out: Any) -> None:  # noqa: ARG001
    made.append([each.detach().clone() for each in _tensors(out)])


def _compare(made: list[list[Tensor]], said: str, module: nn.Module, args: Any, out: Any) -> None:  # noqa: ARG001
    before, after = made.pop(), _tensors(out)
    if len(before) != len(after) or not all(map(_same, before, after)):
        raise HookError(
            f"{said}, and hooks of the wrapped model, which are inside that, have shown it as it was: remove it, and "
            "do what it does with hooks of the wrapped model"
        )


def _tensors(out: Any) -> list[Tensor]:
    return [each for each in (out if isinstance(out, tuple) else (out,)) if isinstance(each, Tensor)]


def _same(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or one.shape != other.shape:
        return one.shape == other.shape
    return torch.allclose(one, other.to(one), rtol=0, atol=0, equal_nan=True)
