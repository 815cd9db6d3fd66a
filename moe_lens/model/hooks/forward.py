"""Running a model with hook functions: `forward`, `hooks`, `run_with_hooks`."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from moe_lens.checked import Natural
from moe_lens.errors import InputError, UnsupportedModelError
from moe_lens.model.experts.offloaded_experts import check_unwritten, without_numbers
from moe_lens.model.hooks.arguments import forward_words, further_words, refuse_unknown
from moe_lens.model.hooks.cache_names import CACHE, PAST, fitting_cache, name_as_transformer_lens
from moe_lens.model.hooks.forward_checks import (
    additive,
    as_tensors,
    check_family,
    check_mask,
    check_numbers,
    check_of_loss,
    check_returned,
    layer_limits,
)
from moe_lens.model.hooks.hook_pairs import as_pairs
from moe_lens.model.hooks.hook_scope import ForwardClaim, HookContext, Hooks, without_batch
from moe_lens.model.hooks.key_value_padding import behind, check_held, n_held, note_padding
from moe_lens.model.hooks.latent_cache import check_all_stored
from moe_lens.model.hooks.layer_hooks import SelectionState
from moe_lens.model.hooks.model_input import ModelInput, further
from moe_lens.model.hooks.restarts import check_start
from moe_lens.model.hooks.to_tokens import InputReader
from moe_lens.model.loading.state_dict import WRAPPER
from moe_lens.model.tl_compat import BridgeCore
from moe_lens.model.torch_transforms import uncompiled
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


def tell_tokens(
    prompt: Tensor | None,
    claim: Any,
    module: Any,
    args: Any,  # noqa: ARG001
    kwargs: dict[str, Any],
) -> None:
    """Tell hooks which tokens pass, before a pass of transformers' own generation; see `ModuleHooks.before`.

    Args:
        prompt: True at the prompts' real tokens; None where nothing is padding.
        claim: What tells them.
        module: The model.
        args: Its arguments in order; there are none.
        kwargs: Its arguments by name.

    Raises:
        HookError: a hook function runs the model that runs it.
    """
    claim.owner.check_between_passes()
    check_unwritten(module)
    ids = kwargs.get("input_ids")
    values = kwargs.get("inputs_embeds") if ids is None else ids
    if values is None:
        return
    past = n_held(kwargs.get(CACHE) if kwargs.get(PAST) is None else kwargs[PAST])
    mask, total = kwargs.get("attention_mask"), past + values.shape[1]
    if isinstance(mask, Tensor) and mask.dim() == 2:
        mask = mask[:, :total].bool()
    elif prompt is not None:  # caches of a fixed size get masks of scores; each prompt has as many rows as beams
        mask = prompt.repeat_interleave(len(values) // len(prompt), dim=0)
        mask = F.pad(mask[:, :total], (0, max(0, total - mask.shape[1])), value=True)
    else:
        mask = None
    claim.running = _Running(ModelInput(values, seen=mask), past)


def forget_tokens(claim: Any, module: Any, args: Any, out: Any) -> None:  # noqa: ARG001
    """The pass that `tell_tokens` has told of is over; see `ModuleHooks.after`.

    Args:
        claim: What has told them.
        module: The model.
        args: Its arguments.
        out: What it gave.
    """
    claim.running = None


class _Fetches:
    """In a model that can be copied, and not pickled: what accelerate hangs on modules are functions without a name."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Fetches":
        return self

    def __reduce__(self) -> Any:
        raise UnsupportedModelError(
            "a model that fetches weights from the disk or among devices (device_map) is not pickled: write it with "
            "save_pretrained, and load that folder where it is needed"
        )


class ExpertBridge(InputReader):
    """The part of `HookedMoE` that runs it with hooks, and tells hook functions what is running."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Without what TransformerLens hangs on blocks in a forward pass, which knows this object and no copy.

        The next pass hangs it up again, here and in the copy.

        Raises:
            UnsupportedModelError: it is pickled, not copied, and fetches weights from the disk or among devices.
        """
        blocks: Any = self.blocks
        for block in blocks:
            block._teardown_capture_hooks()
        reduced: Any = super().__reduce_ex__(protocol)
        made, arguments, state, *others = reduced
        if any(hasattr(module, "_hf_hook") for module in self.modules()):
            state = {"fetches": _Fetches(), **state}
        return made, arguments, state, *others

    @staticmethod
    def _runs(name: str, first: int, last: int) -> bool:
        """Whether a hook fires when only the blocks from `first` to before `last` count."""
        head, _, rest = name.partition(".")
        if head != "blocks":
            return first == 0 or not BridgeCore._is_embedding_stage_hook(name)
        return first <= int(rest.partition(".")[0]) < last

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

    # --- hooks ---

    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> HookContext:
        """Hooks that are in place inside a `with`: `with model.hooks([(name, function)]): …`.

        While any such context is open, only the thread that opened it can use the model.

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

    @uncompiled
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
            remove_batch_dim: pass activations to hooks without a batch axis, for a batch of one.
            kwargs: of `forward`: `attention_mask`, `prepend_bos`, `padding_side`, …

        Raises:
            HookError: a hook that does not exist, or that returned something unusable.
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

    @uncompiled
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
        """Run the model, as in TransformerLens; `current_tokens()` tells hook functions which tokens are running.

        The loss is a mean over real tokens that follow a real token, so that padding has no part in it. Ids without a
        mask all count as real, as in TransformerLens, whatever token was used for padding.

        Args:
            input: a text, texts, ids, embeddings, what a tokenizer of transformers returns, or a `TokenBatch`; see
                `read`.
            return_type: `"logits"`, `"loss"`, `"both"`, `"logits_and_cache"`, or None for nothing; the final norm and
                the unembedding then run only if there are hooks on them.
            loss_per_token: return the loss of every token but the first, [batch, pos - 1]; 0 where padding is involved.
            prepend_bos: see `to_tokens`.
            padding_side: see `to_tokens`.
            attention_mask: see `read`.
            kwargs: `start_at_layer`, `stop_at_layer`, `past_key_values` (or `cache`, its newer name in
                transformers), `labels`, …, and what the transformers model takes, such as `position_ids`.

        Raises:
            InputError: an input that cannot be read, an unknown argument or value of an argument, or the loss of a
                single token.
            HookError: a hook function runs the model that runs it.
            InUseError: another thread uses the model.
            UnsupportedModelError: `start_at_layer` where layers read more than one residual stream.
        """
        kind = type(self.original_model)
        refuse_unknown("forward", kwargs, forward_words(kind))
        past = name_as_transformer_lens(kwargs)
        as_tensors(kwargs)
        self._check_model()
        if return_type not in RETURNED:
            raise InputError(f"return_type is {return_type!r}; expected one of {', '.join(map(repr, RETURNED))}")
        residual = kwargs.get("start_at_layer") is not None
        given = self.read(input, attention_mask, prepend_bos=prepend_bos, padding_side=padding_side, residual=residual)
        words = further(given.words, kwargs)
        if "token_type_ids" not in further_words(kind):
            words.pop("token_type_ids", None)
        refuse_unknown("the input, for forward,", words, forward_words(kind))
        check_returned(return_type, {**words, **kwargs}, given)
        check_of_loss(return_type, loss_per_token, {**words, **kwargs}.get("labels"))
        if return_type == "logits_and_cache" and "use_cache" in forward_words(kind):  # a config may say otherwise
            kwargs["use_cache"] = True
        check_numbers(asked := {**words, **kwargs}, given, self._predicted())
        if isinstance(asked.get("labels"), Tensor):
            (kwargs if "labels" in kwargs else words)["labels"] = asked["labels"].long()
        check_all_stored(past)
        config = self._hf_config.get_text_config()
        check_held(past, config, len(given.values))
        check_mask(given := behind(past, config, given), past)
        check_family(self.family, config, given, n_held(past))
        stop = kwargs.get("stop_at_layer")
        first, last = layer_limits(len(self.blocks), kwargs.get("start_at_layer"), stop)
        if residual:
            check_start(self, first, given.values.shape[1])
        mask = given.attention_mask
        if given.tokens is None and self._accepts_derived_position_ids():  # of ids, TransformerLens derives them
            kwargs = {**({} if "position_ids" in asked else given.positions()), **kwargs}
        if mask is not None and mask.dtype == torch.bool and mask.dim() == 4 and self._attends_eagerly():
            mask = additive(mask, self.original_model.dtype)  # pyright: ignore[reportArgumentType]
        self.owner.check_between_passes()
        check_unwritten(self.original_model)
        claim = ForwardClaim(self)
        with claim, fitting_cache(past):
            claim.running = _Running(given, before := n_held(past))
            in_vain = return_type is None and kwargs.get("labels") is None and not self._head_is_heard()
            if last == len(self.blocks) and (stop is not None or in_vain):
                claim.end_after_blocks()
            try:
                out = super().forward(
                    given.values,
                    return_type,
                    loss_per_token,
                    attention_mask=mask,
                    **words,
                    **kwargs,
                )
            except RuntimeError as error:
                if (lacking := without_numbers(self.original_model)) is not None:
                    raise InputError(
                        f"{lacking.replace(WRAPPER, '')} is on the meta device and holds no numbers: load the model "
                        "with its weights (load_state_dict(…, assign=True) gives parameters alone, and no buffers)"
                    ) from error
                raise
            if return_type == "logits_and_cache" and out[1] is None:
                raise InputError(
                    "the model keeps no key-value cache in this pass: under gradient checkpointing, in training, "
                    "transformers stores none (model.eval())"
                )
            filled = out[1] if past is None and return_type == "logits_and_cache" else past
            note_padding(filled, given, before)
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
        """TransformerLens's; losses leave unseen padding out and are in float32 at least, as transformers' are."""
        running: _Running | None = self.owner.running
        if running is not None and attention_mask is None:
            attention_mask = running.given.mask
        if return_type in ("loss", "both") and not kwargs.get("loss_per_token"):
            self._require_pairs(input_ids, attention_mask, kwargs.get("labels"))
        finish = partial(super()._finalize_return, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if return_type in ("loss", "both") and isinstance(logits, Tensor):
            loss = finish("loss", logits.to(torch.promote_types(logits.dtype, torch.float32)))
            return loss if return_type == "loss" else (logits, loss)
        return finish(return_type, logits)

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
            running.step = self._step(running, self.owner.columns)
        return running.step

    def step(self) -> Step | None:
        """The former name of `current_tokens`, for one release."""
        warnings.warn("model.step() is now model.current_tokens()", DeprecationWarning, stacklevel=2)
        return self.current_tokens()

    @staticmethod
    def _step(running: "_Running", columns: Tensor | None) -> Step:
        given = running.given
        batch, pos = given.values.shape[:2]
        seen = given.seen
        if seen is not None and seen.shape[1] == pos and running.past:
            seen = torch.cat([seen.new_ones(batch, running.past), seen], 1)
        if columns is not None:  # beams: as many rows for each prompt
            each, rest = divmod(batch, len(columns))
            columns = None if rest or not each else columns.repeat_interleave(each, dim=0)
        return Step(int(batch), int(pos), given.tokens, seen, running.past, columns)

    def experts_in_slots(self, layer: Natural) -> Int[Tensor, "batch pos top_k"]:
        """Ids of the experts that the forward pass now running computes in a layer, by rank.

        For hook functions, from `hook_routing_weights` on: forced experts are included, and slots that
        `hook_expert_kept` leaves out hold −1.

        Args:
            layer: The MoE layer that is running.

        Raises:
            HookError: a dense layer, or a layer that is not running or has not selected yet.
        """
        return self._hooks_of(layer).experts_in_slots()

    def selection_state(self, layer: Natural) -> SelectionState:
        """What the forward pass now running selects a layer's experts from; for hook functions on the selection.

        Args:
            layer: The MoE layer that is selecting.

        Raises:
            HookError: a dense layer, or a layer that is not selecting.
        """
        return self._hooks_of(layer).selection_state()
