"""What a key-value cache holds: layers, texts, and where there is padding in them.

transformers' caches do not say which of their tokens are padding; attention needs to be told again in every pass that
goes on with them. A cache that was filled here remembers it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor
from transformers import DynamicCache

from moe_lens.errors import InputError
from moe_lens.model.hf_compat import DynamicLayer, DynamicSlidingWindowLayer
from moe_lens.model.hooks.model_input import ModelInput

_NOTE = "_moe_lens_held"
_PAST = "past_key_values"
_BARE = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers that a cache which was made without a config can do without: it makes a `DynamicLayer` where one is needed."""


@dataclass(frozen=True, eq=False)
class _Held:
    """What was true of a cache when a pass had filled it."""

    seen: Bool[Tensor, "batch total"]
    """True at real tokens."""
    sample: Shaped[Tensor, "batch some"]
    """Some of the numbers that it held: others mean that it was cropped, reordered or filled by somebody else."""


def n_held(past: Any) -> int:
    """How many columns of tokens a cache holds; 0 for None.

    Args:
        past: The key-value cache; None if there is none.
    """
    return 0 if past is None else int(past.get_seq_length())


def check_held(past: Any, config: Any, batch: int) -> None:
    """Nothing, where a cache that holds tokens holds them for each of a model's layers, and for as many texts.

    transformers would go on with layers that are missing or empty as if nothing had come before.

    Args:
        past: The key-value cache; None if there is none.
        config: Of the transformers model that decodes.
        batch: Of the input.

    Raises:
        InputError: It was filled by another model, by a pass that stopped early, or for other texts.
    """
    if type(past).__module__ != DynamicCache.__module__ or not hasattr(past, "layers"):
        return  # a family's own
    fresh, layers = DynamicCache(config=config).layers, past.layers
    kinds, filled = _kinds(layers), [_is_filled(layer) for layer in layers]
    wanted, types = _kinds(fresh), getattr(config.get_text_config(), "layer_types", None) or ()
    for at, _ in filter(lambda each: each[1] in ("moe", "mlp"), enumerate(types)):
        wanted[at] = ""  # older releases of transformers make a state for it, which stays empty
    plain = all(type(layer) in _BARE or not kind for layer, kind in zip(fresh, wanted, strict=True))
    odd = [at for at, (mine, its) in enumerate(zip(wanted, kinds, strict=False)) if mine and mine != its]
    if (odd and (any(filled) or wanted[odd[0]] != "keys and values")) or not (layers or plain):
        at = odd[0] if odd else next(i for i, layer in enumerate(fresh) if type(layer) not in _BARE)
        raise InputError(
            f"{_PAST} is a {type(past).__name__} without what this model keeps of layer {at}; expected "
            "DynamicCache(config=model.original_model.config), or a cache that a whole pass of this model has filled"
        )
    if not any(filled):
        return
    least = max((at + 1 for at, kind in enumerate(wanted) if kind), default=0)
    if not least <= len(layers) <= len(wanted):
        raise InputError(
            f"{_PAST} holds {len(layers)} layers, and this model has {len(wanted)}; expected a cache that a whole pass "
            "of this model has filled"
        )
    lengths = {int(layer.get_seq_length()) for layer, kind in zip(layers, kinds, strict=True) if "keys" in kind}
    if not all(full for full, kind in zip(filled, wanted, strict=False) if kind) or len(lengths) > 1:
        raise InputError(
            f"{_PAST} holds tokens for some of its layers only; expected a cache that a whole pass of this model has "
            "filled"
        )
    for held in _tensors(past):
        if len(held) != batch:
            raise InputError(f"{_PAST} holds a batch of {len(held)}, and the input is one of {batch}")


def behind(past: Any, config: Any, given: ModelInput) -> ModelInput:
    """An input that goes on with a cache: attention is told of the padding in the cache, too.

    Args:
        past: The key-value cache; None if there is none.
        config: Of the transformers model that decodes.
        given: What is read. A mask of cache and input together is taken as it is, if it calls no padding a token.

    Raises:
        InputError: The cache holds padding, and it cannot be told where; a mask calls padding a token; or padding
            between two tokens is more to this model than what a mask hides.
    """
    note: _Held | None = None if past is None else past.__dict__.get(_NOTE)
    before, (batch, pos) = n_held(past), given.values.shape[:2]
    if note is None or not before or bool(note.seen.all()):
        return given
    held, mask = note.seen.to(given.values.device), given.attention_mask
    known = tuple(held.shape) == (batch, before) and _same(note.sample, _sample(past, before))
    why = _counts_columns(config, before + pos)
    if why and known and bool((~held & (held.long().cumsum(1) > 0)).any()):
        raise InputError(
            f"{_PAST} holds padding behind shorter texts, and {why}; expected padding in front (padding_side='left') "
            "in the pass that fills it"
        )
    if mask is None:
        if not known:
            raise InputError(
                f"{_PAST} held padding when it was filled, and was changed since; pass attention_mask of shape "
                f"({batch}, {before + pos}), 0 at padding in the cache or in the input"
            )
        real = held.new_ones(batch, pos) if given.mask is None else given.mask
        whole = torch.cat([held, real], 1)
        return replace(given, attention_mask=whole.long(), seen=whole)
    if known and mask.dim() == 2 and mask.shape[1] == before + pos and bool((mask[:, :before].bool() & ~held).any()):
        raise InputError(
            f"attention_mask is not 0 at padding that {_PAST} holds; leave it out, since the cache knows its padding, "
            f"or pass one of shape ({batch}, {before + pos}) that is 0 there"
        )
    return given


def note_padding(past: Any, given: ModelInput, before: int) -> None:
    """Let a cache remember which of its tokens are padding.

    Args:
        past: The key-value cache, after the pass; None if there is none.
        given: What was read.
        before: How many columns it held before the pass.
    """
    if not hasattr(past, "get_seq_length"):
        return
    note: _Held | None = past.__dict__.pop(_NOTE, None)
    batch, pos = given.values.shape[:2]
    if given.seen is None and (note is None or not before):
        return
    parts = [given.values.new_ones(batch, pos, dtype=torch.bool) if given.mask is None else given.mask]
    if before:
        whole = None if given.seen is None or given.seen.shape[1] != before + pos else given.seen[:, :before]
        remembered = None if note is None or note.seen.shape != (batch, before) else note.seen.to(parts[0].device)
        front = whole if whole is not None else remembered
        parts.insert(0, parts[0].new_ones(batch, before) if front is None else front)
    past.__dict__[_NOTE] = _Held(torch.cat(parts, 1), _sample(past, before + pos))


def note_prompts(past: Any, mask: Tensor | None) -> None:
    """Let a cache that transformers' own generation filled remember the padding of its prompts.

    Args:
        past: The key-value cache, after the last token; None if there is none.
        mask: Of the prompts, [prompt, pos], as generation was given it: 0 at padding. None: nothing is known of it.
    """
    if mask is None or mask.dim() != 2 or not hasattr(past, "get_seq_length"):
        return
    total, rows = n_held(past), [len(held) for held in _tensors(past)]
    if not total or not rows or rows[0] % len(mask):
        return
    past.__dict__.pop(_NOTE, None)
    real = mask.bool().repeat_interleave(rows[0] // len(mask), 0)[:, :total]  # beams and samples of a prompt in a row
    if not bool(real.all()):
        seen = torch.cat([real, real.new_ones(len(real), total - real.shape[1])], 1)
        past.__dict__[_NOTE] = _Held(seen, _sample(past, total))


# --- layers of a cache ---


def _kinds(layers: Any) -> list[str]:
    """What each layer keeps, in words; "" for one that keeps nothing."""
    kept = [(hasattr(layer, "get_seq_length"), hasattr(layer, "recurrent_states")) for layer in layers]
    return [" and ".join(["keys and values"] * keys + ["a state"] * state) for keys, state in kept]


def keeps_state(config: Any) -> bool:
    """Whether layers read a text into a state (recurrent, linear attention, convolution), of a text model's config."""
    return any("state" in kind for kind in _kinds(DynamicCache(config=config).layers))


def _is_filled(layer: Any) -> bool:
    states: dict[int, bool] = getattr(layer, "has_previous_state", {})
    return bool(any(states.values()) or (hasattr(layer, "get_seq_length") and layer.get_seq_length()))


def _counts_columns(config: Any, total: int) -> str:
    """Why a model reads a text otherwise when padding stands inside of it, whatever the mask; "" if it does not."""
    layers: Any = DynamicCache(config=config).layers
    if keeps_state(config):
        return "this model has read it into a state that no mask can clear"
    windows = [layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)]
    return (
        f"it takes room in this model's attention window of {min(windows)}"
        if min(windows, default=total) < total
        else ""
    )


def _tensors(past: Any) -> Iterator[Tensor]:
    """What a cache holds of some texts, by text."""
    for layer in getattr(past, "layers", ()):
        if not _is_filled(layer):
            continue
        held = [getattr(layer, "keys", None)]
        for states in ("conv_states", "recurrent_states"):
            held += getattr(layer, states, {}).values()
        yield from (value for value in held if isinstance(value, Tensor) and value.dim() > 1)


def _sample(past: Any, length: int) -> Tensor:
    """Some of the numbers that a cache holds of each text; of keys, one at every token."""
    for held in _tensors(past):
        some = held[:, 0, :length, 0] if held.dim() == 4 else held.flatten(1)[:, :64]
        return some.detach().clone()
    return torch.zeros(0, 0)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.to(one.device).nan_to_num())
