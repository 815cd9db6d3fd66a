"""What people give a model to read, as tokens and as the input of a forward pass."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moe_lens.errors import InputError, a_kind
from moe_lens.model.hooks.model_input import ModelInput, Reading
from moe_lens.model.hooks.restarts import check_one_stream
from moe_lens.model.hooks.token_words import TokenWords
from moe_lens.model.loading.tokenizer import encode, own_ids


class InputReader(TokenWords):
    """The part of `HookedMoE` that reads texts, ids, embeddings and batches."""

    default_padding_side: str | None = None
    """Of texts that differ in length; None: as the tokenizer says."""

    def to_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Tokens of a text or of texts [batch, pos], BOS once.

        A text that opens with the BOS token's own text (a rendered chat template) gets no second one.

        Args:
            input: what `forward` takes; ids stay as they are.
            prepend_bos: whether a text is opened by BOS. None: where the tokenizer has one (and
                `cfg.default_prepend_bos` is not off); TransformerLens would put EOS in its place. False adds nothing.
            padding_side: of texts that differ in length; None: as the tokenizer says.
            move_to_device: to the model's device.
            truncate: whether to cut texts that are longer than the model's context, with a warning.

        Raises:
            InputError: the model has no tokenizer, or one without the BOS that was asked for, or the input cannot be
                read.
        """
        given = self._reading(prepend_bos, padding_side, truncate, None, may_be_empty=True)(input)
        _check_for_texts(input, given, prepend_bos, padding_side)
        tokens = given.tokens
        if tokens is None:
            raise InputError("the input is floating-point: embeddings have no tokens")
        return tokens.to(self.cfg.device) if move_to_device else tokens

    def read(
        self,
        input: Any,
        attention_mask: Any = None,
        *,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        truncate: bool = True,
        residual: bool = False,
    ) -> ModelInput:
        """Whatever people give a model to read, as a forward pass takes it.

        Args:
            input: a text, texts, ids [batch, pos] or [pos] (a tensor, an array, lists), embeddings, what a tokenizer of
                transformers returns (from `apply_chat_template` too), or a `TokenBatch`.
            attention_mask: 1 at real tokens and 0 at padding, [batch, pos], or [batch, heads, query, key]. One that
                the input brings must say the same. Ids without a mask are all real, whatever token is used for padding.
            prepend_bos: see `to_tokens`.
            padding_side: see `to_tokens`.
            truncate: see `to_tokens`.
            residual: whether a residual stream is given, as with `start_at_layer`.

        Raises:
            InputError: it cannot be read; says what came and what was expected.
            UnsupportedModelError: a residual stream, where layers read more than one.
        """
        if residual:
            check_one_stream(self.family)
        device = self.original_model.get_input_embeddings().weight.device  # pyright: ignore[reportCallIssue]
        reading = self._reading(prepend_bos, padding_side, truncate, None if device.type == "meta" else device)
        given = reading(input, attention_mask, residual=residual)
        _check_for_texts(input, given, prepend_bos, padding_side)
        return given

    def _reading(
        self,
        prepend_bos: bool | None,
        padding_side: str | None,
        truncate: bool,
        device: torch.device | None,
        may_be_empty: bool = False,
    ) -> Reading:
        tokenizer: Any = self.tokenizer
        pads = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos"))
        return Reading(
            encode=lambda text: self._encode(text, prepend_bos, truncate),
            padding_side=padding_side or self.default_padding_side or getattr(tokenizer, "padding_side", "right"),
            pad=next((pad for pad in pads if pad is not None), 0),
            d_vocab=len(self.original_model.get_input_embeddings().weight),  # pyright: ignore[reportCallIssue]
            d_model=self.cfg.d_model,
            device=device,
            may_be_empty=may_be_empty,
            keep=self._prepare_loss_attention_mask,
        )

    def _encode(self, text: str, prepend_bos: bool | None, truncate: bool) -> list[int]:
        """The ids of one text."""
        tokenizer = self._need_tokenizer()
        asked = None if prepend_bos is None and getattr(self.cfg, "default_prepend_bos", True) else bool(prepend_bos)
        ids, limit = encode(tokenizer, text, bos=asked, limit=None), self.cfg.n_ctx
        if not truncate or len(ids) <= limit:
            return ids
        warnings.warn(
            f"a text of {len(ids)} tokens is cut to the model's context, {limit}: give model.to_tokens(text, "
            "truncate=False) to read all of it",
            stacklevel=2,
        )
        return encode(tokenizer, text, bos=asked, limit=limit)

    def own_ids(self, text: str) -> tuple[list[int], list[int]]:
        """A text as the model's own tokenizer encodes it: the special tokens that it puts first, and the text's ids.

        Studies, statistics and lenses read texts in this way. `to_tokens` adds BOS where there is one, as
        TransformerLens does, even if the tokenizer itself would not.

        Args:
            text: One text.

        Raises:
            InputError: the model has no tokenizer.
        """
        return own_ids(self._need_tokenizer(), text)


def _check_for_texts(input: Any, given: ModelInput, prepend_bos: bool | None, padding_side: str | None) -> None:
    """Refuse what is said of texts where none came.

    Raises:
        InputError: BOS is to open ids, or a side is named for rows that are padded already, or not at all.
    """
    if prepend_bos and not given.was_text:
        raise InputError("prepend_bos=True is about texts, and the input is ids or embeddings, which stay as they are")
    if padding_side is not None and not given.was_text and not isinstance(input, Sequence):
        raise InputError(
            f"padding_side={padding_side!r} is about texts, or rows of ids, that differ in length; the input is "
            f"{a_kind(input)}: pass attention_mask= to say what is padding in it"
        )
