"""Paired prompts: two prompts that differ in what is asked about, and which of their tokens are looked at."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.data.files import read_objects
from moe_lens.errors import InputError
from moe_lens.interventions.trace_prompt import single_token, subject_positions, whole_prompt
from moe_lens.model.loading.tokenizer import special_ids

EMBEDDED_PAIRS = "german-english"
"""The pairs that ship with the package."""


@dataclass(frozen=True)
class Pair:
    """Two prompts."""

    a: str
    b: str
    span_a: str | None = None
    """The part of prompt a whose tokens are looked at; all but special ones if not given."""
    span_b: str | None = None
    answer: str | None = None
    """A token: what is expected after a. The outcome is its logit minus that of `foil`, after the last token."""
    foil: str | None = None
    """A token: what is expected after b."""
    template: str | None = None
    """What pairs that are not independent share; the pair is a unit of its own if not given."""

    @property
    def unit(self) -> str:
        """The unit that is resampled."""
        return self.template or f"{self.a} | {self.b}"


def read_pairs(path: str | Path) -> tuple[Pair, ...]:
    """Pairs from a JSON Lines file, or the embedded ones (`"german-english"`).

    Each line is an object with a and b, and perhaps span_a, span_b, answer and foil, and template.

    Raises:
        InputError: It cannot be read, or a pair lacks something; the message names the line.
    """
    if str(path) == EMBEDDED_PAIRS:
        path = Path(str(resources.files("moe_lens") / "assets" / "pairs" / f"{EMBEDDED_PAIRS}.jsonl"))
    pairs = [_pair(row, where) for where, row in read_objects(path, "an object of texts a and b")]
    if not pairs:
        raise InputError(f"{path}: holds no pair")
    with_outcome = {pair.answer is not None for pair in pairs}
    if len(with_outcome) > 1:
        raise InputError(f"{path}: some pairs have an answer and others none; expected one for all, or for none")
    return tuple(pairs)


def _pair(row: Any, where: str) -> Pair:
    allowed = list(Pair.__dataclass_fields__)
    if not isinstance(row, dict) or not all(isinstance(value, str) and value for value in row.values()):
        raise InputError(f"{where}: expected an object of texts a and b, and perhaps {', '.join(allowed[2:])}")
    unknown = sorted(row.keys() - set(allowed))
    if unknown or not {"a", "b"} <= row.keys() or ("answer" in row) != ("foil" in row):
        told = f"has {', '.join(unknown)}" if unknown else "lacks a, b, or one of answer and foil"
        raise InputError(f"{where}: a pair {told}; expected a and b, and perhaps {', '.join(allowed[2:])}")
    return Pair(**row)


@dataclass(frozen=True, eq=False)
class Encoded:
    """One side of some pairs, padded on the right."""

    tokens: Int[Tensor, "pair pos"]
    mask: Bool[Tensor, "pair pos"]
    looked_at: Bool[Tensor, "pair pos"]
    """Tokens that are counted."""

    @property
    def last(self) -> Int[Tensor, " pair"]:
        """Position of the last token."""
        return self.mask.sum(-1) - 1


def encode(model: Any, prompts: Sequence[str], spans: Sequence[str | None]) -> Encoded:
    """Tokens of prompts, and which of them are looked at.

    Raises:
        InputError: A span is not in its prompt, or a prompt is longer than the model's context.
    """
    rows = [whole_prompt(model, prompt)[0].cpu() for prompt in prompts]
    special, kept = special_ids(model.tokenizer), []
    for prompt, span, ids in zip(prompts, spans, rows, strict=True):
        looked_at = torch.tensor([token not in special for token in ids.tolist()])
        if span is not None:
            inside = torch.zeros_like(looked_at)
            inside[subject_positions(model, prompt, ids, span)] = True
            looked_at &= inside
        if not looked_at.any():
            raise InputError(f"the prompt {prompt!r} has no tokens to look at; expected some beside special ones")
        kept.append(looked_at)
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    return Encoded(pad(rows, batch_first=True), mask, pad(kept, batch_first=True))


def outcome_tokens(model: Any, pairs: Sequence[Pair]) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """Ids of the answers and of the foils.

    Raises:
        InputError: One is several tokens, or both of a pair are one.
    """
    answers, foils = (
        torch.tensor([single_token(model, word, str(getattr(pair, word))) for pair in pairs])
        for word in ("answer", "foil")
    )
    if (same := (answers == foils).nonzero()).numel():
        pair = pairs[int(same[0])]
        raise InputError(f"answer and foil of {pair.a!r} are the same token, {pair.answer!r}")
    return answers, foils


def shared_weights(a: Int[Tensor, " n"], b: Int[Tensor, " m"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"], bool]:
    """Weights of the tokens of either side that the other has too: each token weighs the same on both, sums are 1.

    A token that is n times in one and m times in the other weighs min(n, m), spread over its occurrences. The third
    value says whether there is one.
    """
    kinds, place = torch.cat([a, b]).unique(return_inverse=True)
    in_a, in_b = (torch.bincount(side, minlength=len(kinds)).double() for side in (place[: len(a)], place[len(a) :]))
    common = torch.minimum(in_a, in_b)
    total = float(common.sum())
    each = common / max(total, 1)
    return (each / in_a.clamp(min=1))[place[: len(a)]], (each / in_b.clamp(min=1))[place[len(a) :]], total > 0
