"""What the rows of a router point at: tokens of the embedding, and the inputs of experts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize, pad

from moe_lens import names
from moe_lens.checked import AnyModel, Natural, Positive
from moe_lens.errors import HookError, InputError
from moe_lens.lenses.router_attribution import router_bias
from moe_lens.lenses.token_rows import row_batches, rows
from moe_lens.model.loading.dispatch import input_device
from moe_lens.reprs import Summary

_CHUNK = 2**12
"""Tokens of the vocabulary at a time."""


@dataclass(frozen=True, eq=False)
class RouterGeometry(Summary):
    """Router rows of one layer beside what they may point at. The mean row is subtracted: it moves all logits alike.

    Controls come with the cosines: the rows of the other experts (off the diagonal), and `random`.
    """

    layer: Natural
    tokens: Int[Tensor, "n_experts top"]
    """The tokens that each expert attracts most."""
    attraction: Float[Tensor, "n_experts top"]
    """Its router logit minus the mean over experts, where the stream is nothing but the token's embedding."""
    neurons: Float[Tensor, "n_experts n_experts"]
    """[row, expert]: root mean square cosine between the row and the input directions of the expert's neurons; NaN for
    identity experts, which have none."""
    random: float
    """What `neurons` would be for random directions, 1/√d_model."""
    inputs: Float[Tensor, "n_experts n_experts"] | None
    """[row, expert]: cosine between the row and the expert's mean input minus that of all tokens, on a corpus; NaN for
    experts that no token chose."""

    def to_frame(self) -> pd.DataFrame:
        """One row per expert and measure (`neurons`, `inputs`): own, and the mean over the other experts' rows."""
        lines = []
        for name, values in (("neurons", self.neurons), ("inputs", self.inputs)):
            if values is None:
                continue
            own = values.diagonal()
            others = (values.sum(0) - own) / max(1, len(own) - 1)
            pairs = zip(own.tolist(), others.tolist(), strict=True)
            lines += [(expert, name, *pair) for expert, pair in enumerate(pairs)]
        return pd.DataFrame(lines, columns=["expert", "measure", "own", "others"])


@torch.no_grad()
def router_geometry(
    model: AnyModel, layer: Natural, texts: Iterable[Any] | None = None, *, top: Positive = 10, batch: Positive = 8
) -> RouterGeometry:
    """Compare a router's rows with token embeddings and with what experts read.

    Args:
        model: A `HookedMoE`.
        layer: A layer with experts.
        texts: A corpus, as for `expert_vocabulary`; without one, there are no mean inputs.
        top: How many tokens to keep for each expert.
        batch: Rows of text at a time.

    Raises:
        HookError: A dense layer.
        InputError: The corpus holds no token, or something else than text; no norm stands before the experts; or router
            and experts read different inputs.
    """
    if layer not in model.moe_layers:
        raise HookError(f"layer {layer} has no router; the layers with experts are {list(model.moe_layers)}")
    if model.family.reads_own or model.family.narrows:
        raise InputError(
            f"routers of {model.family.model_type} do not read what its experts read: the two cannot be compared"
        )
    wide = torch.promote_types(model.W_router[layer].dtype, torch.float32)
    whole = model.W_router[layer].detach().to(wide)
    tokens, attraction = _attraction(model, layer, whole, top)
    directions = normalize(whole - whole.mean(0), dim=-1)
    branches = [model.W_gate[layer]] + ([model.W_in[layer]] if model.W_in[layer] is not model.W_gate[layer] else [])
    squares = [(directions @ normalize(branch.detach().to(wide), dim=1)).square().mean(-1) for branch in branches]
    neurons = torch.stack(squares).mean(0).sqrt().T  # [expert, row] so far
    neurons = pad(neurons, (0, len(whole) - neurons.shape[1]), value=torch.nan)
    found = None if texts is None else _inputs(model, layer, directions, texts, batch)
    return RouterGeometry(layer, tokens, attraction, neurons.cpu(), model.cfg.d_model**-0.5, found)


def _attraction(model: Any, layer: int, router: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Tokens whose embedding, alone and normed as the layer norms its stream, gives an expert the largest logits."""
    matrix, norm = model.W_E, getattr(model.blocks[layer], "ln2", None)
    if norm is None:
        raise InputError(
            f"layer {layer} has no norm of its own before its experts: embeddings cannot be read through it"
        )
    bias, place = router_bias(model, layer), router.device
    factor = model.family.logits_factor  # Laguna's bound: who multiplies by one (Muse Spark) has narrower experts
    bound = float(getattr(getattr(model._moe(layer), model.family.router), factor)) if factor else 0.0
    best, which = torch.full((2, len(router), 0), 0.0, device=place)
    which = which.long()
    for ids in torch.arange(len(matrix), device=matrix.device).split(_CHUNK):
        part = model.embed(ids[None])  # and not the matrix: Inkling norms its rows
        unit = part / part.float().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30).to(part)
        logits = router @ norm(unit.to(place)).to(router)[0].T
        logits = logits if bias is None else logits + bias.detach().to(logits)[:, None]
        logits = (logits / bound).tanh() * bound if bound > 0 else logits
        logits = logits - logits.mean(0)
        best, order = torch.cat([best, logits], -1).topk(min(top, best.shape[-1] + len(ids)), dim=-1)
        which = torch.cat([which, ids.to(place).expand_as(logits)], -1).gather(-1, order)
    return which.cpu(), best.float().cpu()


def _inputs(model: Any, layer: int, directions: Tensor, texts: Iterable[Any], batch: int) -> Tensor:
    """[row, expert]: cosines with the centred mean inputs, over a stream of text."""
    d_model, n_experts = model.cfg.d_model, model.n_experts
    sums, total = torch.zeros(n_experts, d_model, dtype=torch.float64), torch.zeros(d_model, dtype=torch.float64)
    counts, tokens = torch.zeros(n_experts, dtype=torch.long), 0
    wanted = [names.mlp(name, layer) for name in (names.MLP_IN, names.EXPERT_INDICES)]
    place = input_device(model.original_model)
    for part in row_batches(rows(model, texts), batch):
        _, cache = model.run_with_cache(
            part.tokens.to(place),
            names_filter=wanted,
            stop_at_layer=layer + 1,
            attention_mask=part.mask.long().to(place),
        )
        read, chosen = (cache[name].cpu()[part.mask] for name in wanted)
        read = read.double()
        total += read.sum(0)
        tokens += len(read)
        used = chosen >= 0  # a token may have fewer experts than slots
        counts += torch.bincount(chosen[used], minlength=n_experts)
        sums.index_add_(0, chosen[used], read.repeat_interleave(used.sum(-1), dim=0))
    if not tokens:
        raise InputError("the corpus holds no token")
    means = sums / counts[:, None] - total / tokens  # NaN where no token came
    return (directions.cpu().double() @ normalize(means, dim=-1).T).float()
