"""What a forward pass is asked for, held against what it can give; torch and transformers would go on in silence."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor
from transformer_lens.utilities import Slice

from moe_lens.argument_checks import ReadByItself
from moe_lens.errors import InputError, a_kind
from moe_lens.model.families.family import Family
from moe_lens.model.hooks.key_value_padding import keeps_state, n_held
from moe_lens.model.hooks.model_input import ModelInput

NamesFilter = Annotated[str | Sequence[str] | Callable[[str], bool] | None, ReadByItself()]
_OF_TRANSFORMERS = {
    "output_hidden_states": "run_with_cache(input) keeps hook_resid_pre of every layer",
    "output_attentions": "run_with_cache(input) keeps attn.hook_pattern of every layer",
    "output_router_logits": "run_with_cache(input) keeps router_logits of every layer",
    "return_dict": 'return_type="logits", "loss", "both" or "logits_and_cache" says what comes back',
}
"""Words of transformers' models that change what they return, which here does not come back."""


def as_tensors(words: dict[str, Any]) -> None:
    """Put tensors in place of labels and positions that came as lists or arrays.

    Raises:
        InputError: Their rows differ in length, or they hold no numbers.
    """
    for word in ("labels", "position_ids"):
        value = words.get(word)
        if isinstance(value, list | tuple | np.ndarray):
            try:
                words[word] = torch.as_tensor(np.array(value))
            except (TypeError, ValueError) as error:
                raise InputError(f"{word} are no numbers in rows of one length: {value!r:.80}") from error


def layer_limits(n_layers: int, start: Any, stop: Any) -> tuple[int, int]:
    """The blocks that run: from the first to before the second.

    Args:
        n_layers: Blocks of the model.
        start: `start_at_layer`; negative ones count from the end. None: the first.
        stop: `stop_at_layer`, likewise. None: all.

    Raises:
        InputError: There is no such layer, or the pass would stop before it starts.
    """
    if start is not None and not isinstance(start, bool) and start == n_layers:
        raise InputError(
            f"there is no layer {start} to start at; expected {-n_layers} to {n_layers - 1}. "
            "model.unembed(model.ln_final(resid)) gives the logits of what leaves the last block"
        )
    first, last = _layer(n_layers, 0 if start is None else start), _layer(n_layers, n_layers if stop is None else stop)
    if start is not None and stop is not None and first > last:
        raise InputError(f"start_at_layer={start} is behind stop_at_layer={stop}: no block would run")
    return first, last


def _layer(n_layers: int, layer: Any) -> int:
    try:
        number = n_layers + 1 if isinstance(layer, bool) else operator.index(layer)
    except TypeError:
        number = n_layers + 1
    if not -n_layers <= number <= n_layers:
        raise InputError(f"there is no layer {layer!r} to start or stop at; expected {-n_layers} to {n_layers}")
    return number + n_layers if number < 0 else number


def as_names(names_filter: Any) -> Any:
    """A filter of names as a predicate, a list of names or None.

    Raises:
        InputError: It is something else.
    """
    if names_filter is None or callable(names_filter):
        return names_filter
    if isinstance(names_filter, str):
        return [names_filter]
    wanted = "expected a name, names, or a function from a name to True or False"
    if isinstance(names_filter, Mapping) or not isinstance(names_filter, Iterable):  # a dictionary's keys would be read
        raise InputError(f"names_filter is {a_kind(names_filter)}, {names_filter!r:.80}; {wanted}")
    names = list(names_filter)
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"names_filter holds {a_kind(name)}, {name!r:.80}; {wanted}")
    return names


def check_graph_kept(copying: list[str]) -> None:
    """Nothing, where activations can be kept in their graph.

    Args:
        copying: Arguments that were given and ask for copies.

    Raises:
        InputError: There are such arguments, or autograd is off.
    """
    if copying:
        raise InputError(
            f"keep_graph keeps the very activations that the model goes on with: leave out {', '.join(copying)}, "
            "and cut or convert what is in the cache"
        )
    if not torch.is_grad_enabled():
        raise InputError("keep_graph needs gradients, and autograd is off (torch.no_grad or inference_mode)")


def check_positions(pos_slice: Any, pos: int) -> None:
    """Nothing, where a slice of positions fits so many.

    Args:
        pos_slice: What TransformerLens's `Slice` takes, or one.
        pos: How many there are.

    Raises:
        InputError: It is no slice, or names a position that is not there.
    """
    try:
        Slice.unwrap(pos_slice).apply(torch.arange(pos))
    except (IndexError, TypeError, ValueError) as error:
        raise InputError(f"pos_slice is {pos_slice!r}, and there are {pos} positions: {error}") from error


def check_returned(return_type: Any, words: Mapping[str, Any], given: ModelInput) -> None:
    """Nothing, where what is to come back can come back.

    Args:
        return_type: Of `forward`.
        words: Its keywords.
        given: What it reads.

    Raises:
        InputError: The loss of a pass that stops early, or of embeddings without labels; or a word that only
            transformers' own output answers.
    """
    for word, instead in _OF_TRANSFORMERS.items():
        if words.get(word) or (word == "return_dict" and words.get(word) is not None):
            raise InputError(f"forward gives no output of transformers: {word}={words[word]!r}; {instead}")
    labels = words.get("labels")
    if labels is not None and (not isinstance(labels, Tensor) or labels.shape != given.values.shape[:2]):
        came = f"of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"{a_kind(labels)}"
        raise InputError(f"labels are {came}; expected a tensor of ids of shape {tuple(given.values.shape[:2])}")
    if words.get("start_at_layer") is not None and given.tokens is not None:
        raise InputError(
            "start_at_layer needs a residual stream [batch, pos, d_model], as hook_resid_pre has it; got ids"
        )
    if return_type == "logits_and_cache" and words.get("use_cache") is False:
        raise InputError("return_type='logits_and_cache' with use_cache=False: there would be no cache; leave one out")
    keeps = words.get("past_key_values") is not None or return_type == "logits_and_cache"
    if words.get("start_at_layer") and keeps:
        raise InputError(
            "start_at_layer with a key-value cache: blocks before it would store keys and values of another stream; "
            "leave one of them out"
        )
    if return_type in (None, "logits"):
        return
    if words.get("stop_at_layer") is not None:
        raise InputError(
            f"return_type={return_type!r} with stop_at_layer: a pass that stops early gives the residual stream there"
        )
    if return_type != "logits_and_cache" and given.tokens is None and labels is None:
        raise InputError(f"return_type={return_type!r} of embeddings or a residual stream needs the ids: pass labels=")


def check_numbers(words: Mapping[str, Any], given: ModelInput, n_logits: int) -> None:
    """Nothing, where labels and positions are numbers that can be meant.

    Args:
        words: Keywords of `forward`, and what the input brings.
        given: What is read.
        n_logits: How many ids are predicted.

    Raises:
        InputError: Labels that are no ids, or positions of another number than the tokens.
    """
    pos, labels, places = given.values.shape[1], words.get("labels"), words.get("position_ids")
    if isinstance(labels, Tensor) and labels.numel():
        ids = labels[labels != -100]
        whole = not (labels.is_floating_point() or labels.dtype == torch.bool)
        if not whole or (ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < n_logits):
            raise InputError(
                f"labels are {labels.dtype}, from {labels.min().item()} to {labels.max().item()}; expected ids from 0 "
                f"to {n_logits - 1}, or -100 where none is meant"
            )
    if places is not None and not isinstance(places, Tensor):
        raise InputError(f"position_ids are {a_kind(places)}; expected a tensor [batch, {pos}]")
    if places is not None and (places.dim() < 2 or places.shape[-1] != pos or places.dtype == torch.bool):
        raise InputError(f"position_ids are {places.dtype} of shape {tuple(places.shape)}; expected [batch, {pos}]")


def check_of_loss(return_type: Any, loss_per_token: bool, labels: Any) -> None:
    """Nothing, where what is said of the loss has a loss to be said of.

    Args:
        return_type: Of `forward`.
        loss_per_token: Of `forward`.
        labels: Of `forward`, or what the input brings as such; transformers would give their loss.

    Raises:
        InputError: Logits are to come back.
    """
    for word, given in (("loss_per_token", loss_per_token), ("labels", labels is not None)):
        if given and return_type in ("logits", "logits_and_cache"):
            raise InputError(
                f"{word} has no effect on return_type={return_type!r}; expected return_type='loss' or 'both', or none"
            )


def check_mask(given: ModelInput, past: Any) -> None:
    """Nothing, where a mask [batch, pos] covers what attention reads: the key-value cache's tokens and these.

    transformers takes a mask of another length from its beginning, so that padding would be read as text.

    Args:
        given: What is read.
        past: The key-value cache; None if there is none.

    Raises:
        InputError: The mask is too short or too long.
    """
    batch, pos = given.values.shape[:2]
    before = n_held(past)
    mask = given.attention_mask
    if mask is None or mask.dim() != 2:
        return
    width = mask.shape[1]
    if width < before + pos or (past is None and width > pos):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)} for {pos} tokens behind {before} in the key-value cache; "
            f"expected ({batch}, {before + pos}), 0 at padding in either"
        )


def check_family(family: Family, config: Any, given: ModelInput, before: int) -> None:
    """Nothing, where transformers computes what is meant.

    Args:
        family: What is particular to the model.
        config: Of transformers, of its text model.
        given: What is read.
        before: Tokens in the key-value cache.

    Raises:
        InputError: Several tokens behind a cache, a mask of queries and keys, or padding in front, where it does not.
    """
    mask = given.attention_mask
    if mask is not None and mask.dim() == 4 and keeps_state(config):
        raise InputError(
            f"layers of {family.model_type} read a text into a state, which a mask [batch, heads, query, key] does not "
            "reach: padding would leak into every token; expected attention_mask [batch, pos], 0 at padding"
        )
    if family.one_by_one and before and given.values.shape[1] > 1:
        raise InputError(
            f"{family.model_type} goes on with a key-value cache one token at a time: transformers would read these "
            f"{given.values.shape[1]} as if nothing came before; pass them one by one, or all without a cache"
        )
    if family.reads_front and given.mask is not None and bool((given.mask.int().diff(dim=1) > 0).any()):
        raise InputError(
            f"there is padding in front of a text, which attention in {family.model_type} would read, whatever the "
            "mask; expected padding behind (padding_side='right'), or one text"
        )


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask [batch, heads, query, key] of booleans as numbers that are added to attention scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
