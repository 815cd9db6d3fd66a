"""What causal tracing has to find in a prompt: the subject's positions, and answers that are one token."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from moe_lens.errors import InputError
from moe_lens.ids import in_order


def whole_prompt(model: Any, prompt: str) -> Int[Tensor, "1 pos"]:
    """The tokens of a prompt, none of them cut off: answers are read at its end.

    Raises:
        InputError: it is longer than the model's context.
    """
    tokens = model.to_tokens(prompt, truncate=False)
    if tokens.shape[1] > model.cfg.n_ctx:
        raise InputError(
            f"the prompt {prompt[:60]!r}… has {tokens.shape[1]} tokens; the model's context is {model.cfg.n_ctx}"
        )
    return tokens


def subject_positions(
    model: Any, prompt: str, tokens: Int[Tensor, " pos"], subject: str | int | Sequence[int]
) -> list[int]:
    """Positions of the tokens that hold any character of a subject, wherever it occurs, or those given.

    Raises:
        InputError: the subject is not in the prompt, or a position not among the tokens.
    """
    if not isinstance(subject, str):
        return sorted(set(in_order("positions", [subject] if isinstance(subject, int) else subject, len(tokens))))
    if not subject or subject not in prompt:
        raise InputError(
            f"the subject {subject!r} is not in the prompt {prompt!r}; expected a part of it, letter by letter"
        )
    starts = [i for i in range(len(prompt)) if prompt.startswith(subject, i)]
    return [
        position
        for position, (start, end) in _characters(model, prompt, tokens)
        if any(start < at + len(subject) and at < end for at in starts)
    ]


def _characters(model: Any, prompt: str, tokens: Int[Tensor, " pos"]) -> list[tuple[int, tuple[int, int]]]:
    """Position of each of the prompt's own tokens, and the characters it stands for."""
    if model.tokenizer is None or not getattr(model.tokenizer, "is_fast", False):
        raise InputError("this model has no tokenizer that knows its characters: give the subject's positions instead")
    encoded = model.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    first = len(tokens) - len(ids)
    if first < 0 or tokens[first:].tolist() != list(ids):
        raise InputError("the prompt's tokens are not those of its text alone: give the subject's positions instead")
    return list(enumerate(map(tuple, offsets), start=first))


def single_token(model: Any, what: str, token: str | int) -> int:
    """The id of an answer.

    Raises:
        InputError: the text is several tokens, or there is no such id.
    """
    if isinstance(token, int):
        if not 0 <= token < model.cfg.d_vocab:
            raise InputError(f"the {what} is token {token}; expected an id from 0 to {model.cfg.d_vocab - 1}")
        return token
    ids = model.to_tokens(token, prepend_bos=False)[0].tolist()
    if len(ids) != 1:
        pieces = [str(piece) for piece in model.to_str_tokens(token, prepend_bos=False)]
        raise InputError(
            f"the {what} {token!r} is {len(ids)} tokens, {pieces}; expected one: its first, or another word"
        )
    return int(ids[0])
