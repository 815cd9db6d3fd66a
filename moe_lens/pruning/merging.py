"""Pruned experts averaged into kept ones, after their neurons have been put in the same order.

M-SMoE (arXiv 2310.01334) groups experts by their router logits, led by those used most, aligns neurons by a
permutation and averages by how often each is used; HC-SMoE (arXiv 2410.08589) averages alike. Departure: both leave the
router as large as it was, so that a member's tokens find the merged expert; a checkpoint with fewer experts has no row
for the others, and the leader keeps its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens import names
from moe_lens.checked import AnyModel
from moe_lens.data import Tokens
from moe_lens.errors import InputError, UnsupportedModelError
from moe_lens.model.cache.identity import identity
from moe_lens.model.loading.checkpoint import Checkpoint, OpenFiles
from moe_lens.pruning.checkpoint_formats import ExpertTensor
from moe_lens.pruning.plans import Plan
from moe_lens.pruning.weight_matching import averaged, members
from moe_lens.studies.forward_passes import COMPUTED, each_layer, forward, nothing

_OUTWARD = ("down_proj", "w2")
"""What stored tensors call the matrix whose columns are neurons; in the others neurons are rows."""


def merge(plan: Plan, model: AnyModel, domains: Sequence[Tokens], *, on_batch: Callable[[], None] = nothing) -> Plan:
    """The same plan with pruned experts merged into kept ones instead of dropped.

    Each pruned expert joins the kept expert of its layer whose router logits are most like its own: the greatest cosine
    over all tokens of the domains. Averages weigh experts by how often they were computed there: chosen, and not left
    out by an intervention, as in the scores.

    Args:
        plan: A plan that drops experts.
        model: The `HookedMoE` that it is for.
        domains: Calibration texts.
        on_batch: Called after every batch.

    Raises:
        InputError: the plan is for another model, or merges already; or there is no text.
        UnsupportedModelError: experts with biases.
    """
    plan.check(identity(model))
    if not domains:
        raise InputError("there are no texts to merge experts by; give at least one domain")
    if plan.merged is not None:
        raise InputError("this plan merges experts already")
    if any(model._experts(layer).has_bias for layer in plan.layers):
        raise UnsupportedModelError("merging experts that have biases is not supported; drop them instead")
    size = len(plan.layers), plan.n_experts
    products, chosen = torch.zeros(*size, plan.n_experts, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    wanted = [names.ROUTER_LOGITS, COMPUTED]
    for domain in domains:
        for batch in domain:

            def update(layer: int, of: dict[str, Tensor], counted: Tensor = batch.counted) -> None:
                at = plan.layers.index(layer)
                logits = of[names.ROUTER_LOGITS][counted.to(of[names.ROUTER_LOGITS].device)].double()
                products[at] += (logits.T @ logits).cpu()
                indices = of[COMPUTED].cpu()[counted]
                chosen[at] += indices[indices >= 0].bincount(minlength=plan.n_experts)

            forward(model, batch, each_layer(model, wanted, update), blocks_only=True)
            on_batch()
    return grouped(plan, products, chosen)


def grouped(
    plan: Plan, products: Float[Tensor, "layer n_experts n_experts"], chosen: Float[Tensor, "layer n_experts"]
) -> Plan:
    """The plan, its pruned experts assigned by cosine.

    Args:
        plan: A plan that drops experts.
        products: Σ over tokens of logit_i · logit_j.
        chosen: How often each expert was chosen.
    """
    norms = products.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(products.dtype).tiny).sqrt()
    cosines = products / norms[:, :, None] / norms[:, None, :]
    merged = {}
    for at, layer in enumerate(plan.layers):
        kept = torch.tensor(plan.kept[at])
        for expert in plan.pruned(layer):
            merged[layer, expert] = int(kept[cosines[at, expert, kept].argmax()])
    return replace(plan, merged=merged, shares=chosen.float())


class StoredMerges:
    """Merged experts of a checkpoint on disk, one at a time."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan):
        self.checkpoint, self.plan = checkpoint, plan
        self._last: tuple[tuple[int, int], dict[str, Tensor]] | None = None

    def __call__(self, one: ExpertTensor) -> Tensor:
        """A tensor of a kept expert, after merging."""
        key = one.layer, one.expert
        if self._last is None or self._last[0] != key:
            self._last = key, self._merge(one)
        merged = self._last[1][one.rest]
        return (merged.T if one.rest.startswith(_OUTWARD) else merged).contiguous()

    def _merge(self, one: ExpertTensor) -> dict[str, Tensor]:
        group = members(self.plan, one.layer, one.expert)
        assert self.plan.shares is not None
        shares = self.plan.shares[self.plan.layers.index(one.layer), list(group)]
        head = one.named(one.expert).removesuffix(one.rest)
        rests = [name.removeprefix(head) for name in self.checkpoint.tensors if name.startswith(head)]
        return averaged([{rest: self._read(one, expert, rest) for rest in rests} for expert in group], shares)

    def _read(self, one: ExpertTensor, expert: int, rest: str) -> Tensor:
        name = ExpertTensor(one.layer, expert, one.prefix, rest).named(expert)
        stored = self.checkpoint.tensors[name]
        if not rest.endswith(".weight") or stored.dtype not in ("F64", "F32", "F16", "BF16") or len(stored.shape) != 2:
            raise UnsupportedModelError(f"{name} ({stored.dtype}) cannot be averaged; drop experts instead of merging")
        value = stored.read(OpenFiles())
        return value.T if rest.startswith(_OUTWARD) else value
