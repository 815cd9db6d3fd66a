"""Errors and warnings that are the user's to read: each says what came, what was expected, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class MoELensError(Exception):
    """Base of every error that moe_lens raises on purpose."""


class CheckpointError(MoELensError):
    """A checkpoint is incomplete, or contradicts its own config; the message names file and tensor."""


class UnsupportedModelError(MoELensError):
    """A model, or a feature of its config, whose mathematics moe_lens does not know."""


class AbsentParameterError(UnsupportedModelError, AttributeError):
    """A parameter of TransformerLens's that a model does not have in that form; `hasattr` is then False."""


class HookError(MoELensError):
    """A hook was requested where there is none, or returned something that cannot be used."""


class InputError(MoELensError):
    """Texts, tokens or arguments that cannot be used."""


class UnfitError(InputError):
    """What was asked for cannot be done with this model or these texts: too few experts, domains or sources."""


class TokenError(InputError, AssertionError):
    """A text that is not one token, or a token that is not in a text; TransformerLens raises an `AssertionError`."""


class SelfCheckError(MoELensError):
    """The hooked parts of a freshly loaded model do not sum to the whole; the message names layer and deviation."""


class InUseError(MoELensError):
    """A model is in use by another thread, or by another task of an event loop."""


class PeerError(MoELensError):
    """Another of several processes has ended, and this one cannot continue without it."""


class IncompatibleVersionError(MoELensError, ImportError):
    """The installed release of a library lacks what moe_lens uses of it; the message names what."""


def several(given: T, what: str) -> T:
    """The items of `given`, unless it is a single text, over which Python would iterate letter by letter.

    Args:
        given: What is about to be iterated over.
        what: The name of the items in the message, in the plural: "texts".

    Raises:
        InputError: `given` is a single text.
    """
    if isinstance(given, str | bytes):
        raise InputError(f"got one text, {given[:40]!r}, for {what}; expected several {what}: put it in a list")
    return given


def not_files(given: Iterable[Any], what: str, instead: str) -> None:
    """Raise an error if every text is the name of an existing file: then the files were meant.

    Args:
        given: The texts; items that are not texts are ignored, if any item is a text.
        what: What they are, for the message: "the texts of domain 'a'".
        instead: What to write for a file.

    Raises:
        InputError: they are names of files.
    """
    texts = [one for one in given if isinstance(one, str)]
    if texts and all(map(_is_file, texts)):
        raise InputError(f"{what} are names of files ({texts[0]!r:.80}), and would be read as the texts; {instead}")


def _is_file(text: str) -> bool:
    try:
        return Path(text).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # too long for a name, with a zero in it, or of nobody's home
        return False


def near_miss(wrong: str, known: Iterable[object]) -> str:
    """A suggestion for an unknown name, for the end of a message: `; did you mean 'german'?`, or nothing.

    Args:
        wrong: The unknown name.
        known: The names that exist.
    """
    folded = {str(name).casefold(): str(name) for name in known if str(name) != wrong}  # a folder lacks something else
    close = get_close_matches(wrong.casefold(), folded, n=1, cutoff=0.7)
    return f"; did you mean {folded[close[0]]!r}?" if close else ""


def one_line(error: object) -> str:
    """What an error says, or any text, in one line."""
    return " ".join(str(error).split())


def a_kind(value: Any) -> str:
    """What a value, or a class, is called in a message: "a list", "an int"."""
    kind = value if isinstance(value, type) else type(value)
    name = "None" if kind is type(None) else _SAID.get(kind.__name__, kind.__name__)
    return name if name == "None" or "," in name else f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


_SAID = {
    "Iterable": "several, in a list",
    "Sequence": "several, in a list",
    "Mapping": "dictionary",
    "ndarray": "numpy array",
    "integer": "whole number",
    "Domain": "Domain (what Domain.of makes of texts)",
    "Passage": "Passage (what Domain.of makes of a text)",
    "Tokens": "Tokens (what tokenize makes of a domain)",
}
"""Classes that are called otherwise."""


def check_characters(what: str, text: str) -> None:
    """Raise an error if a text contains half of a surrogate pair.

    Args:
        what: The text, for the message.
        text: The text to check.

    Raises:
        InputError: It does, so that no tokenizer can read it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise InputError(
            f"{what} holds half of a character ({half}, a lone surrogate), which no tokenizer can read; texts that "
            "were cut inside an emoji do"
        ) from None


class UntestedVersionWarning(UserWarning):
    """The installed release of a library is newer than those that moe_lens is tested with."""
