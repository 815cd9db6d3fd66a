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


def check_layers_held(past: Any, config: Any) -> None:
    """Nothing, where a cache that holds tokens holds them for each of a model's layers.

    transformers would go on with the layers that are missing as if nothing had come before.

    Args:
        past: The key-value cache; None if there is none.
        config: Of the transformers model that decodes.

    Raises:
        InputError: It was filled by another model, or by a pass that stopped early.
    """
    layers = getattr(past, "layers", None)
    if not layers or not past.get_seq_length():
        return
    if set(getattr(config, "layer_types", None) or ()) - _ATTENDING or getattr(config, "num_kv_shared_layers", None):
        return  # some layers keep something else, or nothing
    if len(layers) != config.num_hidden_layers:
        raise InputError(
            f"{PAST} holds {len(layers)} layers, and this model has {config.num_hidden_layers}; expected a cache that "
            "a whole pass of this model has filled"
        )


_ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}


@contextmanager
def fitting_cache(past: Any) -> Generator[None]:
    """Say that a cache is of another model where its keys cannot be put before this one's.

    Raises:
        InputError: They differ in shape.
    """
    try:
        yield
    except RuntimeError as error:
        if past is None or not str(error).startswith("Sizes of tensors must match"):
            raise
        raise InputError(f"{PAST} was filled by another model: its keys or values have other shapes") from error


class Driver(TransformersDriver):
    """TransformerLens's way to the transformers model, with the cache under the name that the model has for it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        word = cache_word(type(self._model).forward)
        if word == PAST:
            return super().forward(*args, **kwargs)
        if PAST in kwargs:
            kwargs[word] = kwargs.pop(PAST)
        result = super().forward(*args, **kwargs)
        return replace(result, raw_output=SimpleNamespace(past_key_values=getattr(result.raw_output, word, None)))
