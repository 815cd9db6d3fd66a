"""The words of `hf_generate`, TransformerLens's and transformers', as transformers' own `generate` takes them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_NAMED = ("do_sample", "temperature", "top_k", "top_p")
"""What both libraries call alike; None means that nothing is said."""
_DEFAULTS = {"max_new_tokens": 10, "do_sample": True, "temperature": 1.0}
"""TransformerLens's, where no `generation_config` is passed."""
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def words_for_transformers(model: Any, tokenizer: Any, values: Tensor, words: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of transformers' `generate`.

    What the caller says by name counts first, then the `generation_config` that is passed. Without one,
    TransformerLens's defaults count, and of the model's own config what they leave open. (TransformerLens puts its
    defaults before the config that is passed, and before `max_length`, `use_cache` and `pad_token_id`.)

    Args:
        model: Of transformers.
        tokenizer: Its tokenizer, or None; its EOS ends a text where no config names one.
        values: The prompt: ids, or embeddings.
        words: Keywords of the call.
    """
    given = {word: value for word, value in words.items() if value is not None or word not in _NAMED}
    asked = given.get("generation_config")
    config = model.generation_config if asked is None else asked
    if asked is None:
        lengths = {"max_new_tokens"} if given.get("max_length") is not None else set()
        given = {word: value for word, value in _DEFAULTS.items() if word not in lengths} | given
    caches = given.pop("use_past_kv_cache", None)
    if caches is not None or asked is None:
        given.setdefault("use_cache", True if caches is None else bool(caches))
    stop, ends = given.pop("stop_at_eos", True), given.pop("eos_token_id", None)
    own = None if tokenizer is None else tokenizer.eos_token_id
    if not stop:
        given["eos_token_id"] = None
    elif ends is not None:
        given["eos_token_id"] = ends if isinstance(ends, int) else list(ends)
    elif config.eos_token_id is None and own is not None:
        given["eos_token_id"] = own
    if given.get("pad_token_id") is None and config.pad_token_id is None and own is not None:
        given["pad_token_id"] = own
    if tokenizer is not None and (given.get("stop_strings") or config.stop_strings):
        given.setdefault("tokenizer", tokenizer)
    if any(given.get(word) for word in _OUTPUTS):
        given.setdefault("return_dict_in_generate", True)
    return {"inputs_embeds" if values.is_floating_point() else "inputs": values, **given}
