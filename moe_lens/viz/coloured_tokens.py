"""A text coloured by its routing, with circuitsvis."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_lens.checked import Natural
from moe_lens.errors import InputError, several
from moe_lens.routing import LayerRouting
from moe_lens.storage import written_whole
from moe_lens.viz.token_text import readable

_OPENED = re.compile(r"<div ([^>]*)/>")


@dataclass(frozen=True)
class TokensHTML:
    """A text coloured token by token, as HTML that needs no network."""

    local_src: str
    """An element and the script that draws it, whole in itself."""

    def _repr_html_(self) -> str:
        return self.local_src

    __html__ = __str__ = _repr_html_

    def __repr__(self) -> str:
        return f"TokensHTML({len(self.local_src):,} characters)"

    def save(self, path: str | Path) -> None:
        """Write a page of its own, whole or not at all.

        Raises:
            InputError: It cannot be written there.
        """
        page = f'<!doctype html>\n<meta charset="utf-8">\n<title>tokens</title>\n{self.local_src}\n'
        with written_whole(path) as temporary:
            temporary.write_text(page, encoding="utf-8")


def routing_tokens(
    tokens: Sequence[str], routing: LayerRouting, *, expert: Natural | None = None, batch: Natural = 0
) -> TokensHTML:
    """A text coloured by routing weight in one layer.

    Args:
        tokens: The texts of the tokens.
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

    tokens = several(tokens, "tokens")
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
    # circuitsvis writes tokens into the page as HTML.
    shown = [html.escape(readable(token)) for token in tokens]
    rendered = colored_tokens(shown, values.tolist(), min_value=0.0, max_value=float(max(values.max(), 1e-6)))
    # It closes its element as only XML may: what follows on a page would be inside, and be drawn over.
    closed, found = _OPENED.subn(r"<div \1></div>", rendered.local_src, count=1)
    assert found == 1, "circuitsvis begins with one element"
    return TokensHTML(closed)
