"""Generating text: prompts are read as `forward` reads them, and what the loop does not do is refused."""

import inspect
import math
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from moe_lens.errors import InputError, UnsupportedModelError
from moe_lens.ids import one_id
from moe_lens.model.hf_compat import cache_word
from moe_lens.model.hooks.arguments import further_words, named, refuse_unknown
from moe_lens.model.hooks.cache_names import CACHE, PAST
from moe_lens.model.hooks.forward import OF_INPUT, forget_tokens, tell_tokens
from moe_lens.model.hooks.forward_checks import check_family
from moe_lens.model.hooks.generation_words import words_for_transformers
from moe_lens.model.hooks.hook_scope import GenerationClaim, ModuleHooks
from moe_lens.model.hooks.key_value_padding import note_prompts
from moe_lens.model.hooks.model_input import ModelInput, further
from moe_lens.model.hooks.run_with_cache import CachedRuns

_RETURNED = ("input", "str", "tokens", None)


class GeneratingBridge(CachedRuns):
    """The generating half of `HookedMoE`."""

    def generate(self, input: Any = "", *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens's: a forward pass for every token, so that hooks see each.

        Args:
            input: what `forward` takes. Padding is moved to the left: generation continues what stands last.
            args: `max_new_tokens` and so on, in TransformerLens's order.
            kwargs: `max_new_tokens`, `do_sample`, `temperature`, `return_type`, …; and what only some transformers
                models take, such as `pixel_values`. Transformers' other ways of generating (beams, constraints, …) are
                in `hf_generate`.

        Raises:
            InputError: a prompt that cannot be read, or an argument that is not TransformerLens's.
            UnsupportedModelError: `return_cache` of several prompts, of embeddings, or with images.
        """
        words, columns = self._prompted("generate", input, args, kwargs)
        if words.get("return_cache"):
            _check_cached(words["input"], further_words(type(self.original_model)) & words.keys())
        with GenerationClaim(self, "generate", columns):
            out = super().generate(**words)
        # On TransformerLens's way around its own loop, for some recurrent models, tokens come back.
        return self._decoded(out, False) if words.get("return_type") == "str" and isinstance(out, Tensor) else out

    def generate_stream(self, input: Any = "", *args: Any, **kwargs: Any) -> Generator[Any]:
        """As TransformerLens's: yields what was generated piece by piece, the prompt with the first.

        Args:
            input: see `generate`.
            args: see `generate`.
            kwargs: see `generate`; `max_tokens_per_yield`.

        Raises:
            InputError: see `generate`.
        """
        words, columns = self._prompted("generate_stream", input, args, kwargs)
        return self._streamed(super().generate_stream(**words), columns)

    def _streamed(self, pieces: Generator[Any], columns: Tensor | None) -> Generator[Any]:
        """The pieces; the model belongs to the thread that asks for the first, until the last or until forgotten."""
        claim = GenerationClaim(self, "generate_stream", None)
        with claim, closing(pieces):
            while True:
                claim.columns = columns
                try:
                    piece = next(pieces)
                except StopIteration:
                    return
                finally:
                    claim.columns = None
                yield piece

    def hf_generate(self, input: Any = "", *args: Any, **kwargs: Any) -> Any:
        """Transformers' own generation, with all it has (beams, constraints, assistants); hooks that are in place fire.

        Without a `generation_config`, 10 tokens are sampled, as TransformerLens does. Of embeddings only the new tokens
        come back.

        Args:
            input: see `generate`.
            args: `max_new_tokens` and so on, in TransformerLens's order.
            kwargs: of transformers' `generate`; `return_type`.

        Raises:
            InputError: a prompt that cannot be read, or padding in front of one in a family that would read it.
            ValueError: transformers', for an argument that it does not have.
        """
        words = _bound(TransformerBridge.hf_generate, input, args, kwargs)
        refuse_unknown("hf_generate", dict.fromkeys(words.keys() & {"input_ids", "inputs", "inputs_embeds"}), ())
        if "return_dict" in words:
            raise InputError("hf_generate takes no return_dict; return_dict_in_generate says what comes back")
        given, returned = self._prompt(words), words.pop("return_type", "input")
        _check_returned("hf_generate", returned)
        if given.attention_mask is not None:
            words["attention_mask"] = given.attention_mask
        if words.get(PAST) is None:
            words.pop(PAST, None)
        else:
            words[cache_word(type(self.original_model).forward)] = words.pop(PAST)
        config: Any = self.original_model.config
        check_family(self.family, config.get_text_config(), given, 0)
        words = words_for_transformers(self.original_model, self.tokenizer, given.values, words)
        self._ensure_generation_supported("hf_generate")
        self._check_model()
        model: Any = self.original_model
        passes = ModuleHooks(self, "hf_generate")
        with GenerationClaim(self, "hf_generate", given.columns), passes, torch.no_grad():
            passes.before(model, partial(tell_tokens, given.mask))
            passes.after(model, forget_tokens)
            out = model.generate(**further(given.words, words), **words)
        for past in (words.get(PAST), words.get(CACHE), getattr(out, PAST, None), getattr(out, CACHE, None)):
            note_prompts(past, words.get("attention_mask"))
        if returned == "tokens" or (returned in ("input", None) and not given.was_text):
            return out
        return self._decoded(getattr(out, "sequences", out), given.was_text == "texts")

    def _decoded(self, tokens: Any, several: bool) -> str | list[str]:
        tokenizer = self._need_tokenizer()
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
        return texts[0] if len(texts) == 1 and not several else texts

    def _prompted(
        self, what: str, input: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Arguments of one of TransformerLens's generating functions, the prompt as tokens; and its columns."""
        function = getattr(TransformerBridge, what)
        words = _bound(function, input, args, kwargs)
        kind, known = type(self.original_model), named(function) - {"self"}
        refuse_unknown(what, words, known | (further_words(kind) if what == "generate" else frozenset()))
        _check_returned(what, words.get("return_type", "input"))
        _check_sampling(what, words)
        if (ends := self._ends(what, words)) is not None:
            words["eos_token_id"] = ends  # of a single number TransformerLens fills up with it the texts that end first
        given = self._prompt(words)
        if given.mask is not None and not bool(given.mask.all()):
            if given.tokens is None:
                # TransformerLens tells the pass of a later token nothing of the padding in front of embeddings.
                raise InputError(f"{what} takes embeddings without padding; hf_generate takes them with it")
            for penalty, none in (("repetition_penalty", 1), ("freq_penalty", 0)):
                if words.get(penalty, none) != none:
                    raise InputError(
                        f"{what}: {penalty} would count the padding in front of shorter prompts as text; give prompts "
                        "one by one, or use hf_generate, whose repetition_penalty leaves padding out"
                    )
        if given.attention_mask is not None:
            words["attention_mask"] = given.attention_mask
        if given.was_text and words.get("return_type", "input") == "input":
            words["return_type"] = "str"
        return {"input": given.values, **further(given.words, words), **words}, given.columns

    def _ends(self, what: str, words: Mapping[str, Any]) -> list[int] | None:
        """Tokens that end a text: the caller's, or the model's generation config's; None leaves it to TransformerLens.

        That asks the model's config and then the tokenizer, which often name one token where chats end in several.
        """
        if (ends := _several(words.get("eos_token_id"))) is not None:
            return [one_id(f"{what}: eos_token_id", end, self._embedded()) for end in ends]
        model: Any = self.original_model
        ends = _several(getattr(model.generation_config, "eos_token_id", None))
        usual = _several(model.config.get_text_config().eos_token_id)
        return None if ends == usual or not words.get("stop_at_eos", True) else ends

    def _prompt(self, words: dict[str, Any]) -> ModelInput:
        """The prompt, padded on the left, taken off the arguments with all that says how to read it."""
        how = {word: words.pop(word) for word in OF_INPUT & words.keys()}
        given = self.read(words.pop("input"), truncate=False, **how).laid_left()
        if given.mask is not None and not bool(given.mask.any(1).all()):
            empty = int((~given.mask.any(1)).nonzero()[0])
            raise InputError(f"row {empty} of the prompt is all padding: it has no token to go on from")
        known = further_words(type(self.original_model))
        brought = {name: value for name, value in given.words.items() if name in {*known} or name != "token_type_ids"}
        refuse_unknown("the prompt", brought, known)
        return replace(given, words=brought)


def _bound(function: Any, input: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    order = [name for name in inspect.signature(function).parameters if name != "self"]
    placed = dict(zip(order, (input, *args), strict=False))
    if len(args) >= len(order) or placed.keys() & kwargs.keys():
        raise TypeError(f"{function.__name__} got {len(args) + 1} arguments in order and {sorted(kwargs)} by name")
    return {**placed, **kwargs}


def _check_cached(prompt: Tensor, further: Collection[str]) -> None:
    """Refuse a cache of what is generated where it is not one text of tokens alone: TransformerLens caches no other.

    Raises:
        UnsupportedModelError: of what it would be.
    """
    of = f"{len(prompt)} prompts, which end at different tokens" if len(prompt) > 1 else ""
    of = "embeddings" if prompt.is_floating_point() else of
    of = f"a prompt with {', '.join(sorted(further))}" if further else of
    if of:
        raise UnsupportedModelError(
            f"generate keeps no cache of {of}: leave return_cache=True out, and let run_with_cache read what was "
            "generated, with the attention_mask of its real tokens"
        )


def _check_returned(what: str, returned: Any) -> None:
    if returned not in _RETURNED:
        raise InputError(f"{what}: return_type is {returned!r}; expected 'input', 'str' or 'tokens'")


_FLAGS = (
    "do_sample",
    "stop_at_eos",
    "use_past_kv_cache",
    "verbose",
    "return_cache",
    "return_input_tokens",
    "output_logits",
)
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda value: _is_whole(value) and value >= 1, "a whole number from 1"),
    "max_tokens_per_yield": (lambda value: _is_whole(value) and value >= 1, "a whole number from 1"),
    "top_k": (lambda value: value is None or _is_whole(value) and value >= 1, "a whole number from 1, or None"),
    "top_p": (lambda value: value is None or _is_number(value) and 0 < value <= 1, "a number in (0, 1], or None"),
    "temperature": (lambda value: _is_number(value) and value >= 0, "a number from 0, which takes the likeliest token"),
    "freq_penalty": (lambda value: _is_number(value), "a number"),
    **dict.fromkeys(_FLAGS, (lambda value: isinstance(value, bool | np.bool_), "True or False")),
    "repetition_penalty": (lambda value: _is_number(value) and value > 0, "a number above 0"),
}
"""What TransformerLens's sampling can do with; it takes other values for another one, or fails somewhere inside."""


def _check_sampling(what: str, words: Mapping[str, Any]) -> None:
    for word, (fits, expected) in _RANGES.items():
        if word in words and not fits(words[word]):
            raise InputError(f"{what}: {word} is {words[word]!r}; expected {expected}")
    greedy = not words.get("do_sample", True) or words.get("temperature") == 0
    if greedy and words.get("freq_penalty"):
        raise InputError(
            f"{what}: freq_penalty is {words['freq_penalty']!r}, and counts in sampling alone; pass do_sample=True and "
            "a temperature above 0, or repetition_penalty"
        )


def _several(ends: Any) -> list[Any] | None:
    """One token or several, as a list."""
    ends = ends.reshape(-1).tolist() if isinstance(ends, Tensor) else ends
    return list(ends) if isinstance(ends, list | tuple) else None if ends is None else [ends]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
