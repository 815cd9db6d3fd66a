"""Expert mathematics and its hook points.

One kernel serves everybody, whoever listens: slots (token, expert) are sorted by expert, multiplied group by group,
brought back to their tokens, weighted and summed. Hooks see copies in rank order; what they edit is put back in the
model's own order, so that a run which is only watched keeps every bit. Slots that a hook leaves out are not computed.

Shapes inside the kernel: `tokens` = batch · pos, `slots` = tokens · top_k, `rows` = the slots that are computed.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens import names
from moe_lens.model.experts.expert_weights_view import (
    Experts,
    Product,
    Rows,
    join_branches,
    multiplied,
    split_branches,
)
from moe_lens.model.experts.offloaded_experts import StoredMatrices
from moe_lens.model.experts.packed import Matrices
from moe_lens.model.hooks.layer_hooks import LayerHooks


def experts_forward(
    experts: Experts,
    hooks: LayerHooks,
    x: Float[Tensor, "tokens d_model"],
    indices: Int[Tensor, "tokens top_k"],
    weights: Float[Tensor, "tokens top_k"],
    product: Product | None = None,
) -> Float[Tensor, "tokens d_model"]:
    """Σ_k weights · E_indices(x), or Σ_k E_indices(weights · x) where weights come first.

    Computed as transformers does, `product` and all, if no other product is given.
    """
    tokens, top_k = indices.shape
    hooks.computed = True
    hooks.check_handed(indices, weights)
    kept = hooks.keep(tokens, top_k, indices.device)
    # A slot that is left out goes behind all experts, as transformers sorts those of experts on other devices.
    flat = indices if kept is None else indices.masked_fill(~kept.view_as(indices), experts.n_experts)
    ids, permutation = experts.sort(flat)
    if kept is not None:
        n_rows = int(kept.sum())
        ids, permutation = ids[:n_rows], permutation[:n_rows]
    ends = torch.searchsorted(ids, torch.arange(experts.n_experts, device=ids.device), right=True).to(torch.int32)
    # place[s]: the row, among the rows sorted by expert, of slot s of the model's order; past the last where left out
    place = permutation.new_full((tokens * top_k,), permutation.numel())
    place[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    weight = weights.reshape(-1)[permutation].unsqueeze(-1)

    rows = Rows(ids, permutation // top_k, ends, tokens)
    given = x.index_select(0, rows.tokens)
    given = given * weight if experts.weighs_input else given
    out = _outputs(experts, hooks, given, rows, place, permutation, product or experts.product)
    out = hooks.over_expert("hook_out", out, permutation, ends)
    out = hooks.over_slots(names.EXPERT_OUT, out, place)
    # Weighting row by row and summing over k afterwards is bit-equal to transformers; a batched product is not.
    weighted = out if experts.weighs_input else out * weight
    if kept is None:
        weighted = hooks.over_slots(names.EXPERT_WEIGHTED, weighted, place)
        weighted = weighted.index_select(0, place).view(tokens, top_k, -1)
    else:
        weighted = weighted.new_zeros(tokens * top_k, weighted.shape[-1]).index_copy(0, permutation, weighted)
        weighted = hooks.over_slots(names.EXPERT_WEIGHTED, weighted.view(tokens, top_k, -1))
    return hooks.over_tokens(names.ROUTED_OUT, experts.total(weighted, indices, x.dtype))


def _outputs(
    experts: Experts,
    hooks: LayerHooks,
    x: Float[Tensor, "rows d_model"],
    rows: Rows,
    place: Tensor,
    permutation: Tensor,
    product: Product,
) -> Float[Tensor, "rows d_model"]:
    """E(x) of every row; rows of identity experts are the last, and have no neurons."""
    given, identical = x, None
    if experts.n_identities:
        busy = int(rows.ends[experts.n_matrices - 1])
        given, identical = x[:busy], x[busy:]
        rows, place, permutation = rows.first(experts.n_matrices, busy), place.clamp(max=busy), permutation[:busy]

    def times(value: Tensor, matrix: Tensor | Matrices, bias: Tensor | StoredMatrices | None) -> Tensor:
        out = multiplied(value, matrix, rows, product, experts.alone)
        assert not isinstance(bias, StoredMatrices), "inside `on_device`, what is kept elsewhere is here"
        return out if bias is None else out + bias[rows.ids]

    parts = [times(given, *first) for first in experts.first()]
    projected = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    projected = _neurons(experts, hooks, projected, place, permutation, rows.ends)
    post = experts.activate(projected, rows)
    # One expert's hooks first: those of all experts then show what the model goes on with.
    post = hooks.over_expert("hook_post", post, permutation, rows.ends)
    post = hooks.over_slots(names.EXPERT_POST, post, place)
    out = experts.finish(times(post, *experts.second()))
    return out if identical is None else torch.cat([out, identical.to(out.dtype)])


def _neurons(
    experts: Experts,
    hooks: LayerHooks,
    projected: Tensor,
    place: Tensor,
    permutation: Tensor,
    ends: Tensor,
) -> Tensor:
    """Hooks before the activation function; nothing is split unless somebody listens."""
    wanted = {name for (_, name), point in hooks.experts.items() if point.has_hooks()} & {"hook_pre", "hook_pre_linear"}
    if not wanted and not hooks.has_listeners(names.EXPERT_PRE) and not hooks.has_listeners(names.EXPERT_PRE_LINEAR):
        return projected
    if not experts.has_gate:
        activated = hooks.over_expert("hook_pre", projected, permutation, ends)
        return hooks.over_slots(names.EXPERT_PRE, activated, place)
    branches = split_branches(projected, experts.interleaved)
    edited = []
    for branch, all_experts, one_expert in zip(
        branches, (names.EXPERT_PRE, names.EXPERT_PRE_LINEAR), ("hook_pre", "hook_pre_linear"), strict=True
    ):
        branch_ = hooks.over_expert(one_expert, branch, permutation, ends)
        edited.append(hooks.over_slots(all_experts, branch_, place))
    if all(e is b for e, b in zip(edited, branches, strict=True)):
        return projected
    return join_branches(edited[0], edited[1], experts.interleaved)
