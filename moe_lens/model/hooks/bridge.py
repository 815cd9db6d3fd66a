"""Running a model with hook functions and caches."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import Slice

from moe_lens.checked import Natural
from moe_lens.errors import HookError, InputError
from moe_lens.model.cache.caching_hook import CachingHook
from moe_lens.model.cache.hook_cache import following_tokens
from moe_lens.model.cache.moe_cache import MoECache
from moe_lens.model.hooks.arguments import forward_words, further_words, refuse_unknown
from moe_lens.model.hooks.forward_checks import (
    NamesFilter,
    additive,
    as_names,
    check_kept,
    check_mask,
    check_positions,
    check_returned,
    layer_limits,
)
from moe_lens.model.hooks.hook_pairs import as_pairs
from moe_lens.model.hooks.hook_scope import ForwardClaim, HookContext, Hooks, without_batch
from moe_lens.model.hooks.key_value_cache import name_as_transformer_lens
from moe_lens.model.hooks.layer_hooks import SelectionState
from moe_lens.model.hooks.model_input import ModelInput, Reading
from moe_lens.model.hooks.token_words import TokenWords
from moe_lens.model.loading.tokenizer import encode, own_ids
from moe_lens.model.tl_compat import BridgeCore
from moe_lens.selection import Step

OF_INPUT = frozenset({"attention_mask", "prepend_bos", "padding_side"})
"""Keywords of `forward` that say how the input is read."""
RETURNED = ("logits", "loss", "both", "logits_and_cache", None)
"""What `forward` gives back: TransformerLens's words, but for `"predictions"`, which are of masked language models."""


@dataclass(frozen=True)
class _Among:
    """A name or a predicate on names, when only some blocks run: it may then mean no hook at all."""

    name: str | Callable[[str], bool]
    runs: Callable[[str], bool]
    may_be_none: bool = True

    def __call__(self, hook: str) -> bool:
        return (hook == self.name if isinstance(self.name, str) else self.name(hook)) and self.runs(hook)


@dataclass
class _Running:
    """What `forward` was called with."""

    given: ModelInput
    past: int
    step: Step | None = None


class ExpertBridge(TokenWords):
    """The running half of `HookedMoE`: it copies what it caches, and tells hook functions what is running."""

    default_padding_side: str | None = None
    """Of texts that differ in length; None: as the tokenizer says."""

    # --- what is given to it ---

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
            truncate: whether to cut texts that are longer than the model's context.

        Raises:
            InputError: the model has no tokenizer, or one without the BOS that was asked for, or the input cannot be
                read.
        """
        tokens = self._reading(prepend_bos, padding_side, truncate, None, may_be_empty=True)(input).tokens
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
            attention_mask: 1 at real tokens and 0 at padding, [batch, pos], or [batch, heads, query, key]; wins over
                one that the input brings. Ids without a mask are all real, whatever token is used for padding.
            prepend_bos: see `to_tokens`.
            padding_side: see `to_tokens`.
            truncate: see `to_tokens`.
            residual: whether a residual stream is given, as with `start_at_layer`.

        Raises:
            InputError: it cannot be read; says what came and what was expected.
        """
        device = self.original_model.get_input_embeddings().weight.device  # pyright: ignore[reportCallIssue]
        reading = self._reading(prepend_bos, padding_side, truncate, None if device.type == "meta" else device)
        return reading(input, attention_mask, residual=residual)

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
        return encode(tokenizer, text, bos=asked, limit=self.cfg.n_ctx if truncate else None)

    def own_ids(self, text: str) -> tuple[list[int], list[int]]:
        """A text as the model's own tokenizer encodes it: the special tokens that it puts first, and the text's ids.

        Studies, statistics and lenses read texts in this way. `to_tokens` adds BOS where there is one, as
        TransformerLens does, even if the tokenizer itself would not.

        Raises:
            InputError: the model has no tokenizer.
        """
        return own_ids(self._need_tokenizer(), text)

    def input_to_embed(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Any = None,
    ) -> tuple[Tensor, Tensor, None, Tensor | None]:
        """The residual stream before the first block, the tokens, None and the mask, as TransformerLens gives them.

        Args:
            input: see `forward`.
            prepend_bos: see `to_tokens`.
            padding_side: see `to_tokens`.
            attention_mask: see `read`.
        """
        given = self.read(input, attention_mask, prepend_bos=prepend_bos, padding_side=padding_side)
        residual = self.forward(given, stop_at_layer=0)
        return residual, given.values, None, given.attention_mask

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Without what TransformerLens hangs on blocks in a forward pass, which knows this object and no copy.

        The next pass hangs it up again, here and in the copy.
        """
        blocks: Any = self.blocks
        for block in blocks:
            block._teardown_capture_hooks()
        return super().__reduce_ex__(protocol)

    # --- caches ---

    def _selected(self, names_filter: NamesFilter) -> list[tuple[HookPoint, list[str]]]:
        """Hook points that a filter selects, each with the names under which it was asked for."""
        names_filter = as_names(names_filter)
        if names_filter is None or callable(names_filter):
            wanted = [n for n in self._all_hooks if names_filter is None or names_filter(n)]
            wanted = [n for n in wanted if self._gated_hook_reason(self._all_hooks[n].name or n) is None]
        else:
            wanted = list(names_filter)
            for name in wanted:
                self.check_hooks_to_add(self._find(name), name, lambda *_: None)
        points: dict[int, tuple[HookPoint, list[str]]] = {}
        for name in wanted:
            point = self._find(name)
            points.setdefault(id(point), (point, []))[1].append(name)
        return list(points.values())

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[dict[str, Tensor], list[tuple[str, Any]], list[tuple[str, Any]]]:
        """Caching hooks, not added yet: `(cache, fwd_hooks, bwd_hooks)`.

        What is stored is a copy: a later change in place by another hook does not reach it.
        """
        check_kept(device, dtype)
        cache = {} if cache is None else cache
        positions = Slice.unwrap(pos_slice)
        fwd_hooks = [
            (keys[0], CachingHook(cache, tuple(keys), device, dtype, positions, remove_batch_dim))
            for _, keys in self._selected(names_filter)
        ]
        return cache, fwd_hooks, [(name, keep.gradients()) for name, keep in fwd_hooks] if incl_bwd else []

    def run_with_cache(
        self,
        input: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: NamesFilter = None,
        stop_at_layer: int | None = None,
        start_at_layer: int | None = None,
        pos_slice: Any = None,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run the model and keep activations: `(output, cache)`.

        Args:
            input: what `forward` takes.
            return_cache_object: a `MoECache`; otherwise a dict of tensors.
            remove_batch_dim: for a batch of one.
            names_filter: a name, names or a predicate; None keeps everything, which selects eager attention.
            stop_at_layer: run the blocks before it; the output is the residual stream there.
            start_at_layer: see TransformerLens.
            pos_slice: positions to keep.
            incl_bwd: run backward from a scalar output, and keep gradients under `name + "_grad"`.
            reset_hooks_end: remove the caching hooks afterwards.
            clear_contexts: clear `ctx` of the points that were listened to.
            device: where to keep tensors, for example `"cpu"`.
            dtype: of what is kept, for floating-point tensors.
            kwargs: of `forward`: `return_type`, `attention_mask`, `prepend_bos`, `padding_side`, …

        Raises:
            HookError: a name that does not exist.
        """
        if incl_bwd and stop_at_layer is not None:
            raise HookError("incl_bwd needs the whole model: leave stop_at_layer out")
        given = self.read(
            input,
            **{word: kwargs.pop(word) for word in OF_INPUT & kwargs.keys()},
            residual=start_at_layer is not None,
        )
        check_positions(pos_slice, given.values.shape[1])
        kept, fwd_hooks, bwd_hooks = self.get_caching_hooks(
            names_filter, incl_bwd, device, pos_slice=pos_slice, dtype=dtype
        )
        first, last = layer_limits(len(self.blocks), start_at_layer, stop_at_layer)
        runs = [name for name, _ in fwd_hooks if self._runs(name, first, last)]
        fwd_hooks, bwd_hooks = ([(n, keep) for n, keep in hooks if n in runs] for hooks in (fwd_hooks, bwd_hooks))
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            output = self.forward(given, stop_at_layer=stop_at_layer, start_at_layer=start_at_layer, **kwargs)
            if incl_bwd:
                self._backward(output)
        positions = Slice.unwrap(pos_slice)
        parts = (given.tokens, given.mask, following_tokens(given.tokens, given.mask))
        tokens, mask, following = (None if part is None else positions.apply(part, dim=1) for part in parts)
        cache = MoECache(kept, self, has_batch_dim=True, tokens=tokens, mask=mask, following=following)
        if remove_batch_dim:
            cache.remove_batch_dim()
        return output, cache if return_cache_object else cache.cache_dict

    @staticmethod
    def _runs(name: str, first: int, last: int) -> bool:
        """Whether a hook fires when only the blocks from `first` to before `last` count."""
        head, _, rest = name.partition(".")
        if head != "blocks":
            return first == 0 or not BridgeCore._is_embedding_stage_hook(name)
        return first <= int(rest.partition(".")[0]) < last

    @staticmethod
    def _backward(output: Any) -> None:
        if not isinstance(output, Tensor) or output.numel() != 1:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise HookError(f'incl_bwd needs a scalar to run backward from, got {shape}; pass return_type="loss"')
        if not output.requires_grad:
            raise HookError("incl_bwd needs gradients: no parameter requires one, or autograd is off")
        output.backward()

    # --- hooks ---

    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> HookContext:
        """Hooks that are in place inside a `with`: `with model.hooks([(name, function)]): …`.

        The model belongs to the thread that is inside, from the first open context to the last.

        Args:
            fwd_hooks: pairs of a name, or a predicate on names, and a function `(activation, hook)`.
            bwd_hooks: the same for gradients.
            reset_hooks_end: take these hooks out at the end.
            clear_contexts: clear `ctx` of their hook points at the end.

        Raises:
            HookError: when it is entered: a hook that does not exist.
            InUseError: when it is entered: another thread uses the model.
        """
        return HookContext(self, (as_pairs(fwd_hooks), as_pairs(bwd_hooks)), reset_hooks_end, clear_contexts)

    def run_with_hooks(
        self,
        input: Any,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        return_type: str | None = "logits",
        stop_at_layer: int | None = None,
        start_at_layer: int | None = None,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run the model with hooks that are in place for this run only.

        Args:
            input: what `forward` takes.
            fwd_hooks: pairs of a name, or a predicate on names, and a function `(activation, hook)`.
            bwd_hooks: the same for gradients.
            reset_hooks_end: take these hooks out at the end.
            clear_contexts: clear `ctx` of their hook points at the end.
            return_type: `"logits"`, `"loss"`, `"both"`, …
            stop_at_layer: run the blocks before it; the output is the residual stream there.
            start_at_layer: see TransformerLens.
            remove_batch_dim: show hooks activations without a batch axis, for a batch of one.
            kwargs: of `forward`: `attention_mask`, `prepend_bos`, `padding_side`, …

        Raises:
            HookError: a hook that does not exist, or that returned what cannot be used.
            InUseError: another thread uses the model.
        """
        if "names_filter" in kwargs:
            raise InputError("run_with_hooks takes no names_filter: it caches nothing; run_with_cache does")
        first, last = layer_limits(len(self.blocks), start_at_layer, stop_at_layer)
        fwd, bwd = (
            [
                (self._among(name, first, last), without_batch(function) if remove_batch_dim else function)
                for name, function in as_pairs(hooks)
            ]
            for hooks in (fwd_hooks, bwd_hooks)
        )
        with self.hooks(fwd, bwd, reset_hooks_end, clear_contexts):
            limits = {"start_at_layer": start_at_layer, "stop_at_layer": stop_at_layer}
            limits = {name: value for name, value in limits.items() if value is not None}
            return self.forward(input, return_type=return_type, **limits, **kwargs)

    def _among(self, name: str | Callable[[str], bool], first: int, last: int) -> str | Callable[[str], bool]:
        """What a name or a predicate means when only the blocks from `first` to before `last` run."""
        self.points_of(name, None, "fwd")
        if isinstance(name, str) and self._runs(name, first, last):
            return name
        return _Among(name, lambda hook: self._runs(hook, first, last))

    # --- the forward pass that is running, for hook functions that ask ---

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # what follows is by name here
        self,
        input: Any = None,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As TransformerLens's; hook functions can ask `current_tokens()` meanwhile which tokens are passing.

        The loss is a mean over tokens that follow a real token; padding has no part in it. Ids that come without a mask
        are all real, as in TransformerLens, whatever token was used for padding.

        Args:
            input: a text, texts, ids, embeddings, what a tokenizer of transformers returns, or a `TokenBatch`; see
                `read`.
            return_type: `"logits"`, `"loss"`, `"both"`, `"logits_and_cache"`, or None for nothing; the final norm and
                the unembedding then run only if somebody listens there.
            loss_per_token: the loss at every token but the first, [batch, pos - 1], 0 where padding has a part in it.
            prepend_bos: see `to_tokens`.
            padding_side: see `to_tokens`.
            attention_mask: see `read`.
            kwargs: `start_at_layer`, `stop_at_layer`, `past_key_values` (or `cache`, its newer name in
                transformers), `labels`, …, and what the transformers model takes, such as `position_ids`.

        Raises:
            InputError: an input that cannot be read, an argument that nobody reads or that has no such value, or the
                loss of a single token.
            InUseError: another thread uses the model.
        """
        kind = type(self.original_model)
        refuse_unknown("forward", kwargs, forward_words(kind))
        past = name_as_transformer_lens(kwargs)
        self._check_kernel()
        if return_type not in RETURNED:
            raise InputError(f"return_type is {return_type!r}; expected one of {', '.join(map(repr, RETURNED))}")
        residual = kwargs.get("start_at_layer") is not None
        given = self.read(input, attention_mask, prepend_bos=prepend_bos, padding_side=padding_side, residual=residual)
        words = {name: value for name, value in given.words.items() if name not in kwargs}
        if "token_type_ids" not in further_words(kind):
            words.pop("token_type_ids", None)
        refuse_unknown("the input, for forward,", words, forward_words(kind))
        check_returned(return_type, {**words, **kwargs}, given)
        check_mask(given, past)
        stop = kwargs.get("stop_at_layer")
        _, last = layer_limits(len(self.blocks), kwargs.get("start_at_layer"), stop)
        mask = given.attention_mask
        if mask is not None and mask.dtype == torch.bool and mask.dim() == 4 and self._attends_eagerly():
            mask = additive(mask, self.original_model.dtype)  # pyright: ignore[reportArgumentType]
        claim = ForwardClaim(self)
        with claim:
            claim.running = _Running(given, 0 if past is None else past.get_seq_length())
            in_vain = return_type is None and kwargs.get("labels") is None and not self._head_is_heard()
            if last == len(self.blocks) and (stop is not None or in_vain):
                claim.end_after_blocks()
            out = super().forward(
                given.values,
                return_type,
                loss_per_token,
                attention_mask=mask,
                **words,
                **kwargs,
            )
            return None if stop is None and return_type is None else out

    def _attends_eagerly(self) -> bool:
        """Whether transformers' eager attention runs, which adds a mask to scores whatever it holds."""
        return self._hf_config.get_text_config()._attn_implementation == "eager"

    def _head_is_heard(self) -> bool:
        """Whether anybody listens to the final norm or the unembedding, or to modules in them."""
        parts: Any = (self.ln_final, self.unembed)
        return any(m._forward_hooks or m._forward_pre_hooks for part in parts for m in part.modules())

    def _finalize_return(
        self, return_type: str | None, logits: Any, input_ids: Any, *, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        """TransformerLens's, with the padding that attention was not told of left out of the loss, too."""
        running: _Running | None = self.owner.running
        if running is not None and attention_mask is None:
            attention_mask = running.given.mask
        if return_type in ("loss", "both") and not kwargs.get("loss_per_token"):
            self._require_pairs(input_ids, attention_mask, kwargs.get("labels"))
        return super()._finalize_return(return_type, logits, input_ids, attention_mask=attention_mask, **kwargs)

    def _require_pairs(self, values: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> None:
        """Raise where no token follows a real one: the mean of no losses is no number."""
        follows = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        if attention_mask is not None:
            follows = self._prepare_loss_attention_mask(attention_mask, values[..., 0] if values.dim() == 3 else values)
        pairs = follows[:, :-1] & follows[:, 1:]
        if labels is not None:
            pairs = pairs & (labels[:, 1:] != -100).to(pairs.device)
        if not pairs.any():
            raise InputError(
                f"there is no loss in {values.shape[0]} × {values.shape[1]} tokens: no token follows another"
            )

    def current_tokens(self) -> Step | None:
        """The tokens of the forward pass that is running; None where `forward` does not run."""
        running: _Running | None = self.owner.running
        if running is None:
            return None
        if running.step is None:
            running.step = self._step(running)
        return running.step

    def step(self) -> Step | None:
        """The former name of `current_tokens`, for one release."""
        warnings.warn("model.step() is now model.current_tokens()", DeprecationWarning, stacklevel=2)
        return self.current_tokens()

    @staticmethod
    def _step(running: "_Running") -> Step:
        given = running.given
        batch, pos = given.values.shape[:2]
        seen = given.seen
        if seen is not None and seen.shape[1] == pos and running.past:
            seen = torch.cat([seen.new_ones(batch, running.past), seen], 1)
        return Step(int(batch), int(pos), given.tokens, seen, running.past)

    def experts_in_slots(self, layer: Natural) -> Int[Tensor, "batch pos top_k"]:
        """Ids of the experts that the forward pass now running computes in a layer, by rank.

        For hook functions, from `hook_routing_weights` on: it holds what earlier hooks have forced, and −1 in slots
        that `hook_expert_kept` leaves out.

        Raises:
            HookError: a dense layer, or a layer that is not running or has not selected yet.
        """
        return self._hooks_of(layer).experts_in_slots()

    def selection_state(self, layer: Natural) -> SelectionState:
        """What the forward pass now running selects a layer's experts from; for hook functions on the selection.

        Raises:
            HookError: a dense layer, or a layer that is not selecting.
        """
        return self._hooks_of(layer).selection_state()
