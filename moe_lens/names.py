"""The one place that spells hook names.

Hooks of a Mixture-of-Experts layer live at `blocks.{layer}.mlp.{name}` and answer to `blocks.{layer}.{name}` too, so
that TransformerLens's shorthand finds them: `get_act_name("expert_out", 3)`, `cache["expert_out", 3]`.
"""

import re
from dataclasses import dataclass

ROUTER_LOGITS = "hook_router_logits"
N_ACTIVE = "hook_n_active"
EXPERT_INDICES = "hook_expert_indices"
ROUTING_WEIGHTS = "hook_routing_weights"
EXPERT_KEPT = "hook_expert_kept"
EXPERT_PRE = "hook_expert_pre"
EXPERT_PRE_LINEAR = "hook_expert_pre_linear"
EXPERT_POST = "hook_expert_post"
EXPERT_OUT = "hook_expert_out"
EXPERT_WEIGHTED = "hook_expert_weighted"
ROUTED_OUT = "hook_routed_out"
SHARED_OUT = "hook_shared_out"
MLP_IN = "hook_in"
MLP_OUT = "hook_out"
RESID_PRE = "hook_resid_pre"
ATTN_OUT = "hook_attn_out"
RESID_MID = "hook_resid_mid"
BLOCK_MLP_OUT = "hook_mlp_out"
RESID_POST = "hook_resid_post"
FINAL_SCALE = "ln_final.hook_scale"


@dataclass(frozen=True)
class Hook:
    """One row of the hook table."""

    name: str
    """Under `blocks.{layer}.mlp.`, or under `blocks.{layer}.` for the residual stream."""
    shape: str
    """b batch, p position, E routed experts, k active experts by rank, d d_model, m d_expert."""
    edit: str
    """What the tensor is and, where it is not obvious, what an edit does; the model uses what a hook returns."""


MLP_HOOKS = (
    Hook(MLP_IN, "b p d", "what router and experts read; an edit changes it for both"),
    Hook(
        ROUTER_LOGITS,
        "b p E",
        "the router's scores before softmax or sigmoid; an edit re-routes: selection and weights are computed again by "
        "the model's own rule",
    ),
    Hook(
        N_ACTIVE,
        "b p 1 (int)",
        "how many experts a token has; after an edit the model's own rule selects and weights that many experts for "
        "the token; k is then the largest number of any token, and slots beyond a token's number are left out",
    ),
    Hook(
        EXPERT_INDICES,
        "b p k (int)",
        "ids of the selected experts; an edit forces experts: they get their unmasked affinity, then the family's own "
        "normalisation and scale; a selection bias and expert groups affect the choice only; duplicates and ids out of "
        "range raise an error",
    ),
    Hook(
        ROUTING_WEIGHTS,
        "b p k",
        "what each expert's output (in Llama 4, its input) is multiplied by, with any scale that the family applies",
    ),
    Hook(
        EXPERT_KEPT,
        "b p k (bool)",
        "whether a slot is computed; False leaves it out: its expert is not computed for that token and adds nothing; "
        "hooks show zeros in that slot, and of edits there only those of hook_expert_weighted have an effect",
    ),
    Hook(EXPERT_PRE, "b p k m", "expert neurons: the activated branch, before its activation"),
    Hook(EXPERT_PRE_LINEAR, "b p k m", "expert neurons: the linear branch"),
    Hook(EXPERT_POST, "b p k m", "expert neurons: the product of the two branches"),
    Hook(EXPERT_OUT, "b p k d", "E_r(x), each expert's output before its weight; in Llama 4, E_r(g_r x)"),
    Hook(EXPERT_WEIGHTED, "b p k d", "g_r E_r(x), the contribution to the residual stream; in Llama 4, E_r(g_r x)"),
    Hook(ROUTED_OUT, "b p d", "the sum of hook_expert_weighted over the active experts"),
    Hook(SHARED_OUT, "b p d", "the output of the shared experts, times the shared gate where a family has one"),
    Hook(MLP_OUT, "b p d", "the whole MoE layer: routed_out + shared_out"),
)
"""Hooks of a Mixture-of-Experts layer, under `blocks.{layer}.mlp.`."""

ALIASED = tuple(h.name for h in MLP_HOOKS if h.name not in (MLP_IN, MLP_OUT))
"""Hooks that also answer to `blocks.{layer}.{name}`."""

EXPERT_HOOKS = (
    Hook("hook_pre", "rows m", "one expert's neurons, activated branch"),
    Hook("hook_pre_linear", "rows m", "one expert's neurons, linear branch"),
    Hook("hook_post", "rows m", "one expert's neurons, product of the branches"),
    Hook("hook_out", "rows d", "one expert's output, before its weight"),
)
"""Hooks of one expert, under `blocks.{layer}.mlp.experts.{expert}.`.

`hook.ctx` holds `batch`, `pos` and `rank` of each row.
"""

RESIDUAL_HOOKS = (
    Hook(RESID_PRE, "b p d", "the residual stream entering the block"),
    Hook(ATTN_OUT, "b p d", "what attention adds"),
    Hook(RESID_MID, "b p d", "the residual stream itself between attention and experts (u in the paper)"),
    Hook(BLOCK_MLP_OUT, "b p d", "what the MLP or MoE layer adds"),
    Hook(RESID_POST, "b p d", "the residual stream leaving the block"),
)
"""TransformerLens's own, under `blocks.{layer}.`."""

DEAD = ("attn.hook_hidden_states", "rotary_emb.hook_in", "rotary_emb.hook_out", "hook_pos_embed")
"""Endings of TransformerLens's hook names that never fire in any of our families, or fire with a value that nothing
reads (rotary embeddings look at the dtype of their input alone): an edit would be lost."""

_EXPERT_NAME = re.compile(r"blocks\.(\d+)\.mlp\.experts\.(\d+)\.(hook_pre_linear|hook_pre|hook_post|hook_out)")
_MLP_NAME = re.compile(r"blocks\.(\d+)\.(?:mlp\.)?(" + "|".join(ALIASED) + r")")


def mlp(name: str, layer: int) -> str:
    """`("hook_expert_out", 3)` → `blocks.3.mlp.hook_expert_out`."""
    return f"blocks.{layer}.mlp.{name}"


def block(name: str, layer: int) -> str:
    """`("hook_resid_mid", 3)` → `blocks.3.hook_resid_mid`."""
    return f"blocks.{layer}.{name}"


def expert(name: str, layer: int, index: int) -> str:
    """`("hook_out", 3, 17)` → `blocks.3.mlp.experts.17.hook_out`."""
    return f"blocks.{layer}.mlp.experts.{index}.{name}"


def parse_expert(name: str) -> tuple[int, int, str] | None:
    """(layer, expert, hook) of a per-expert hook name, or None for any other name."""
    found = _EXPERT_NAME.fullmatch(name)
    return (int(found[1]), int(found[2]), found[3]) if found else None


def parse_mlp(name: str) -> tuple[int, str] | None:
    """(layer, hook) of a hook that only MoE layers have, by either of its names, or None for any other name."""
    found = _MLP_NAME.fullmatch(name)
    return (int(found[1]), found[2]) if found else None


def alias(name: str) -> str | None:
    """The other name of a hook that has two: `blocks.3.mlp.hook_x` ↔ `blocks.3.hook_x`."""
    found = parse_mlp(name)
    if found is None:
        return None
    layer, hook = found
    return block(hook, layer) if ".mlp." in name else mlp(hook, layer)
