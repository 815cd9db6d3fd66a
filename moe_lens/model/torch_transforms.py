"""What torch makes of a module: `torch.compile` and `torch.func.functional_call`, which a wrapped model refuses."""

import sys
from typing import Any, no_type_check

import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge

from moe_lens.errors import UnsupportedModelError

uncompiled = torch.compiler.disable(reason="hooks are Python functions")
"""What `torch.compile` around a call leaves as it is."""


class OnePlace:
    """`named_parameters` of a module of a wrapped model, which `torch.func.functional_call` is refused.

    Args:
        module: The model, or a part of it in which a parameter has several places.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    @no_type_check  # a checker's frame would come between: who asks is read from the frame
    def __call__(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        """As torch's.

        Raises:
            UnsupportedModelError: torch itself asks for duplicates, to put others in their place.
        """
        if not remove_duplicate and sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            raise no_functional_call()
        return type(self.module).named_parameters(self.module, prefix, recurse, remove_duplicate)

    @property
    @no_type_check  # dynamo's own frames ask
    def __func__(self) -> Any:
        """What torch's compiler asks a method for, and nothing else does.

        Raises:
            UnsupportedModelError: always.
        """
        raise not_compiled()


def hold_in_one_place(*models: nn.Module) -> None:
    """Refuse `torch.func.functional_call` to every module in which a parameter is reached by two ways."""
    seen: dict[nn.Module, tuple[set[nn.Module], bool]] = {}

    def look(module: nn.Module) -> tuple[set[nn.Module], bool]:
        """The parts of a module that have numbers, and whether it reaches one of them by two ways."""
        if module not in seen:
            found = [({module}, False)] if module._parameters or module._buffers else []
            found += [look(child) for child in module._modules.values() if child is not None]
            parts = set[nn.Module]().union(*(each for each, _ in found))
            twice = any(twice for _, twice in found) or len(parts) < sum(len(each) for each, _ in found)
            seen[module] = parts, twice
            if twice and not isinstance(module, TransformerBridge):  # which refuses it by itself
                module.__dict__["named_parameters"] = OnePlace(module)
        return seen[module]

    for model in models:
        look(model)


def not_compiled() -> UnsupportedModelError:
    """A compiled graph holds no hook functions, and would leave out those that are added later."""
    return UnsupportedModelError(
        "a wrapped model is not compiled: hooks are Python functions. Compile the transformers model instead, or a "
        "copy.deepcopy of it, before one is wrapped"
    )


def no_functional_call() -> UnsupportedModelError:
    """Torch asks for duplicates there, and would put other numbers back than it found."""
    return UnsupportedModelError(
        "torch.func.functional_call cannot run a wrapped model or a part of it, whose parameters have several places "
        "each, and would put the wrong ones back: copy.deepcopy(model).load_state_dict(…) holds other numbers"
    )
