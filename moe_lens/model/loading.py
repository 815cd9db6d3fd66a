"""Models and tokenizers by name or folder."""

from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from moe_lens.model import deepseek as _deepseek  # noqa: F401  registers the family
from moe_lens.model.tokenizer import load_tokenizer

__all__ = ["load_pretrained", "load_tokenizer"]


def load_pretrained(
    name_or_path: str, *, trust_remote_code: bool = False, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Model and tokenizer (None where the checkpoint has none)."""
    model = AutoModelForCausalLM.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **kwargs)
    try:
        tokenizer = load_tokenizer(name_or_path)
    except (OSError, ValueError):
        tokenizer = None
    return model, tokenizer
