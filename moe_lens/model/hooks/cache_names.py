"""The key-value cache under both its names: `past_key_values`, and `cache`, as transformers says from 5.24 on."""

from collections.abc import Generator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from moe_lens.errors import InputError, a_kind
from moe_lens.model.hf_compat import cache_word
from moe_lens.model.tl_compat import TransformersDriver

PAST, CACHE = "past_key_values", "cache"
"""TransformerLens's name, and the newer one of transformers."""


def name_as_transformer_lens(words: MutableMapping[str, Any]) -> Any:
    """Put the cache that came with a call under TransformerLens's name, and return it; None where none came.

    Args:
        words: Keywords of the call, changed in place.

    Raises:
        InputError: It came under both names, or is no cache of transformers.
    """
    if CACHE in words:
        if PAST in words:
            raise InputError(f"got {PAST} and {CACHE}, which are two names of one thing; pass one of them")
        words[PAST] = words.pop(CACHE)
    past = words.get(PAST)
    if past is not None and not hasattr(past, "get_seq_length"):
        raise InputError(
            f"{PAST} is {a_kind(past)}; expected a cache of transformers, such as DynamicCache, or what "
            "return_type='logits_and_cache' gives"
        )
    return past


_SHAPES_DIFFER = ("Sizes of tensors must match", "must match the size of tensor", "must match the existing size")
"""What torch says of keys, of values, and of states."""


@contextmanager
def fitting_cache(past: Any) -> Generator[None]:
    """Say that a cache is of another model where its keys cannot be put before this one's.

    Raises:
        InputError: They differ in shape, or the family has a cache of its own.
    """
    try:
        yield
    except ValueError as error:
        if past is None or f"`{PAST}`" not in str(error):
            raise
        raise InputError(f"transformers says: {error}") from error
    except RuntimeError as error:
        if past is None or not any(words in str(error) for words in _SHAPES_DIFFER):
            raise
        raise InputError(f"{PAST} was filled by another model: its keys or values have other shapes") from error


class Driver(TransformersDriver):
    """TransformerLens's way to the transformers model, with the cache under the name that the model has for it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, without a balance loss, which nothing here returns, and which one new token does not allow."""
        config: Any = self._model.config
        if any(getattr(each, "output_router_logits", False) for each in (config, config.get_text_config())):
            kwargs["output_router_logits"] = False
        word = cache_word(type(self._model).forward)
        if word == PAST:
            return super().forward(*args, **kwargs)
        if PAST in kwargs:
            kwargs[word] = kwargs.pop(PAST)
        result = super().forward(*args, **kwargs)
        return replace(result, raw_output=SimpleNamespace(past_key_values=getattr(result.raw_output, word, None)))
