"""Tokens that can be read: whitespace and control characters are shown, markup is escaped."""

import html
import re
import unicodedata

VISIBLE = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥", "\ufffd": "�"}


def readable(token: str) -> str:
    """A token as a reader can see it: whitespace as ␣ ↵ ⇥, other unprintable characters by code, an empty one as ∅.

    Four or more of the same whitespace become one and their number: ␣×8.

    Args:
        token: The text of one token.
    """
    shown = "".join(VISIBLE.get(character) or _printable(character) for character in token)
    return re.sub(r"([␣↵⇥])\1{3,}", lambda run: f"{run[1]}×{len(run[0])}", shown) or "∅"


def _printable(character: str) -> str:
    if unicodedata.category(character)[0] in "CZ":
        return (
            character.encode("unicode_escape").decode("ascii") if ord(character) > 127 else f"\\x{ord(character):02x}"
        )
    return character


def as_text(name: str) -> str:
    """A name that plotly shows as it is: no markup, no formula where MathJax is loaded, no place of a template."""
    return html.escape(name, quote=False).replace("$", "&#36;").replace("%{", "&#37;{")


def escaped(token: str) -> str:
    """`readable`, with what plotly and HTML would take for markup escaped."""
    return as_text(readable(token))
