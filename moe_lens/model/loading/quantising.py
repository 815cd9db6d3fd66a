"""A transformers model whose large matrices are packed in 4 or 8 bits, before it is wrapped."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moe_lens.model.experts.moe_layers import experts_by_layer
from moe_lens.model.experts.quantised import BLOCK, PackedLinear, PackedMatrices, Scheme, check_scheme
from moe_lens.model.families.table import family_of


def quantise(model: PreTrainedModel, scheme: Scheme) -> None:
    """Pack the experts' matrices and the linear layers of the blocks, one after the other, in place and for good.

    Routers, norms, biases, embeddings and unembedding stay as they are; so does, with "nf4", a linear layer whose
    numbers are no multiple of 64.

    Args:
        model: Of transformers, not wrapped yet.
        scheme: "nf4" or "int8".

    Raises:
        InputError: an unknown scheme, or bitsandbytes is not installed.
        UnsupportedModelError: an unknown family, or experts that cannot be cut into the scheme's blocks.
    """
    check_scheme(scheme)
    family = family_of(model.config)
    for experts in experts_by_layer(model, family).values():
        with experts.on_device():
            experts.pack(scheme)
    for name, linear in _linears(model, family):
        if scheme == "int8" or linear.weight.numel() % BLOCK == 0:
            PackedLinear.convert(linear, scheme, name)


def _linears(model: PreTrainedModel, family: Any) -> list[tuple[str, nn.Linear]]:
    """The linear layers within blocks that are no routers."""
    skipped = {family.router, *([family.shared_gate] if family.shared_gate else [])}
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.startswith(blocks) and not skipped & set(name.split("."))
    ]


def packed_in(model: nn.Module) -> list[tuple[str, PackedMatrices]]:
    """The packed matrices of a model, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, PackedMatrices)]


def scheme_of(model: nn.Module) -> Scheme | None:
    """How a model is packed; None where it is not."""
    return next((packed.scheme for _, packed in packed_in(model)), None)
