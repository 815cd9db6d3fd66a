"""Routing that means nothing, or no more than the token: what any measure must be set beside.

Each gives a `RoutedBatch`, so that every accumulator can be updated with it.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from moe_lens import names
from moe_lens.checked import AnyModel, Seed
from moe_lens.errors import InputError
from moe_lens.routing import LayerRouting, Routing, affinity
from moe_lens.stats.observation import Hooks, TextBatch, each_layer, forward, routed
from moe_lens.stats.routed_batch import RoutedBatch
from moe_lens.stats.vocabulary_specialisation import VocabularyResult


def uniform_routing(batch: RoutedBatch, generator: torch.Generator) -> RoutedBatch:
    """The same routing with the ids of experts permuted at random, anew for each token and layer.

    Weights, logits and affinities move with the ids, so that margins and entropies are the model's own.
    """
    shape = (*batch.routing.indices.shape[:-1], batch.routing.n_experts)
    return permuted_experts(batch, torch.rand(shape, generator=generator))


def permuted_experts(batch: RoutedBatch, draws: Float[Tensor, "layer batch pos n_experts"]) -> RoutedBatch:
    """`uniform_routing` from uniform random numbers in [0, 1)."""
    routing = batch.routing
    renamed = draws.argsort(-1).to(routing.indices.device)

    def moved(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.empty_like(values).scatter_(-1, renamed, values)

    indices = renamed.gather(-1, routing.indices)
    return replace(
        batch, routing=replace(routing, indices=indices, logits=moved(routing.logits), probs=moved(routing.probs))
    )


def token_unigram_routing(batch: RoutedBatch, counts: VocabularyResult, generator: torch.Generator) -> RoutedBatch:
    """Every token chooses experts as often as that token of the vocabulary does in `counts`, whatever its context.

    Sets of exactly top_k experts are drawn by systematic sampling (Madow 1949) from an order drawn at random, so that
    each expert is chosen with just the frequency counted, P(e chosen | token). Ranks are drawn so that experts which
    were first more often when chosen come first more often. Weights by rank are the batch's own; logits are not known.

    Args:
        batch: Text and its routing.
        counts: By input token; of all domains together, if domains are to be compared: `merge` the accumulators.
        generator: Of the draws.

    Raises:
        InputError: counts by another token than the input, of another model, or in which a token does not occur.
    """
    shape = (*batch.routing.indices.shape[:-1], n_draws(batch.routing))
    return experts_of_tokens(batch, counts, torch.rand(shape, generator=generator))


def n_draws(routing: Routing) -> int:
    """Random numbers that `experts_of_tokens` takes for a token and layer: an order, a mark, and ranks."""
    return routing.n_experts + 1 + routing.top_k


def experts_of_tokens(
    batch: RoutedBatch, counts: VocabularyResult, draws: Float[Tensor, "layer batch pos n_draws"]
) -> RoutedBatch:
    """`token_unigram_routing` from uniform random numbers in [0, 1)."""
    routing, tokens = batch.routing, batch.require_tokens()
    if counts.by != "input":
        raise InputError(f"these counts are by {counts.by} token; a token's routing needs those by input token")
    missing = [layer for layer in routing.layers if layer not in counts.layers]
    if missing or (counts.n_experts, counts.top_k) != (routing.n_experts, routing.top_k):
        raise InputError(f"these counts are of layers {counts.layers}, {counts.top_k} of {counts.n_experts} experts")
    mask, indices = batch.mask, routing.indices.clone()
    found = tokens[mask].cpu()
    for i, layer in enumerate(routing.layers):
        seen, table = counts.table(layer)
        row = torch.searchsorted(seen, found).clamp(max=len(seen) - 1)
        if not torch.equal(seen[row], found):
            unseen = int(found[seen[row] != found][0])
            raise InputError(f"token {unseen} does not occur in the counts; count the same text, or more")
        chosen = table[0][row].double()
        *sample, ranks = draws[i][mask.cpu()].split([routing.n_experts, 1, routing.top_k], -1)
        drawn = systematic_sample(chosen / table[1][row].sum(-1, keepdim=True), routing.top_k, *sample)
        first = (table[1][row] / chosen.clamp(min=1)).gather(-1, drawn)
        noise = -(-ranks.clamp(min=1e-12).log()).log()
        order = (first.clamp(min=1e-6).log() + noise).argsort(-1, descending=True)
        indices[i][mask] = drawn.gather(-1, order).to(indices.device)
    return replace(batch, routing=replace(routing, indices=indices, logits=None, probs=None))


def systematic_sample(
    share: Float64[Tensor, "row n_experts"],
    size: int,
    order: Float[Tensor, "row n_experts"],
    mark: Float[Tensor, "row 1"],
) -> Int[Tensor, "row size"]:
    """In each row, `size` different columns, column e with probability `share[e]`; rows sum to `size`.

    Args:
        share: The probabilities.
        size: How many columns to draw.
        order: Uniform random numbers in [0, 1), which put the columns in an order.
        mark: Another such number for each row.
    """
    order = order.argsort(-1)
    ends = share.gather(-1, order).cumsum(-1)
    ends = ends * (size / ends[:, -1:])
    marks = mark.double() + torch.arange(size)
    # A column covers an interval no longer than 1, so that no two marks, which are 1 apart, fall into the same.
    place = torch.searchsorted(ends, marks, right=True).clamp(max=share.shape[-1] - 1)
    return order.gather(-1, place)


@torch.no_grad()
def random_router(model: AnyModel, batch: TextBatch, seed: Seed = 0) -> RoutedBatch:
    """What an untrained router would choose, reading what the model's own read: does specialisation take training?

    Router rows are random directions with the lengths of the model's own; the experts with the greatest logits are
    chosen, and their weights are their affinities. The model itself runs unchanged.

    Args:
        model: A `HookedMoE`.
        batch: Tokens, which of them are real, which to count, and the source of each row.
        seed: Decides the directions.

    Raises:
        InputError: Router and experts read different inputs.
    """
    layers: dict[int, LayerRouting] = {}
    forward(model, batch, random_router_hooks(model, layers, seed), blocks_only=True)
    return routed(model, batch, layers)


def random_router_hooks(model: Any, layers: dict[int, LayerRouting], seed: int) -> Hooks:
    """Hooks that put what `random_router` would choose into `layers` while the model runs.

    Raises:
        InputError: Router and experts read different inputs.
    """
    if model.family.reads_own:
        raise InputError(
            f"routers of {model.family.model_type} do not read what its experts read: another one cannot stand in"
        )
    generator = torch.Generator().manual_seed(seed)
    rows = {}
    for layer in model.moe_layers:
        own = model.W_router[layer].detach()
        random = torch.randn(own.shape, generator=generator)
        rows[layer] = random * (own.float().cpu().norm(dim=-1) / random.norm(dim=-1))[:, None]

    def keep(layer: int, of: dict[str, Tensor]) -> None:
        logits = of[names.MLP_IN].float() @ rows[layer].to(of[names.MLP_IN].device).mT
        probs = affinity(logits, model.family.score)
        weights, indices = probs.topk(model.top_k)
        layers[layer] = LayerRouting(
            layer=layer, n_experts=model.n_experts, indices=indices, weights=weights, logits=logits, probs=probs
        )

    return each_layer(model, [names.MLP_IN], keep)
