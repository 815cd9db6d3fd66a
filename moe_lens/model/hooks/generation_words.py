"""The words of `hf_generate`, TransformerLens's and transformers', as transformers' own `generate` takes them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_DEFAULTS = {"max_new_tokens": 10, "do_sample": True, "temperature": 1.0}
"""TransformerLens's, where no `generation_config` is passed."""
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def words_for_transformers(model: Any, tokenizer: Any, values: Tensor, words: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of transformers' `generate`.

    What the caller says by name counts first, None too, which turns off what it is said of; then the
    `generation_config` that is passed. Without one, TransformerLens's defaults count. What all of these leave open, the
    model's own config says. (TransformerLens puts its defaults before the config that is passed, and before
    `max_length`, `use_cache` and `pad_token_id`.)

    Args:
        model: Of transformers.
        tokenizer: Its tokenizer, or None; its EOS ends a text where no config names one.
        values: The prompt: ids, or embeddings.
        words: Keywords of the call.
    """
    given = dict(words)
    asked, own = given.get("generation_config"), model.generation_config
    said = {
        word: next((value for config in (asked, own) if (value := getattr(config, word, None)) is not None), None)
        for word in ("eos_token_id", "pad_token_id", "stop_strings")
    }
    if asked is None:
        lengths = {"max_new_tokens"} if given.get("max_length") is not None else set()
        given = {word: value for word, value in _DEFAULTS.items() if word not in lengths} | given
    caches = given.pop("use_past_kv_cache", None)
    if caches is not None or asked is None:
        given.setdefault("use_cache", True if caches is None else bool(caches))
    end = None if tokenizer is None else tokenizer.eos_token_id
    if not given.pop("stop_at_eos", True):
        given["eos_token_id"] = None
    elif given.get("eos_token_id") is not None and not isinstance(given["eos_token_id"], int):
        given["eos_token_id"] = list(given["eos_token_id"])
    elif "eos_token_id" not in given and said["eos_token_id"] is None and end is not None:
        given["eos_token_id"] = end
    if given.get("pad_token_id") is None and said["pad_token_id"] is None and end is not None:
        given["pad_token_id"] = end
    if tokenizer is not None and (given.get("stop_strings") or said["stop_strings"]):
        given.setdefault("tokenizer", tokenizer)
    if any(given.get(word) for word in _OUTPUTS):
        given.setdefault("return_dict_in_generate", True)
    return {"inputs_embeds" if values.is_floating_point() else "inputs": values, **given}
