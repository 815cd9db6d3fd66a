"""What to write instead of a hook name that a model does not have."""

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from moe_lens import names

_BY_RANK = "of the chosen experts, by rank"
_OURS: tuple[tuple[str, str, str], ...] = (
    (r"(mlp\.)?hook_expert_weights", names.ROUTING_WEIGHTS, _BY_RANK),
    (r"(mlp\.)?hook_router_scores", names.ROUTER_LOGITS, f"before the selection; {names.ROUTING_WEIGHTS} after it"),
    (r"mlp\.(gate|router)\.hook_in", names.MLP_IN, "what router and experts read"),
    (r"mlp\.(gate|router)(\.\w+)*\.hook_\w+", names.ROUTER_LOGITS, "an edit re-routes"),
    (r"mlp\.hook_(pre|gate)", names.EXPERT_PRE, _BY_RANK),
    (r"mlp\.hook_pre_linear", names.EXPERT_PRE_LINEAR, _BY_RANK),
    (r"mlp\.hook_post", names.EXPERT_POST, _BY_RANK),
    (r"mlp\.experts\.hook_in", names.MLP_IN, "what router and experts read"),
    (r"mlp\.experts\.hook_out", names.ROUTED_OUT, f"the sum; {names.EXPERT_WEIGHTED} has its terms"),
    (r"mlp\.shared_expert_gate\.hook_\w+", names.SHARED_OUT, "the shared experts times their gate"),
)
"""Names that TransformerLens has on MoE layers, ours for the same thing, and what that holds."""
_OF_EXPERTS = {"hook_in": names.MLP_IN, "hook_gate": "hook_pre", "hook_mid": "hook_post"}
"""TransformerLens's and nnsight's habits on single experts."""


def instead_of(name: str, known: Collection[str], moe_layers: Iterable[int], note: str = "") -> str:
    """A sentence on what to write instead of a hook name that does not exist, or where to look.

    Args:
        name: The name.
        known: Names that exist.
        moe_layers: Layers that have experts.
        note: What is particular to the family; a hook that is named there is absent for the reason that is given there.
    """
    if name.endswith(names.DEAD):
        return "TransformerLens has it, but in these models it never fires, or nothing reads what it shows"
    found = re.fullmatch(r"blocks\.(-?\d+)\.(.+)", name)
    if found is None:
        return _close(name, known)
    layer, tail = int(found[1]), found[2]
    n_layers = 1 + max((int(each.split(".")[1]) for each in known if re.match(r"blocks\.\d+\.", each)), default=-1)
    if not 0 <= layer < n_layers:
        return f"the model has layers 0 to {n_layers - 1}"
    if any(fnmatchcase(tail.rpartition(".")[2], named) for named in re.findall(r"\w+\*?", note)):  # hook_resid_*
        return f"of this family: {note}"
    with_experts = sorted(moe_layers)
    for pattern, ours, what in _OURS:
        if re.fullmatch(pattern, tail):
            there = f"here it is {names.mlp(ours, layer)}, {what}"
            return there if layer in with_experts else f"layer {layer} has no experts; MoE layers are {with_experts}"
    if layer in with_experts and (of_expert := re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)", tail)):
        number, hook = int(of_expert[1]), of_expert[2]
        if (ours := _OF_EXPERTS.get(hook)) is not None:
            there = names.mlp(ours, layer) if ours == names.MLP_IN else names.expert(ours, layer, number)
            return f"here it is {there}"
        known = [*known, *(names.expert(each.name, layer, number) for each in names.EXPERT_HOOKS)]
    return _close(name, [each for each in known if each.startswith(f"blocks.{layer}.")])


def _close(name: str, known: Iterable[str]) -> str:
    known = list(known)
    if close := get_close_matches(name, known, n=1, cutoff=0.8):
        return f"did you mean {close[0]!r}?"
    tails = {re.sub(r"^blocks\.\d+\.", "", each) for each in known}
    for written in (name, f"hook_{name}"):
        if close := get_close_matches(written, tails, n=1, cutoff=0.85):
            return f"did you mean 'blocks.{{layer}}.{close[0]}', with the number of a layer?"
    return "model.hook_dict lists those that do"
