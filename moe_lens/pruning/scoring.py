"""Scoring the experts of a model on texts."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.checked import AnyModel, Seed
from moe_lens.data import Tokens
from moe_lens.errors import InputError
from moe_lens.interventions import Loss, expert_attribution
from moe_lens.model.cache.identity import identity
from moe_lens.pruning.reconstruction import reconstruction_error
from moe_lens.pruning.scores import Method, Scores
from moe_lens.stats import ImportanceResult, ImportanceStats
from moe_lens.studies.forward_passes import forward, input_device, nothing, predicted

_BY_LOSS: tuple[Method, ...] = ("gradient", "knockout")
"""Methods that are about the loss; the others are about routing and outputs."""
_SUMS: tuple[Method, ...] = ("summed_weight", "ean", "weighted_ean")
"""Scores that are sums over tokens: divided by their number, so that domains of any size count the same."""


def score(
    model: AnyModel,
    domains: Sequence[Tokens],
    method: Method,
    *,
    seed: Seed | None = None,
    on_batch: Callable[[], None] = nothing,
) -> Scores:
    """Score every expert of every layer on each domain; `METHODS` says what each method measures.

    Inside interventions the model is scored as it then is: experts that are left out of a token do not count there.

    Args:
        model: A `HookedMoE`.
        domains: Calibration texts.
        method: What is measured.
        seed: Of `"random"`, where it is 0 if not given.
        on_batch: Called after every batch.

    Raises:
        InputError: an unknown method, a seed for one that draws nothing, no text, two domains of one name, or fewer
            tokens in a domain than a layer has experts.
    """
    if method not in get_args(Method):
        raise InputError(f"method is {method!r}; expected one of {', '.join(get_args(Method))}")
    if seed is not None and method != "random":
        raise InputError(f"seed={seed} has no effect on {method!r}, which draws nothing; leave it out")
    if not domains:
        raise InputError("there are no texts to score experts on; give at least one domain")
    _differ(domains)
    for tokens in domains:
        if tokens.n_tokens < model.n_experts:
            raise InputError(
                f"domain {tokens.domain!r} has {tokens.n_tokens} tokens, fewer than the {model.n_experts} experts of a "
                "layer: scores would be mostly zeros. Give more text"
            )
    generator = torch.Generator().manual_seed(seed or 0)
    values = []
    for tokens in domains:
        if method == "random":
            values.append(torch.rand(len(model.moe_layers), model.n_experts, generator=generator, dtype=torch.float64))
        elif method == "naee":
            values.append(reconstruction_error(model, tokens, on_batch))
        elif method in _BY_LOSS:
            values.append(_added_loss(model, tokens, method, on_batch))
        else:
            values.append(_usage(model, tokens, method, on_batch))
    return Scores(
        method=method,
        model=identity(model),
        layers=model.moe_layers,
        top_k=model.top_k,
        domains=tuple(tokens.domain for tokens in domains),
        tokens=tuple(tokens.n_tokens for tokens in domains),
        texts=texts_digest(domains),
        values=torch.stack(values),
    )


def _differ(domains: Sequence[Tokens]) -> None:
    """Refuse two domains of one name, of which the second could not be asked for."""
    names = [tokens.domain for tokens in domains]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two domains are called {name!r}; give each a name of its own")


def texts_digest(domains: Sequence[Tokens]) -> str:
    """SHA-256 of the names and tokens of domains, in order; padding left out."""
    found = hashlib.sha256()
    for tokens in domains:
        found.update(tokens.domain.encode())
        for batch in tokens:
            for row, mask in zip(batch.tokens, batch.mask, strict=True):
                found.update(row[mask].long().numpy().tobytes() + b"|")
    return found.hexdigest()


def _added_loss(
    model: Any, tokens: Tokens, method: Method, on_batch: Callable[[], None]
) -> Float[Tensor, "layer n_experts"]:
    """Nats a token that taking an expert out adds to the loss, measured or by first order."""
    total = torch.zeros(len(model.moe_layers), model.n_experts, dtype=torch.float64)
    count = 0
    for batch in tokens:
        device = input_device(model)
        ids, mask = batch.tokens.to(device), batch.mask.to(device)
        if not (n := int(predicted(batch).sum())):
            continue
        found = expert_attribution(
            model, ids, Loss(ids, mask, batch.counted), method="gradient" if method == "gradient" else "knockout",
            per_position=False, attention_mask=mask.long(),
        )  # fmt: skip
        total -= found.values.double().cpu() * n  # an attribution is loss with the expert minus loss without
        count += n
        on_batch()
    return total / count


def importance(model: Any, tokens: Tokens, on_batch: Callable[[], None] = nothing) -> ImportanceResult:
    """What scores from routing and outputs are made of, on one domain."""
    stats = ImportanceStats(model.moe_layers, model.n_experts)
    for batch in tokens:
        forward(model, batch, stats.hooks(model, batch.counted), blocks_only=True)
        on_batch()
    return stats.result()


def _usage(
    model: Any, tokens: Tokens, method: Method, on_batch: Callable[[], None]
) -> Float[Tensor, "layer n_experts"]:
    """Scores from which experts were chosen, with what weights, and how large their outputs were."""
    found = importance(model, tokens, on_batch)
    if method == "selected":
        return (found.routed > 0).double()
    return found.score(method).double() / (found.n_tokens if method in _SUMS else 1)


def super_experts(model: AnyModel, domains: Sequence[Tokens]) -> list[tuple[int, int]]:
    """(layer, expert) of experts with extreme activations, in any of the domains, for `plan(…, protect=…)`.

    The rule is that of arXiv 2507.23279, without its restriction to the layers that form massive activations; see
    `moe_lens.stats.ImportanceResult.super_experts`.
    """
    found: set[tuple[int, int]] = set()
    for tokens in domains:
        places = importance(model, tokens).super_experts().nonzero().tolist()
        found |= {(model.moe_layers[row], expert) for row, expert in places}
    return sorted(found)
