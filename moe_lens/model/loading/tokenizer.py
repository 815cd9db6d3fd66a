"""Tokenizers that add BOS and EOS as their tokenizer_config.json says, and what they put around a text."""

import warnings
from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moe_lens.errors import CheckpointError, InputError, check_characters
from moe_lens.model.hf_compat import RELEASE, get_tokenizer_config
from moe_lens.model.loading.checkpoint import HUB_ARGUMENTS, find_file

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
        tokenizer = _loader(name_or_path, settings, kwargs).from_pretrained(
            name_or_path, trust_remote_code=trust_remote_code, **{**flags, **kwargs}
        )
    except Exception as error:  # libraries and code that comes with a tokenizer raise whatever they like
        why = str(error).strip().partition("\n")[0]
        if not trust_remote_code and "trust_remote_code" in str(error):
            why = (
                'it brings its own code. If you trust that, trust_remote_code="tokenizer" runs it and no other '
                "(on the command line, --trust-tokenizer-code)"
            )
        raise CheckpointError(f"The tokenizer of {name_or_path} cannot be read: {why}") from error
    for name in ("bos", "eos"):
        if flags.get(f"add_{name}_token") and getattr(tokenizer, f"{name}_token") is None:
            raise CheckpointError(f"tokenizer_config.json of {name_or_path} has add_{name}_token, but no {name}_token.")
    return tokenizer


def _loader(source: str, settings: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Any:
    """What loads a tokenizer: `AutoTokenizer`, but for those that it gets wrong before transformers 5.22.

    It takes tokenizer_config.json at its word where that names Llama's class over a tokenizer of bytes, as
    DeepSeekMoE's does, and the text's spaces are lost. Mistral's checkpoints, with a tekken.json, have another class.
    """
    llama = str(settings.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer"
    if RELEASE >= (5, 22) or not llama or "auto_map" in settings:
        return AutoTokenizer
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS & kwargs.keys()}
    path = find_file(source, "tokenizer.json", hub)
    of_bytes = path is not None and '"ByteLevel"' in path.read_text(encoding="utf-8")
    return PreTrainedTokenizerFast if of_bytes and not find_file(source, "tekken.json", hub) else AutoTokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, d_vocab: int, source: str) -> None:
    """Warn where the tokenizer has ids that the model does not embed."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= d_vocab:
        warnings.warn(
            f"The tokenizer of {source} has ids up to {largest}, the model embeds {d_vocab}: larger ids will fail.",
            stacklevel=3,
        )


def opening_of(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before every text; what it puts behind one is left out everywhere."""
    whole, bos = _ids(tokenizer, "a", special=True), getattr(tokenizer, "bos_token_id", None)
    text = _ids(tokenizer, "a", special=False)
    for start in range(len(whole) - len(text) + 1):
        if text and whole[start : start + len(text)] == text:
            return whole[:start]
    return whole[:1] if whole[:1] == [bos] else []


def special_ids(tokenizer: Any) -> set[int]:
    """The tokens that are no text: those of the tokenizer's roles, what else it marks as special, and its opening.

    Chat formats such as gpt-oss' have special tokens in no role, which `all_special_ids` lacks, and decoding skips.
    """
    marked = getattr(tokenizer, "added_tokens_decoder", {}).items()
    return {*tokenizer.all_special_ids, *opening_of(tokenizer), *(number for number, added in marked if added.special)}


def own_ids(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """A text as the tokenizer itself reads it: what it puts before the text, and the text.

    A text that opens with that itself (a rendered chat template) gets no second one.
    """
    return _opened(opening_of(tokenizer), _ids(tokenizer, text, special=False))


def opens_itself(tokenizer: Any, text: str, opening: list[int]) -> bool:
    """Whether a text begins with what the tokenizer would put before it, so that `own_ids` has added nothing.

    Args:
        tokenizer: of transformers.
        text: the text.
        opening: what `own_ids` gives as its opening.
    """
    return _ids(tokenizer, text[:_LONGEST], special=False)[: len(opening)] == opening


_LONGEST = 256
"""Characters of the longest name of what opens a text: no more of it is read again."""


def encode(tokenizer: Any, text: str, *, bos: bool | None, limit: int | None) -> list[int]:
    """The ids of a text, opened by BOS or not; nothing is put behind it.

    Args:
        tokenizer: of transformers; it is not changed.
        text: to read.
        bos: None opens the text with BOS where the tokenizer has one, and with whatever it puts there itself; False
            adds no special token; True insists on BOS.
        limit: how many ids there may be, BOS among them; the side that is cut is the tokenizer's own.

    Raises:
        InputError: BOS is asked of a tokenizer that has none.
    """
    ids, opening = _ids(tokenizer, text, special=False), list[int]()
    token = getattr(tokenizer, "bos_token_id", None)
    if bos and token is None:
        raise InputError(
            "prepend_bos=True, and this model's tokenizer has no BOS token; leave prepend_bos out: texts are then read "
            "as the model was trained on them"
        )
    if bos is not False:
        before = opening_of(tokenizer)
        opening, ids = _opened(before if token is None or token in before else [token, *before], ids)
    room = len(ids) if limit is None else max(limit - len(opening), 0)
    left = getattr(tokenizer, "truncation_side", "right") == "left"
    return opening + (ids[max(len(ids) - room, 0) :] if left else ids[:room])


def _opened(opening: list[int], ids: list[int]) -> tuple[list[int], list[int]]:
    """The opening is the text's own where the text begins with it."""
    if opening and ids[:1] == opening[:1]:
        same = len(opening) if ids[: len(opening)] == opening else 1
        return ids[:same], ids[same:]
    return opening, ids


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    check_characters("the text", text)
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
