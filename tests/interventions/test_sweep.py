"""A sweep's values are those of one full forward pass per variant, whatever the family, the padding and the stacking."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import names
from moe_lens.errors import InputError
from moe_lens.interventions.metrics import Loss, Logit, LogitDifference, LogProb
from moe_lens.interventions.sweep import CleanRun, Variant, sweep, token_sweep
from tests.families import CONFIGS, tokens
from tests.wrapped import deviation, untouched, wrapped

families = pytest.mark.parametrize("family", CONFIGS)
routings = pytest.mark.parametrize("routing", ["free", "frozen"])

F64 = 1e-14  # relative to the largest logit: the same products in other batches

PADDED = {
    "none": None,
    "left": torch.tensor([[0] * 3 + [1] * 9, [1] * 12]),
    "right": torch.tensor([[1] * 12, [1] * 8 + [0] * 4]),
}


def naive(model: Any, run: CleanRun, hooks: list[Any], metric: Any, routing: str, first: int, **kwargs: Any) -> float:
    """The metric of one full forward pass with hooks."""
    frozen = []
    if routing == "frozen":
        for layer in model.moe_layers:
            if layer >= first:
                clean = run.indices(layer)
                frozen.append((names.mlp(names.EXPERT_INDICES, layer), lambda value, hook, clean=clean: clean))
    with torch.no_grad():
        logits = model.run_with_hooks(run.cache.tokens, fwd_hooks=frozen + hooks, **kwargs)
    return metric(logits).item()


def bent(at: Tensor) -> Callable[..., Tensor]:
    """A hook that changes an activation where `at` [batch, pos] is true, and not along itself: norms ignore scale."""

    def bend(value: Tensor, hook: Any) -> Tensor:
        where = at.view(*at.shape, *[1] * (value.ndim - 2))
        along = torch.linspace(-1, 1, value.shape[-1], dtype=value.dtype)
        return torch.where(where, value * (1 + along) + 0.2 * along, value)

    return bend


def edits(model: Any) -> list[tuple[int, str]]:
    """(layer, hook) of edits in every layer, through every kind of hook."""
    found = []
    for layer in range(model.cfg.n_layers):
        found += [(layer, names.block(hook.name, layer)) for hook in names.RESIDUAL_HOOKS]
        if layer in model.moe_layers:
            some = (names.ROUTER_LOGITS, names.ROUTING_WEIGHTS, names.EXPERT_OUT, names.ROUTED_OUT, names.MLP_IN)
            found += [(layer, names.mlp(name, layer)) for name in some]
    return found


@families
@pytest.mark.parametrize(("padding", "routing"), [("none", "frozen"), ("left", "free"), ("right", "frozen")])
def test_a_variant_is_a_full_forward_pass_with_its_hooks(family: str, padding: str, routing: Any):
    case = wrapped(family, torch.float64)
    mask = PADDED[padding]
    kwargs = {} if mask is None else {"attention_mask": mask}
    run = CleanRun.of(case.model, case.tokens, **kwargs)
    at = torch.zeros(2, 12, dtype=torch.bool)
    at[0, 7] = at[1, 4:6] = True
    reads = at.clone()
    reads[0, 11] = True
    metric = LogitDifference(5, 6, reads)
    variants, expected = [], []
    for layer, name in edits(case.model):
        hooks = [(name, bent(at))]
        variants.append(Variant(layer, hooks=hooks, changed=at))
        expected.append(naive(case.model, run, hooks, metric, routing, layer, **kwargs))
    with untouched(case.model):
        found = sweep(case.model, run, variants, metric, routing=routing, batch_size=7)
    clean, scale = metric(run.logits).item(), run.logits.abs().max().item()
    assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() <= F64 * scale
    assert all(abs(value - clean) > 1e-6 for value in expected), "every edit counts"
    if mask is None:
        assert deviation(run.logits, case.logits) <= F64 * scale
