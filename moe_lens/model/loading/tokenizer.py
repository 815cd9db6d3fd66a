"""Tokenizers that add BOS and EOS as their tokenizer_config.json says."""

import warnings
from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moe_lens.errors import CheckpointError
from moe_lens.model.hf_compat import get_tokenizer_config
from moe_lens.model.loading.checkpoint import find_file

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def has_tokenizer(source: str, hub: Mapping[str, Any]) -> bool:
    """Whether a checkpoint comes with a tokenizer."""
    return any(find_file(source, name, hub) is not None for name in _FILES)


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer.

    Transformers 5 ignores `add_bos_token` and `add_eos_token` of tokenizer_config.json where a tokenizer.json lies
    beside it; here they count. A chat template writes its own BOS, and `apply_chat_template` then adds no second one
    (text that it returns with `tokenize=False` is to be tokenised with `add_special_tokens=False`).

    Args:
        name_or_path: name on the hub, or folder.
        trust_remote_code: whether to run code that comes with the checkpoint.
        kwargs: arguments of `AutoTokenizer.from_pretrained`; they win over tokenizer_config.json.

    Raises:
        CheckpointError: the tokenizer cannot be read, or is to add a token that it does not name.
    """
    try:
        settings = get_tokenizer_config(name_or_path, **kwargs)
        flags = {key: settings[key] for key in ("add_bos_token", "add_eos_token") if settings.get(key) is not None}
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, trust_remote_code=trust_remote_code, **{**flags, **kwargs}
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"The tokenizer of {name_or_path} cannot be read: {error}") from error
    for name in ("bos", "eos"):
        if flags.get(f"add_{name}_token") and getattr(tokenizer, f"{name}_token") is None:
            raise CheckpointError(f"tokenizer_config.json of {name_or_path} has add_{name}_token, but no {name}_token.")
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, d_vocab: int, source: str) -> None:
    """Warn where the tokenizer has ids that the model does not embed."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= d_vocab:
        warnings.warn(
            f"The tokenizer of {source} has ids up to {largest}, the model embeds {d_vocab}: larger ids will fail.",
            stacklevel=3,
        )
