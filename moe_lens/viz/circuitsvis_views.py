"""Routing of texts in all layers, with selectors for layer and expert: circuitsvis with experts as its neurons."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.checked import Natural, Positive
from moe_lens.errors import InputError, several
from moe_lens.ids import ids
from moe_lens.routing import LayerRouting, Routing
from moe_lens.viz.coloured_tokens import expert_tokens, of_row
from moe_lens.viz.tokens_html import LARGEST, TokensHTML, as_html, beside, drawn, too_much

DIGITS = 3
"""Of a weight behind the point: more are not seen, and are most of the data."""
SMALLEST = 4
"""Bytes of a number at least."""
NOBODY = "no token selected this expert"
_FEWER = "give fewer tokens, or some of the layers: layers=[…]"


def expert_activations(
    tokens: Sequence[str], routing: Routing, *, layers: Iterable[int] | None = None, batch: Natural = 0
) -> TokensHTML:
    """A text coloured by routing weight, with selectors for layer and expert; 0 where the expert is not selected.

    Args:
        tokens: The texts of the tokens.
        routing: Of all layers, on these tokens.
        layers: Some of them; all if not given.
        batch: Which row of the batch.

    Raises:
        InputError: One text instead of tokens, tokens of another text, no such layer, or more than 5 MB of data.
    """
    from circuitsvis.activations import text_neuron_activations

    chosen, exact = _weights(tokens, routing, layers, batch)
    values = _rounded(exact)
    rendered = text_neuron_activations(
        as_html(tokens), values, "Layer", "Expert", first_dimension_labels=[str(layer) for layer in chosen]
    )
    return drawn(rendered, _said(values), _FEWER)


def top_expert_tokens(
    texts: Sequence[Sequence[str]],
    routings: Sequence[Routing],
    *,
    layers: Iterable[int] | None = None,
    most: Positive = 10,
) -> TokensHTML:
    """The tokens of each text with the largest weights of each expert, experts side by side.

    Ranks are within one text, which a selector chooses. "Bottomk" are its tokens with the smallest weight, most of them
    tokens that did not select the expert. Of one text, circuitsvis shows expert 0 alone until others are chosen.

    Args:
        texts: Tokens of each.
        routings: Of all layers, one for each text.
        layers: Some of them; all if not given.
        most: Tokens to list.

    Raises:
        InputError: Not one routing for each text, tokens of another text, no such layer, or more than 5 MB of data.
    """
    from circuitsvis.topk_tokens import topk_tokens

    made = [_weights(tokens, routing, layers, 0) for tokens, routing in _pairs(texts, routings)]
    shown = [as_html(tokens) for tokens in texts]
    values = [_rounded(of, 2 * DIGITS).permute(1, 0, 2).contiguous().numpy() for _, of in made]  # sorted by these
    labels = [str(layer) for layer in made[0][0]]
    rendered = topk_tokens(shown, values, max_k=most, third_dimension_name="Expert", first_dimension_labels=labels)
    return drawn(rendered, f"the tokens of {len(texts)} texts", f"{_FEWER}, or most=")


def top_expert_contexts(
    texts: Sequence[Sequence[str]],
    routings: Sequence[Routing],
    *,
    layers: Iterable[int] | None = None,
    experts: Iterable[int] | None = None,
    most: Positive = 5,
    around: Positive = 8,
) -> TokensHTML:
    """Where each expert has its largest weights in all texts: the token and those around it, coloured by its weight.

    The strongest alone mislead about what an expert does most of the time: the atlas shows others beside them.

    Args:
        texts: Tokens of each.
        routings: Of all layers, one for each text.
        layers: Some of them; all if not given.
        experts: Some of them; all if not given. Where no token selected an expert, that is said.
        most: Contexts of each expert.
        around: Tokens before and after.

    Raises:
        InputError: Not one routing for each text, tokens of another text, no such layer or expert, or more than 5 MB.
    """
    from circuitsvis.topk_samples import topk_samples

    made = [_weights(tokens, routing, layers, 0) for tokens, routing in _pairs(texts, routings)]
    chosen, n_experts = made[0][0], routings[0].n_experts
    numbers = list(range(n_experts)) if experts is None else list(ids("experts", experts))
    if wrong := [expert for expert in numbers if not 0 <= expert < n_experts]:
        raise InputError(f"there is no expert {wrong[0]}; a layer has 0 to {n_experts - 1}")
    shown = [as_html(tokens) for tokens in texts]
    every = torch.cat([of for _, of in made])
    text_of = torch.cat([torch.full((len(of),), number) for number, (_, of) in enumerate(made)])
    starts = torch.tensor([0, *(len(of) for _, of in made)]).cumsum(0)
    words, values = [], []
    for row in range(len(chosen)):
        words.append([])
        values.append([])
        for expert in numbers:
            column = every[:, row, expert]
            order = column.nan_to_num(-1).argsort(descending=True, stable=True)[:most].tolist()
            best = [at for at in order if not column[at].isnan()]
            spans = []
            for at in best:
                number = int(text_of[at])
                place = at - int(starts[number])
                spans.append((number, max(0, place - around), min(len(shown[number]), place + around + 1)))
            words[-1].append([shown[text][low:high] for text, low, high in spans] or [[NOBODY]])
            values[-1].append(
                [made[text][1][low:high, row, expert].nan_to_num(0).tolist() for text, low, high in spans] or [[0.0]]
            )
    rendered = topk_samples(
        words,
        [[[[round(value, DIGITS) for value in one] for one in of] for of in layer] for layer in values],
        first_dimension_name="Expert",
        zeroth_dimension_labels=[str(layer) for layer in chosen],
        first_dimension_labels=[str(expert) for expert in numbers],
    )
    return drawn(rendered, f"the contexts of {len(numbers)} experts in {len(chosen)} layers", f"{_FEWER}, experts=")


def attention_beside_routing(
    tokens: Sequence[str], attention: Float[Tensor, "head dest src"], routing: LayerRouting, *, batch: Natural = 0
) -> TokensHTML:
    """Attention patterns of a layer's heads, and which expert each token is sent to after them.

    Args:
        tokens: The texts of the tokens.
        attention: The pattern of each head (`cache["pattern", layer][0]`); rows sum to 1.
        routing: Of the layer.
        batch: Which row of the routing.

    Raises:
        InputError: One text instead of tokens, tokens of another text, or more than 5 MB of data.
    """
    from circuitsvis.attention import attention_patterns

    expert = expert_tokens(tokens, routing, batch=batch)
    if attention.ndim != 3 or tuple(attention.shape[1:]) != (len(tokens), len(tokens)):
        raise InputError(
            f"attention has shape {tuple(attention.shape)}, and there are {len(tokens)} tokens; expected "
            "[head, dest, src] of one text"
        )
    shown = attention.detach().cpu().double().mul(1000).round().div(1000)
    if shown.numel() * SMALLEST > LARGEST:
        too_much(shown.numel() * SMALLEST, "the patterns", "give fewer tokens, or some of the heads")
    rendered = attention_patterns(as_html(tokens), shown.tolist())
    patterns = drawn(rendered, "the patterns", "give fewer tokens, or some of the heads")
    return beside(**{"attention of each head": patterns, f"experts of layer {routing.layer}": expert})


def _pairs(texts: Sequence[Sequence[str]], routings: Sequence[Routing]) -> list[tuple[Sequence[str], Routing]]:
    texts, routings = several(texts, "texts"), list(routings)
    if not texts or len(texts) != len(routings):
        raise InputError(f"{len(texts)} texts, and routing of {len(routings)}; pass one for each, of one text or more")
    sizes = {(routing.layers, routing.n_experts) for routing in routings}
    if len(sizes) > 1:
        raise InputError("the routings are of several models: their layers or experts differ")
    return list(zip(texts, routings, strict=True))


def _weights(
    tokens: Sequence[str], routing: Routing, layers: Iterable[int] | None, batch: int
) -> tuple[list[int], Float[Tensor, "pos layer n_experts"]]:
    """Layers, and the weight that each token gives each expert; NaN where it has not selected it."""
    chosen = list(routing.layers if layers is None else ids("layers", layers))
    of = [of_row(tokens, routing.layer(layer), batch) for layer in chosen]
    count = len(tokens) * len(chosen) * routing.n_experts
    if count * SMALLEST > LARGEST:
        too_much(
            count * SMALLEST, f"{len(tokens):,} tokens × {len(chosen)} layers × {routing.n_experts} experts", _FEWER
        )
    shape = len(tokens), len(chosen), routing.n_experts + 1  # one for empty slots
    dense = torch.full(shape, torch.nan, dtype=torch.float64)
    for row, (indices, weights) in enumerate(of):
        at = indices.cpu().long().masked_fill(indices.cpu() < 0, routing.n_experts)
        dense[:, row].scatter_(1, at, weights.detach().cpu().double())
    return chosen, dense[..., :-1]


def _rounded(values: Float[Tensor, "*axes"], digits: int = DIGITS) -> Float[Tensor, "*axes"]:
    return values.nan_to_num(0).mul(10**digits).round().div(10**digits)


def _said(values: Tensor) -> str:
    return " × ".join(f"{n:,} {name}" for n, name in zip(values.shape, ("tokens", "layers", "experts"), strict=True))
