"""A text coloured by its routing, with circuitsvis."""

from collections.abc import Sequence
from typing import Any

from moe_lens.errors import InputError
from moe_lens.routing import LayerRouting
from moe_lens.viz.token_text import readable

_LESS_THAN = "\ufdd0"
"""Stands for "<" until the tokens are JSON inside a script, where `</script>` must not appear; no text has it."""


def routing_tokens(tokens: Sequence[str], routing: LayerRouting, *, expert: int | None = None, batch: int = 0) -> Any:
    """A text coloured by routing weight in one layer.

    Args:
        tokens: The texts of the tokens.
        routing: Of the layer, on these tokens.
        expert: Colour by this expert's weight, 0 where it is not selected. If not given, by the share that the first
            expert has in the weights of all active ones.
        batch: Which row of the batch.

    Returns:
        circuitsvis' rendered HTML: a notebook shows it, and `str(…)` is HTML that needs the network.
    """
    from circuitsvis.tokens import colored_tokens
    from circuitsvis.utils.render import RenderedHTML

    row = (lambda values: values[batch] if values.ndim == 3 else values) if routing.indices.ndim == 3 else lambda v: v
    indices, weights = row(routing.indices), row(routing.weights).float()
    if len(tokens) != len(indices):
        raise InputError(f"{len(tokens)} tokens, and routing of {len(indices)}; pass the tokens that were routed")
    if expert is None:
        values = weights[:, 0] / weights.sum(-1).clamp(min=1e-12)
    elif 0 <= expert < routing.n_experts:
        values = (weights * (indices == expert)).sum(-1)
    else:
        raise InputError(f"expert {expert}; the layer has 0 to {routing.n_experts - 1}")
    shown = [readable(token).replace("<", _LESS_THAN) for token in tokens]
    rendered = colored_tokens(shown, values.tolist(), min_value=0.0, max_value=float(max(values.max(), 1e-6)))
    escape = "\\ufdd0", "\\u003c"
    return RenderedHTML(rendered.local_src.replace(*escape), rendered.cdn_src.replace(*escape))
