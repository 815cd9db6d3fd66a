"""Routers, experts and shared experts whose outputs somebody changes: hooks show what is computed with, or refuse."""

from collections.abc import Callable
from typing import Any, no_type_check

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from moe_lens import HookedMoE
from moe_lens.errors import UnsupportedModelError
from tests.matrix.configs import build, tokens


def last(model: Any, name: str) -> Any:
    found = [module for path, module in model.named_modules() if path.endswith(f".{name}")]
    return found[-1]


def listened(model: Any, layer: int = -1) -> Any:
    layer = model.moe_layers[layer]
    return model.run_with_cache(tokens(), names_filter=lambda name: name.startswith(f"blocks.{layer}.mlp.hook_"))[1]


class LowRank(MixtralTopKRouter):
    """As an adapter computes a router: transformers' own forward with an addition of low rank to its product."""

    @no_type_check
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = hidden_states.reshape(-1, self.hidden_dim)
        logits = F.linear(x, self.weight) + F.linear(F.linear(x, self.A), self.B)
        weights, indices = torch.topk(F.softmax(logits.float(), -1), self.top_k, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True), indices


class LowRankLinear(nn.Linear):
    """The same for a linear layer inside a router."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + super().forward(input.flip(-1))


def low_rank(router: Any) -> None:
    router.A, router.B = nn.Parameter(torch.randn(4, 40)), nn.Parameter(torch.randn(8, 4))
    router.__class__ = LowRank


def scaled(router: Any) -> None:
    forward = router.forward
    router.forward = lambda x: (out := forward(x)) and (out[0] / 2, *out[1:])


def other_layer(router: Any) -> None:
    router.__class__ = type(router)
    router.layer.__class__ = LowRankLinear


CHANGES: dict[str, tuple[str, str, Callable[[Any], None], str]] = {
    "class": ("mixtral", "mlp.gate", low_rank, r"LowRank\.forward is not transformers'"),
    "method": ("mixtral", "mlp.gate", scaled, r"MixtralTopKRouter\.forward was replaced by scaled"),
    "layer": ("dbrx", "ffn.router", other_layer, r"LowRankLinear\.forward is not transformers'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_router_that_is_not_transformers_own_is_refused(change: str) -> None:
    model_type, part, make, said = CHANGES[change]
    hf: Any = build(model_type)
    make(last(hf, part))
    right = hf(tokens()).logits
    with pytest.raises(UnsupportedModelError, match=f"^{said}[^\n]*Wrap the model as transformers builds it"):
        HookedMoE.from_hf(hf, check=False)
    assert torch.equal(hf(tokens()).logits, right), "the model is as it was"


class Added(nn.Module):
    """A weight with an addition of low rank."""

    def __init__(self, rows: int, columns: int, rank: int):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(rank, columns)), nn.Parameter(torch.randn(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


def test_logits_of_a_parametrised_router_are_those_that_it_chooses_by() -> None:
    hf: Any = build("mixtral")
    router = last(hf, "mlp.gate")
    own = router.weight.detach().clone()
    added = Added(*own.shape, rank=len(own))  # as many columns as there are experts
    parametrize.register_parametrization(router, "weight", added)
    model: Any = HookedMoE.from_hf(hf)
    layer = model.moe_layers[-1]
    cache = listened(model)
    x, shown = cache[f"blocks.{layer}.mlp.hook_in"], cache["router_logits", layer]
    assert torch.allclose(shown, x @ (own + added.B @ added.A).T, atol=1e-4)
    assert not torch.allclose(shown, x @ own.T, atol=1e-1), "a control"
    assert torch.equal(cache["expert_indices", layer], shown.topk(model.top_k).indices)
