"""TransformerLens's functions on tokens: they read what `to_tokens` reads, and answer nothing else in silence."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.argument_checks import ReadByItself
from moe_lens.checked import Natural, checked
from moe_lens.errors import InputError, TokenError
from moe_lens.ids import one_id
from moe_lens.model.hooks.parameter_views import ParameterViews
from moe_lens.protocols import PaddedTokens


@checked
class TokenWords(ParameterViews):
    """The half of `HookedMoE` that says what tokens are called and where they stand."""

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InputError(
                "this model has no tokenizer, so text cannot be read: pass token ids, or wrap it with its tokenizer, "
                "HookedMoE.from_hf(model, tokenizer); from_pretrained takes the tokenizer that is beside the weights"
            )
        return self.tokenizer

    def to_string(self, tokens: Any) -> Any:
        """The text of ids: one for ids [pos] or a single id, a list for [batch, pos] or rows of ids.

        Args:
            tokens: Ids in any form: a number, rows, arrays, tensors [pos] or [batch, pos].

        Raises:
            InputError: something that is no ids, or ids that the model does not embed.
        """
        ids = self._ids(tokens)
        if not isinstance(ids, list):
            return self._decode([ids])
        return [self._decode(row) for row in ids] if any(isinstance(row, list) for row in ids) else self._decode(ids)

    def to_str_tokens(self, input: Any, prepend_bos: bool | None = None, padding_side: str | None = None) -> Any:
        """The text of each token; a list of them for several texts, or for a batch of several.

        Args:
            input: what `to_tokens` takes; each member of a list is read by itself, so that nothing is padded.
            prepend_bos: see `to_tokens`.
            padding_side: see `to_tokens`.

        Raises:
            InputError: the input cannot be read.
        """
        self._need_tokenizer()
        if isinstance(input, list | tuple) and any(isinstance(item, str) for item in input):
            return [self.to_str_tokens(item, prepend_bos, padding_side) for item in input]
        reader: Any = self
        if isinstance(input, str | Mapping | PaddedTokens):
            ids: Any = reader.to_tokens(input, prepend_bos, padding_side, move_to_device=False).tolist()
        else:
            ids = self._ids(input)
            ids = ids if isinstance(ids, list) else [ids]
        while len(ids) == 1 and isinstance(ids[0], list) and not isinstance(input, list | tuple):
            ids = ids[0]
        if any(isinstance(row, list) for row in ids):
            return [self.to_str_tokens(row) for row in ids]
        return [self._decode([token]) for token in ids]

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token.

        Args:
            string: A text without BOS, blanks included.

        Raises:
            TokenError: it is several tokens, or none; also an `AssertionError`, as in TransformerLens.
            InputError: it is no text.
        """
        if not isinstance(string, str):
            raise InputError(f"expected a text that is one token, got {string!r:.100}")
        ids = self.to_tokens(string, prepend_bos=False)[0].tolist()
        if len(ids) != 1:
            raise TokenError(f"{string!r} is {len(ids)} tokens, {self.to_str_tokens(string, False)}; expected one")
        return ids[0]

    def to_single_str_token(self, int_token: Natural) -> str:
        """The text of one id.

        Args:
            int_token: An id of the vocabulary.

        Raises:
            InputError: no whole number, or no id that the model embeds.
        """
        return self._decode([one_id("token", int_token, self._embedded())])

    def get_token_position(  # pyright: ignore[reportIncompatibleMethodOverride]  # two words
        self,
        single_token: str | Natural | Tensor,
        input: Any,
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """Where a token stands in one text, counted from 0.

        Args:
            single_token: an id, or a text that is one token.
            input: what `to_tokens` takes, a single text of it.
            mode: the first or the last place of several.
            prepend_bos: see `to_tokens`.
            padding_side: see `to_tokens`.

        Raises:
            TokenError: the token is not in the text, or is several; also an `AssertionError`, as in TransformerLens.
            InputError: several texts.
        """
        tokens = self.to_tokens(input, prepend_bos, padding_side, move_to_device=False)
        if len(tokens) != 1:
            raise InputError(f"a token has its place in one text; got {len(tokens)} texts")
        wanted = self.to_single_token(single_token) if isinstance(single_token, str) else one_id("token", single_token)
        places = (tokens[0] == wanted).nonzero()[:, 0].tolist()
        if not places:
            raise TokenError(f"the token {single_token!r} ({wanted}) is not in the text {self.to_string(tokens[0])!r}")
        return places[0 if mode == "first" else -1]

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "*tokens d_model"]:
        """Rows of the unembedding: what the final norm's output is multiplied with for a token's logit.

        Args:
            tokens: an id, a text that is one token, or several of them in a list; or ids of any shape.

        Raises:
            InputError: something else, or ids that the model does not embed.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        elif isinstance(tokens, list | tuple):
            tokens = [self.to_single_token(token) if isinstance(token, str) else token for token in tokens]
        try:
            ids = torch.tensor(self._ids(tokens), dtype=torch.long, device=self.W_U.device)
        except ValueError as error:
            raise InputError(f"tokens are rows that differ in length: {error}") from None
        found = self.W_U[:, ids].movedim(0, -1)
        return found.reshape(-1) if ids.numel() == 1 else found

    def loss_fn(
        self,
        logits: Annotated[Float[Tensor, "batch pos d_vocab"], ReadByItself()],
        tokens: Annotated[Int[Tensor, "batch pos"], ReadByItself()],
        attention_mask: Any = None,
        per_token: bool = False,
    ) -> Float[Tensor, "..."]:
        """The cross-entropy of each next token, in nats, as TransformerLens's.

        Args:
            logits: at every token.
            tokens: the ids that were read.
            attention_mask: 1 at real tokens, [batch, pos].
            per_token: at every token but the first, instead of the mean.

        Raises:
            InputError: the shapes do not belong together; torch would leave out what one has more than the other. Or a
                real token has no logit, in a family that embeds more than it predicts.
        """
        if tuple(logits.shape[:-1]) != tuple(tokens.shape):
            raise InputError(
                f"the loss needs logits at every token: got logits of shape {tuple(logits.shape)} and tokens of shape "
                f"{tuple(tokens.shape)}"
            )
        if (beyond := tokens >= logits.shape[-1]).any():
            real = beyond[:, 1:] & (
                True if attention_mask is None else attention_mask[:, -tokens.shape[1] :].bool()[:, 1:]
            )
            if real.any():
                raise InputError(
                    f"the loss of token {int(tokens[:, 1:][real][0])}: the model predicts ids from 0 to "
                    f"{logits.shape[-1] - 1}; with an attention_mask padding has no part in the loss"
                )
            tokens = tokens.masked_fill(beyond, 0)
        return super().loss_fn(logits, tokens, attention_mask, per_token)

    def _predicted(self) -> int:
        """How many ids have logits."""
        return getattr(self.adapter, "n_logits", None) or self._embedded()

    def _embedded(self) -> int:
        return len(self.original_model.get_input_embeddings().weight)  # pyright: ignore[reportCallIssue]

    def _ids(self, tokens: Any) -> Any:
        """Ids as they were given, one or in lists, each of them checked."""
        tokens = tokens.tolist() if hasattr(tokens, "tolist") else tokens
        if isinstance(tokens, list | tuple):
            return [self._ids(token) for token in tokens]
        return one_id("token", tokens, self._embedded())

    def _decode(self, ids: list[int]) -> str:
        if any(isinstance(token, list) for token in ids):
            raise InputError("token ids have more than two axes; expected [batch, pos] or [pos]")
        return self._need_tokenizer().decode(ids, clean_up_tokenization_spaces=False)
