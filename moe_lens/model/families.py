"""Which families are supported, and what differs between them: a table, and a closed world.

A family is supported when its MoE block follows the contract of transformers 5: a router module that returns
`(logits, weights, indices)` after one linear product, and an experts module with packed parameters that is called as
`experts(hidden, indices, weights)`. What is not in the table is refused by name.
"""

from dataclasses import dataclass
from typing import Literal

from transformers import PretrainedConfig

from moe_lens.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """What the wrapper has to know of one model type; everything else is read off the modules."""

    model_type: str
    """`config.model_type` of transformers."""
    router: str = "gate"
    """Name of the router module in the MoE block."""
    shared: str | None = None
    """Name of the shared experts' MLP in the MoE block."""
    shared_gate: str | None = None
    """Name of the linear layer whose sigmoid scales the shared experts' output."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Affinity of all experts as a function of the router logits."""
    interleaved: bool = False
    """Whether `gate_up_proj` alternates the two branches instead of concatenating them."""
    dead: tuple[str, ...] = ()
    """Endings of TransformerLens's hook names that never fire in this family."""


FAMILIES = {
    family.model_type: family
    for family in (
        Family("deepseek", shared="shared_experts"),
        # V2 rotates by complex numbers: there are no cosines and sines to hook.
        Family("deepseek_v2", shared="shared_experts", dead=(".hook_cos", ".hook_sin")),
        Family("deepseek_v3", shared="shared_experts", score="sigmoid"),
        # gpt-oss applies its softmax to the selected logits alone: the affinity of all, renormalised over the selected.
        Family("gpt_oss", router="router", interleaved=True),
        Family("mixtral"),
        Family("olmoe"),
        Family("qwen2_moe", shared="shared_expert", shared_gate="shared_expert_gate"),
        Family("qwen3_moe"),
    )
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a transformers config.

    Raises:
        UnsupportedModelError: its model type is not in the table.
    """
    model_type = getattr(config, "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    raise UnsupportedModelError(
        f"model_type {model_type!r} is not supported. Supported: {', '.join(sorted(FAMILIES))}. "
        "A model without experts belongs in TransformerLens's TransformerBridge."
    )
