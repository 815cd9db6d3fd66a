"""MoE blocks that bypass transformers' experts interface, presented under its contract.

Parameters stay where they are, and the model's own routers select; what is told here is where the matrices are, in
which products and in which order transformers computes, so that bits stay the same, and how a block's router and
experts are called.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_lens.model.experts.expert_weights_view import Experts, Rows, looped_product
from moe_lens.model.experts.offloaded_experts import StoredMatrices
from moe_lens.model.experts.packed import Matrices
from moe_lens.model.families.family import Family

Routed = tuple[Tensor, Tensor, Tensor]
"""Logits, weights and indices, as a router under the contract returns them."""

TOPK = (torch.topk, Tensor.topk)
"""The calls by which routers select."""


# --- experts ---


class Looped(Experts):
    """Experts that transformers computes one after the other, and adds up in the order of their ids."""

    def _read_flags(self) -> bool:
        self.has_gate, self.has_bias, self.transposed, self.post_norm = True, False, False, False
        return True

    def sort(self, ids: Int[Tensor, "tokens top_k"]) -> tuple[Int[Tensor, " slots"], Int[Tensor, " slots"]]:
        """An expert's rows are first those of which it is the first choice."""
        slots = torch.arange(ids.numel(), device=ids.device).view(ids.shape).T.flatten()
        sorted_ids, order = ids.T.flatten().sort(stable=True)
        return sorted_ids, slots[order]

    def activate(self, projected: Float[Tensor, "rows width"], rows: Rows) -> Float[Tensor, "rows d_expert"]:
        """One expert after the other: activation functions round the end of a tensor otherwise than its middle."""
        return torch.cat([self.activate_one(part) for part in projected.split(rows.counts())])

    def activate_one(self, projected: Float[Tensor, "rows width"]) -> Float[Tensor, "rows d_expert"]:
        """Neurons of one expert."""
        return self.module._apply_gate(projected)

    def product(self, x: Tensor, matrix: Tensor, rows: Rows) -> Tensor:
        """One expert after the other."""
        return looped_product(x, matrix, rows)

    def total(
        self, weighted: Float[Tensor, "tokens top_k d_model"], indices: Int[Tensor, "tokens top_k"], dtype: torch.dtype
    ) -> Float[Tensor, "tokens d_model"]:
        """Each is rounded, then added to the sum of those before."""
        order = indices.argsort(-1)[..., None].expand_as(weighted)
        first, *others = weighted.to(dtype).gather(1, order).unbind(1)
        for part in others:
            first = first + part
        return first


class LongcatExperts(Looped):
    """LongCat-Flash: the last ids are identities; `gate_up_proj` has rows for them that nothing uses."""

    @property
    def n_experts(self) -> int:
        """Those with matrices and the identities."""
        return int(self.module.total_experts)

    @property
    def n_identities(self) -> int:
        """As the config's `zero_expert_num`."""
        return int(self.module.zero_expert_num)

    def activate_one(self, projected: Tensor) -> Tensor:
        """Gated."""
        return _gated(self.module.act_fn, projected)


class DbrxExperts(Looped):
    """DBRX: the matrices of all experts stand below one another in three two-dimensional parameters."""

    def _stored(self) -> list[tuple[Any, str]]:
        return [(self.module.mlp, name) for name in ("w1", "v1", "w2")]

    def cut(self, weight: Tensor) -> Float[Tensor, "expert d_expert d_model"]:
        """Each expert's rows."""
        return weight.view(self.n_experts, -1, weight.shape[-1])

    def first(self) -> list[tuple[Tensor | Matrices, Tensor | StoredMatrices | None]]:
        """Two products, one for each branch."""
        return [(self._oriented(parameter), None) for parameter in self._parameters()[:2]]

    def second(self) -> tuple[Tensor | Matrices, Tensor | StoredMatrices | None]:
        """Stored transposed."""
        return self._oriented(self._parameters()[2], transposed=True), None

    def holders(self) -> list[nn.Module]:
        """A module within."""
        return [self.module.mlp]

    def activate_one(self, projected: Tensor) -> Tensor:
        """Gated; the branches stand apart in memory."""
        activated, linear = projected.chunk(2, -1)
        return self.module.mlp.activation_fn(activated.contiguous()) * linear.contiguous()


class JetmoeExperts(Looped):
    """JetMoE: the block has two stacks of matrices, and no module of experts."""

    @property
    def n_experts(self) -> int:
        """As many as there are matrices."""
        return int(self.module.input_linear.num_experts)

    def _stored(self) -> list[tuple[Any, str]]:
        return [(holder, "weight") for holder in self.holders()]

    def holders(self) -> list[nn.Module]:
        """Two modules of the block."""
        return [self.module.input_linear, self.module.output_linear]

    def activate_one(self, projected: Tensor) -> Tensor:
        """Gated."""
        return _gated(self.module.activation, projected)

    def sort(self, ids: Int[Tensor, "tokens top_k"]) -> tuple[Int[Tensor, " slots"], Int[Tensor, " slots"]]:
        """As the router sorts them."""
        return Experts.sort(self, ids)

    def total(
        self, weighted: Float[Tensor, "tokens top_k d_model"], indices: Int[Tensor, "tokens top_k"], dtype: torch.dtype
    ) -> Float[Tensor, "tokens d_model"]:
        """Added up in the order of ids, and rounded once."""
        return super().total(weighted, indices, torch.promote_types(dtype, torch.float32)).to(dtype)


class Llama4Experts(Experts):
    """Llama 4: every expert is multiplied with every token, zeros for those that did not choose it."""

    alone = False

    def _read_flags(self) -> bool:
        self.has_gate, self.has_bias, self.transposed, self.post_norm = True, False, True, False
        return True

    def activate(self, projected: Tensor, rows: Rows) -> Tensor:  # noqa: ARG002
        """Gated."""
        return _gated(self.module.act_fn, projected)

    def product(self, x: Tensor, matrix: Tensor, rows: Rows) -> Tensor:
        """A batch of products with all tokens: of fewer rows, another algorithm may round otherwise."""
        where = rows.ids, rows.tokens
        return torch.bmm(_scattered(x, where, len(matrix), rows.n_tokens), matrix)[where]

    def total(
        self, weighted: Float[Tensor, "tokens top_k d_model"], indices: Int[Tensor, "tokens top_k"], dtype: torch.dtype
    ) -> Float[Tensor, "tokens d_model"]:
        """Over all experts."""
        token = torch.arange(len(indices), device=indices.device)[:, None]
        return _scattered(weighted, (indices, token), self.n_experts, len(indices)).sum(0).to(dtype)


def _scattered(values: Tensor, where: tuple[Tensor, Tensor], n_experts: int, n_tokens: int) -> Tensor:
    return values.new_zeros(n_experts, n_tokens, values.shape[-1]).index_put(where, values)


def _gated(act: Callable[[Tensor], Tensor], projected: Tensor) -> Tensor:
    activated, linear = projected.chunk(2, -1)
    return act(activated) * linear


KINDS: dict[str, type[Experts]] = {
    "packed": Experts,
    "looped": Looped,
    "longcat": LongcatExperts,
    "dbrx": DbrxExperts,
    "jetmoe": JetmoeExperts,
    "llama4": Llama4Experts,
}
"""By `Family.experts`."""


def experts_of(moe: Any, family: Family) -> Experts | None:
    """The experts of a MoE block; None for an MLP that has none.

    Raises:
        UnsupportedModelError: they are not what the family has, or are quantised.
    """
    module = moe if family.experts == "jetmoe" else getattr(moe, "experts", None)
    if module is None or getattr(moe, family.router, None) is None:
        return None
    return KINDS[family.experts](module, family.interleaved, family.weighs_input)


# --- routers, and blocks ---


class _WatchTopk(TorchFunctionMode):
    """Remember the last choice that a router makes."""

    indices: Tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in TOPK:
            self.indices = out[1]
        return out


def _dbrx(moe: Any, x: Tensor) -> Routed:
    """The block selects, not its router."""
    logits = moe.router(x)
    return (logits, *moe.route_tokens_to_experts(logits))


def _llama4(moe: Any, x: Tensor) -> Routed:
    """The router returns scores of all experts, zero for those not chosen."""
    with _WatchTopk() as choice:
        scores, logits = moe.router(x)
    return logits, scores.gather(1, choice.indices), choice.indices


def _jetmoe(moe: Any, x: Tensor) -> Routed:
    """The router returns weights in the order of experts, and where they belong."""
    with _WatchTopk() as choice:
        order, _, weights, _, logits = moe.router(x)
    return logits, weights.index_copy(0, order, weights).view_as(choice.indices), choice.indices


class Block(NamedTuple):
    """A block that calls its router or its experts otherwise than the contract says."""

    route: Callable[[Any, Tensor], Routed]
    """The block's own selection, of what it reads."""
    returns_logits: bool = False
    """Whether it returns the router's logits too."""


BLOCKS = {"dbrx": Block(_dbrx), "jetmoe": Block(_jetmoe), "llama4": Block(_llama4, returns_logits=True)}
"""By `Family.experts`."""


def block_forward(
    route: Callable[[Tensor], Routed],
    experts: Callable[[Tensor, Tensor, Tensor], Tensor],
    others: Callable[[Tensor], Tensor] | None,
    returns_logits: bool,
    hidden_states: Float[Tensor, "batch pos d_model"],
) -> Any:
    """What such a block computes: the sum over its experts, and what `others` gives every token."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits, weights, indices = route(x)
    out = experts(x, indices, weights)
    out = (out if others is None else out + others(x)).view_as(hidden_states)
    return (out, logits) if returns_logits else out
