"""Keyword arguments that a wrapped model takes: what nothing reads is an error, and close misspellings are named."""

import inspect
import typing
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from transformer_lens.model_bridge import TransformerBridge
from transformers import GenerationConfig

from moe_lens.errors import InputError
from moe_lens.model.hf_compat import TransformersKwargs

_ANY_MODEL = frozenset(TransformersKwargs.__annotations__) | {"return_dict", "cache_position", "use_past_kv_cache"}
"""What any model of transformers passes on or takes off, and TransformerLens's word for `use_cache`."""
_OTHER_KINDS = frozenset({"pixel_values", "input_values"})
"""Words of TransformerLens's forward for images and sound."""
_ELSEWHERE = {
    "past_kv_cache": "past_key_values=, which return_type='logits_and_cache' gives",
    "tokens": "the ids as the input",
    "decoder_input": "nothing: these models have no decoder apart",
    "one_zero_attention_mask": "attention_mask=",
    "input_ids": "the ids as the input: model(tokens), or model(encoding) with all that a tokenizer returned",
    "inputs": "the ids as the input",
    "num_items_in_batch": "loss_per_token=True, and a sum divided by any number: the loss itself is a mean over tokens",
    "inputs_embeds": "the embeddings as the input",
    "fwd_hooks": "run_with_hooks(input, fwd_hooks=…)",
    "bwd_hooks": "run_with_hooks(input, bwd_hooks=…)",
    "names_filter": "run_with_cache(input, names_filter=…)",
    "interventions": "with intervention: …, or generate(…, interventions=[…])",
}
"""What to write instead of a word that another function or library has."""


_OF_TEXT = _ANY_MODEL | {"past_key_values", "cache", "labels", "use_cache", "logits_to_keep", "attention_mask"}
_NOT_NAMED = frozenset({"self", "input", "input_ids", "inputs_embeds", *_OTHER_KINDS})


@cache
def forward_words(kind: type) -> frozenset[str]:
    """The keywords that `forward` of a wrapped model reads.

    Args:
        kind: The class of the transformers model.
    """
    kwargs = inspect.signature(kind.forward).parameters.get("kwargs")
    typed = typing.get_args(kwargs.annotation) if kwargs is not None else ()  # Unpack[TransformersKwargs], or more
    passed_on = frozenset(word for each in typed for word in getattr(each, "__annotations__", ()))
    known = (named(TransformerBridge.forward) - _NOT_NAMED) | further_words(kind) | _OF_TEXT | passed_on
    return known - {"num_items_in_batch"}  # of transformers' loss, which is not ours


@cache
def further_words(kind: type) -> frozenset[str]:
    """Those that are particular to some models, such as `pixel_values`."""
    return named(kind.forward) - {"self", "input_ids", "inputs_embeds"} - _OF_TEXT


def refuse_unknown(what: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise for keywords that are not read.

    Args:
        what: The function, for the message.
        given: Keywords that came.
        known: Those that it reads.

    Raises:
        InputError: One is unknown; the message says what to write instead, where that is known.
    """
    for word in given:
        if word not in known:
            raise InputError(f"{what} has no argument {word!r}{_instead(what, word, known)}")


def _instead(what: str, word: str, known: Collection[str]) -> str:
    if word in _ELSEWHERE:
        return f"; expected {_ELSEWHERE[word]}"
    if what.startswith("generate") and hasattr(GenerationConfig(), word):
        return (
            f": it samples token by token, so that hooks see every step. transformers' own generation has it, "
            f"with the same hooks and interventions active: model.hf_generate(…, {word}=…)"
        )
    close = get_close_matches(word, known, n=1, cutoff=0.7)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(sorted(known))}"


def named(function: Any) -> frozenset[str]:
    """The parameters of a function that can be named."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(function).parameters.values()
    return frozenset(parameter.name for parameter in found if parameter.kind in kinds)
