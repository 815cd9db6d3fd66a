"""Labels of tokens: from spans of texts, or what a regular expression finds."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.checked import AnyModel
from moe_lens.data import Domain, Domains, Passage, in_memory
from moe_lens.data.files import read_objects
from moe_lens.data.rows import passage
from moe_lens.errors import InputError, a_kind
from moe_lens.studies.token_tables import ABOUT, KEYS, token_rows

PATTERNS: dict[str, str] = {"number": r"\d+", "bracket": r"[()\[\]{}]", "capital": r"\b[A-ZÄÖÜÉÈÀ]\w*"}
"""What is labelled where nothing else is asked for: a regular expression for each label."""


_ROW = 'an object with "text" and "spans", a list of [start, end, label] in it'


class Span(NamedTuple):
    """A piece of a text, and what it is."""

    start: int
    """Its first character."""
    end: int
    """The character after its last."""
    label: str


def label_tokens(model: AnyModel, domains: Domains, find: Callable[[str, int, str], Iterable[Span]]) -> pd.DataFrame:
    """A row per token of every passage: domain, document, position, its id, and whether spans of each label are there.

    A token has the labels of all spans that cover one of its characters. BOS, and whatever else the tokenizer puts
    before a text, has a row only where the text spells it out itself, as a rendered chat template does. A label of an
    expression that finds nothing, or of spans that cover no token, has a column, too.

    Args:
        model: Whose tokenizer reads the texts.
        domains: One, several, or a dictionary of texts by name; in memory.
        find: From the name of a domain, the number of a passage and its text to its spans, or (start, end, label).

    Raises:
        InputError: A domain that is streamed, a tokenizer that does not know its characters, no span at all, or one
            that is none of the text, or whose label is the name of a column that every table of tokens has.
    """
    if model.tokenizer is None or not getattr(model.tokenizer, "is_fast", False):
        raise InputError("this model has no tokenizer that knows its characters: give a table of tokens instead")
    rows: list[tuple[str, int, int, int, set[str]]] = []
    labels = set(find.expressions) if isinstance(find, ByPattern) else set[str]()
    for domain in in_memory(domains):
        for number, one in enumerate(domain.passages):
            encoded = model.tokenizer(one.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            opening, own = model.own_ids(one.text)
            if list(encoded["input_ids"]) not in (own, [*opening, *own]):
                raise InputError(f"{one.origin}: its tokens are not those of its text alone; give a table of tokens")
            spans = _spans(find(domain.name, number, one.text), one, len(one.text))
            labels.update(span.label for span in spans)
            offsets = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            for position, (token, (start, end)) in enumerate(offsets):
                here = {s.label for s in spans if s.start < end and start < s.end}
                rows.append((domain.name, number, position, token, here))
    if not any(row[-1] for row in rows):
        raise InputError("no token has a label: no span was given, or no expression found anything")
    frame = pd.DataFrame([row[:-1] for row in rows], columns=["domain", "document", "position", "token"])
    return frame.assign(**{label: [label in row[-1] for row in rows] for label in sorted(labels)})


def _spans(found: Any, one: Passage, length: int) -> list[Span]:
    """What was found in a passage, as spans."""
    if not isinstance(found, Iterable) or isinstance(found, str | bytes | Mapping):
        raise InputError(f"{one.origin}: find gave {a_kind(found)}; expected spans, (start, end, label) each")
    return [_span(each, f"{one.origin}: find gave", length) for each in found]


def _span(given: Any, who: str, length: int) -> Span:
    """A span that lies in a text of some characters.

    Raises:
        InputError: It does not.
    """
    if not isinstance(given, tuple | list) or len(given) != 3:
        raise InputError(f"{who} {given!r:.80}; expected (start, end, label)")
    start, end, label = given
    whole = all(isinstance(at, Integral) and not isinstance(at, bool) for at in (start, end))
    if not whole or not 0 <= start < end <= length:
        raise InputError(f"{who} a span from {start!r:.20} to {end!r:.20} of a text of {length} characters")
    if wrong := _wrong_label(label):
        raise InputError(f"{who} {wrong}")
    return Span(int(start), int(end), label)


def _wrong_label(label: Any) -> str:
    """What is wrong with a label, if anything is."""
    if not isinstance(label, str) or not label.strip():
        return f"the label {label!r:.80}; expected a text"
    if label in ABOUT:
        return f"the label {label!r}, which is a column of every table of tokens; call it otherwise"
    return ""


@dataclass(frozen=True)
class ByPattern:
    """Spans that regular expressions find, each with the name of its expression; empty matches are left out."""

    expressions: Mapping[str, re.Pattern[str]]

    def __call__(self, domain: str, number: int, text: str) -> list[Span]:  # noqa: ARG002
        """Those of a text."""
        found = [(label, match) for label, of in self.expressions.items() for match in of.finditer(text)]
        # `x*` is found between all letters, too
        return [Span(match.start(), match.end(), label) for label, match in found if match.group()]


def by_pattern(patterns: Mapping[str, str]) -> ByPattern:
    """Regular expressions by the label of what they find, for `label_tokens`; empty matches are left out.

    Raises:
        InputError: One is no regular expression.
    """
    compiled = {}
    for label, pattern in patterns.items():
        if wrong := _wrong_label(label):
            raise InputError(wrong)
        try:
            compiled[label] = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise InputError(f"{label}: {pattern!r} is no regular expression ({error})") from None
    return ByPattern(compiled)


def read_spans(path: str | Path) -> tuple[Domain, Callable[[str, int, str], Iterable[Span]]]:
    """Texts with labelled spans, a line for each as JSON: text, spans ([start, end, label], in characters), source.

    Returns:
        The domain "spans", and what `label_tokens` finds in it.

    Raises:
        InputError: It cannot be read, or a line is not so; the message names it.
    """
    passages, spans = [], []
    for where, row in read_objects(path, _ROW):
        one, found = _row(row, where, str(path))
        passages.append(one)
        spans.append(found)
    if not passages:
        raise InputError(f"{path}: holds no text")
    return Domain("spans", tuple(passages)), lambda domain, number, text: spans[number]  # noqa: ARG005


def _row(row: dict[str, Any], where: str, file: str) -> tuple[Passage, list[Span]]:
    text, spans = row.get("text"), row.get("spans")
    if not isinstance(text, str) or not text or not isinstance(spans, list):
        raise InputError(f"{where}: expected {_ROW}")
    one = passage(text, row.get("source"), where, file)
    return one, [_span(each, f"{where}: there is", len(text)) for each in spans]


class LabelTable:
    """Labels by domain, passage and position."""

    def __init__(self, frame: pd.DataFrame):
        """Columns as `token_rows` has them, and one of truth values for each label; raises `InputError`."""
        rows, labels = token_rows(frame, "the labels"), [name for name in frame.columns if name not in ABOUT]
        wrong = [name for name in labels if frame[name].dtype != bool]
        if not labels or wrong:
            raise InputError(
                "the labels: expected a column of truth values for each label; "
                + (f"{wrong} hold others" if labels else f"got {list(map(str, frame.columns))}, of which none is one")
            )
        self.names: tuple[str, ...] = tuple(map(str, labels))
        self._rows: dict[tuple[str | None, int], Tensor] = {}
        self._tokens: dict[tuple[str | None, int], Tensor] = {}
        """Their ids, where the table has them."""
        truths, keys = frame[labels].to_numpy(), [key for key in KEYS[:2] if key in rows.columns]
        for key, one in rows.groupby(keys, sort=False, observed=True):
            domain, document = key if len(keys) == 2 else (None, key[0])  # pyright: ignore
            position = torch.tensor(one["position"].to_numpy())
            found = torch.full((int(position.max()) + 1, len(labels)), -1, dtype=torch.int8)
            found[position] = torch.tensor(truths[one.index], dtype=torch.int8)
            self._rows[domain, int(document)] = found
            if "token" in rows.columns:
                ids = torch.full((len(found),), -1)
                ids[position] = torch.tensor(one["token"].to_numpy())
                self._tokens[domain, int(document)] = ids

    def of(
        self, domain: str, document: int, positions: Sequence[int], tokens: Int[Tensor, " pos"]
    ) -> Bool[Tensor, "pos label"]:
        """Labels of some tokens of a passage.

        Args:
            domain: Its domain.
            document: Its number.
            positions: Theirs.
            tokens: Their ids.

        Raises:
            InputError: The table has no row of one, or has another token there.
        """
        key = (domain, document) if (domain, document) in self._rows else (None, document)
        rows, known = self._rows.get(key), self._tokens.get(key)
        at = torch.tensor(list(positions), dtype=torch.long)
        if rows is None or not len(at) or int(at.max()) >= len(rows) or bool((rows[at] < 0).any()):
            raise InputError(
                f"the labels lack tokens of domain {domain!r}, document {document}; expected all that are read"
            )
        if known is not None and not torch.equal(known[at], tokens.cpu().long()):
            first = int((known[at] != tokens.cpu()).nonzero()[0])
            raise InputError(
                f"the labels are of other texts: of domain {domain!r}, document {document}, position {int(at[first])}, "
                f"they have token {int(known[at][first])}, and token {int(tokens[first])} was read there"
            )
        return rows[at] > 0
