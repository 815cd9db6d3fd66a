"""Which layers of a transformers model have experts, before it is wrapped."""

from typing import Any

from transformers import PreTrainedModel

from moe_lens.model.experts.expert_weights_view import Experts
from moe_lens.model.experts.nonstandard_experts import experts_of
from moe_lens.model.families.table import Family, Layout


def decoder_layers(model: PreTrainedModel, family: Family) -> list[Any]:
    """The decoder's layers, in order."""
    decoder = family.layout.decoder if family.layout else "model"
    layers: Any = model.get_submodule(f"{decoder}.{(family.layout or Layout()).layers}")
    return list(layers)


def moe_blocks(model: PreTrainedModel, family: Family) -> dict[int, Any]:
    """By layer, the module that holds router and experts where there are any, otherwise the MLP."""
    layout = family.layout or Layout()
    layers = enumerate(decoder_layers(model, family))
    blocks = {at: layer if layout.bare else getattr(layer, layout.mlp, None) for at, layer in layers}
    return {at: getattr(block, layout.inner, None) for at, block in blocks.items()} if layout.inner else blocks


def experts_by_layer(model: PreTrainedModel, family: Family) -> dict[int, Experts]:
    """The experts of every layer that has any.

    Raises:
        UnsupportedModelError: they are not what the family has.
    """
    blocks = moe_blocks(model, family).items()
    return {at: experts for at, moe in blocks if (experts := experts_of(moe, family)) is not None}


def attention_experts(model: PreTrainedModel, family: Family) -> list[Experts]:
    """The routed experts of attention, which JetMoE has and which have no hooks."""
    held = (getattr(getattr(layer, "self_attention", None), "experts", None) for layer in decoder_layers(model, family))
    return [experts for moe in held if (experts := experts_of(moe, family)) is not None]
