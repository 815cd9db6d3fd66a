"""HTML of texts, whole in itself: elements, and what circuitsvis' script, which stands on it once, draws into them."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lens.errors import InputError
from moe_lens.reprs import TRUST
from moe_lens.storage import written_whole
from moe_lens.viz.token_text import readable

LARGEST = 5_000_000
"""Bytes of data in a drawing: a notebook that holds more is slow to open and to save."""
UNTRUSTED = f"A script draws here, and this notebook is not trusted to run it: {TRUST}."
"""Stands where a drawing will be, until it is drawn."""
_CALL = "CircuitsVis.render("
_ELEMENT = re.compile(r"<div (id=\"([\w-]+)\"[^>]*)/>")
_UNCOLOURED = (
    '<style>#{} span[style*="rgba(0, 0, 0, 0)"] {{ color: black !important; background: white !important; }}</style>'
)
"""Where all values are 0 circuitsvis divides 0 by 0, and draws white tokens on no colour: nobody would see them."""


@dataclass(frozen=True)
class TokensHTML:
    """Texts, token by token, as HTML that needs no network."""

    body: str
    """Elements."""
    calls: tuple[str, ...] = ()
    """Of circuitsvis' functions, each of which draws into an element."""

    @property
    def local_src(self) -> str:
        """Everything, with circuitsvis' script (1.3 MB) once if something is drawn by it.

        A page runs that script once, however many outputs of a notebook hold it.
        """
        if not self.calls:
            return self.body
        once = f"globalThis.CircuitsVis ??= (() => {{\n{_bundle()}\nreturn CircuitsVis;\n}})();"
        script = "\n".join([once, *self.calls])
        return f'{self.body}\n<script crossorigin type="module">\n{script}\n</script>'

    def _repr_html_(self) -> str:
        return self.local_src

    def __html__(self) -> str:
        return self.local_src

    def __str__(self) -> str:
        return self.local_src

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


def beside(**drawings: TokensHTML) -> TokensHTML:
    """Several drawings on one page under their names, one below another; circuitsvis' script stands on it once.

    Args:
        drawings: Each under the name that is to stand above it.
    """
    parts = [f"<section><h3>{html.escape(name)}</h3>\n{of.body}\n</section>" for name, of in drawings.items()]
    return TokensHTML("\n".join(parts), tuple(call for of in drawings.values() for call in of.calls))


def drawn(rendered: Any, what: str, instead: str) -> TokensHTML:
    """What circuitsvis rendered, from its local source: its own `_repr_html_` asks the network.

    Args:
        rendered: By a function of circuitsvis.
        what: It shows, for the message.
        instead: What to do if there is too much of it.

    Raises:
        InputError: More than `LARGEST`.
    """
    before, _, call = rendered.local_src.rpartition(_CALL)
    # No text in the data can end the script, whatever it holds.
    call = _CALL + call.rpartition("</script>")[0].rstrip().replace("<", "\\u003c")
    if len(call) > LARGEST:
        too_much(len(call), what, instead)
    # It closes its element as only XML may: what follows on a page would be inside, and be drawn over.
    found = _ELEMENT.match(before.lstrip())
    assert found is not None, "circuitsvis begins with one element"
    return TokensHTML(f"{_UNCOLOURED.format(found[2])}<div {found[1]}>{UNTRUSTED}</div>", (call,))


def too_much(size: int, what: str, instead: str) -> None:
    """Refuse that much data."""
    raise InputError(f"{what} would take {size / 1e6:.1f} MB; at most {LARGEST / 1e6:.0f} MB are drawn: {instead}")


def as_html(tokens: Sequence[str]) -> list[str]:
    """Tokens for circuitsvis, which writes them into the page as HTML."""
    return [html.escape(readable(token)) for token in tokens]


def _bundle() -> str:
    from circuitsvis.tokens import colored_tokens

    before = colored_tokens(["a"], [0.0]).local_src.rpartition(_CALL)[0]
    return before.partition('type="module">')[2].strip()
