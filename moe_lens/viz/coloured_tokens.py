"""A text coloured by its routing in one layer."""

import colorsys
import html
from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.checked import Natural
from moe_lens.errors import InputError, several
from moe_lens.routing import LayerRouting
from moe_lens.viz.token_text import readable
from moe_lens.viz.tokens_html import TokensHTML as TokensHTML
from moe_lens.viz.tokens_html import drawn

_SHORTER = "give fewer tokens"


def routing_tokens(
    tokens: Sequence[str], routing: LayerRouting, *, expert: Natural | None = None, batch: Natural = 0
) -> TokensHTML:
    """A text coloured by routing weight in one layer.

    Args:
        tokens: The texts of the tokens, with or without padding.
        routing: Of the layer, on these tokens.
        expert: Colour by this expert's weight, 0 where it is not selected. If not given, by the share that the first
            expert has in the weights of all active ones.
        batch: Which row of the batch.

    Returns:
        HTML that a notebook shows, `save` writes and `str` gives; nothing of it asks the network.

    Raises:
        InputError: One text instead of tokens, tokens of another text, or no such expert.
    """
    from circuitsvis.tokens import colored_tokens

    indices, weights = of_row(tokens, routing, batch)
    if expert is None:
        values = weights[:, 0] / weights.sum(-1).clamp(min=1e-12)
    elif 0 <= expert < routing.n_experts:
        values = (weights * (indices == expert)).sum(-1)
    else:
        raise InputError(f"expert {expert}; the layer has 0 to {routing.n_experts - 1}")
    # circuitsvis writes tokens into the page as HTML.
    shown = [html.escape(readable(token)) for token in tokens]
    rendered = colored_tokens(shown, values.tolist(), min_value=0.0, max_value=float(max(values.max(), 1e-6)))
    return drawn(rendered, f"the text ({len(tokens):,} tokens)", _SHORTER)


def expert_tokens(tokens: Sequence[str], routing: LayerRouting, *, rank: Natural = 0, batch: Natural = 0) -> TokensHTML:
    """A text coloured by *which* expert each token is sent to in one layer; the expert's number stands at the token.

    Hovering shows all active experts with their weights. No script is needed.

    Args:
        tokens: The texts of the tokens.
        routing: Of the layer, on these tokens.
        rank: Of the expert, 0 the largest weight.
        batch: Which row of the batch.

    Raises:
        InputError: One text instead of tokens, tokens of another text, or no such rank.
    """
    indices, weights = of_row(tokens, routing, batch)
    if rank >= indices.shape[-1]:
        raise InputError(f"there is no rank {rank}; tokens have ranks 0 to {indices.shape[-1] - 1}")
    parts = []
    for token, of, weight in zip(tokens, indices.tolist(), weights.tolist(), strict=True):
        told = ", ".join(f"{expert} ({one:.3f})" for expert, one in zip(of, weight, strict=True) if expert >= 0)
        expert = of[rank]
        look = _LOOK if expert < 0 else f"{_LOOK}background:{_shade(expert)};"
        number = "" if expert < 0 else f'<sub style="font-size:65%">{expert}</sub>'
        title = html.escape(f"{readable(token)}: experts {told}", quote=True)
        parts.append(f'<span style="{look}" title="{title}">{html.escape(readable(token))}{number}</span>')
    about = f"layer {routing.layer}, rank {rank}: the number is the expert's, and so is the colour"
    return TokensHTML(
        f'<div class="expert-tokens" style="line-height:2;font-family:monospace">{"".join(parts)}</div>\n'
        f'<p style="font-size:80%">{html.escape(about)}</p>'
    )


def of_row(
    tokens: Sequence[str], routing: LayerRouting, batch: int
) -> tuple[Int[Tensor, "pos top_k"], Float[Tensor, "pos top_k"]]:
    """Experts and weights of one text; none at padding, where the tokens include it.

    Raises:
        InputError: One text instead of tokens, tokens of another text, or no such row.
    """
    tokens = several(tokens, "tokens")
    indices, weights, real = routing.indices, routing.weights, routing.mask
    if indices.ndim == 3:
        if not 0 <= batch < len(indices):
            raise InputError(f"there is no row {batch} of the batch; the routing has 0 to {len(indices) - 1}")
        indices, weights, real = indices[batch], weights[batch], None if real is None else real[batch]
    if real is not None:
        real = real.to(indices.device)
        if len(tokens) == int(real.sum()):
            indices, weights = indices[real], weights[real]
        else:
            indices, weights = indices.masked_fill(~real[:, None], -1), weights.masked_fill(~real[:, None], 0)
    if len(tokens) != len(indices):
        raise InputError(f"{len(tokens)} tokens, and routing of {len(indices)}; pass the tokens that were routed")
    return indices, weights.float()


_LOOK = "color:#10212e;border-radius:3px;padding:1px 2px;margin:0 1px;display:inline-block;white-space:pre;"


def _shade(expert: int) -> str:
    """A light colour; neighbours in number are far apart in hue, and three lightnesses tell near hues apart.

    In the old notation: JupyterLab takes others out of outputs that it does not trust, and leaves the dark ink.
    """
    parts = colorsys.hls_to_rgb(expert * 137.508 % 360 / 360, (0.72, 0.82, 0.9)[expert % 3], 0.7)
    red, green, blue = (round(255 * part) for part in parts)
    return f"rgb({red},{green},{blue})"
