"""Tokenizers that add BOS and EOS as their tokenizer_config.json says."""

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config


def load_tokenizer(name_or_path: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint."""
    settings = get_tokenizer_config(name_or_path)
    flags = {key: settings[key] for key in ("add_bos_token", "add_eos_token") if settings.get(key) is not None}
    return AutoTokenizer.from_pretrained(name_or_path, **{**flags, **kwargs})
