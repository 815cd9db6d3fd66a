"""What people give a model to read: text, ids, embeddings, or what tokenizers return. One function reads all of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int, Num, Shaped
from torch import Tensor

from moe_lens.errors import InputError, a_kind
from moe_lens.ids import as_mask
from moe_lens.protocols import PaddedTokens

EXPECTED = (
    "expected a text, a list of texts, token ids [batch, pos] or [pos], what a tokenizer of transformers returns, "
    "or a TokenBatch"
)
_OF_TOKENIZERS = frozenset(
    {"special_tokens_mask", "offset_mapping", "length", "num_truncated_tokens", "assistant_masks"}
    | {"overflowing_tokens", "overflow_to_sample_mapping"}
)
"""What tokenizers return beside ids and mask that no model reads."""


@dataclass(frozen=True, eq=False)
class ModelInput:
    """An input as a forward pass takes it: checked, on the model's device."""

    values: Num[Tensor, "batch pos *d_model"]
    """Ids [batch, pos], or embeddings (or a residual stream) [batch, pos, d_model], which are floating-point."""
    attention_mask: Shaped[Tensor, "batch ..."] | None = None
    """What attention is to be told; None where it need not know: nothing is padding, or all of it stands last."""
    seen: Bool[Tensor, "batch total"] | None = None
    """True at real tokens, false at padding, a key-value cache's tokens in front if the mask says; None: no padding."""
    was_text: Literal["", "text", "texts"] = ""
    """Whether it was a text, or a list of texts."""
    words: dict[str, Any] = field(default_factory=dict)
    """What else a tokenizer or processor returned for the model."""
    columns: Int[Tensor, "batch pos"] | None = None
    """Of a prompt: the column that each column had in what came, before padding was moved."""

    @property
    def tokens(self) -> Tensor | None:
        """The ids, [batch, pos]; None for embeddings."""
        return None if self.values.is_floating_point() else self.values

    @property
    def mask(self) -> Tensor | None:
        """True at real tokens, [batch, pos]; None when there is no padding."""
        return None if self.seen is None else self.seen[:, -self.values.shape[1] :]

    def positions(self) -> dict[str, Int[Tensor, "batch pos"]]:
        """`position_ids` in which what a mask leaves out has no place of its own; nothing where that moves no token.

        As TransformerLens has it for ids: rows in which padding stands in front of no token keep 0, 1, 2, …
        """
        mask = self.attention_mask
        if mask is None or mask.dim() != 2:
            return {}
        real, plain = mask.bool(), torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        closed = (real.long().cumsum(-1) - 1).clamp(min=0)
        moved = ((closed != plain) & real).any(-1, keepdim=True)
        places = torch.where(moved, closed, plain)[:, -self.values.shape[1] :]
        return {"position_ids": places} if bool(moved.any()) else {}

    def laid_left(self) -> "ModelInput":
        """The same with padding in front, as generation needs it, which continues what stands last."""
        mask = self.mask
        if mask is None or bool(mask[:, -1].all()):
            batch, pos = self.values.shape[:2]
            return replace(self, columns=torch.arange(pos, device=self.values.device).expand(batch, pos))
        if self.attention_mask is not None and self.attention_mask.dim() != 2:
            raise InputError("generation needs a mask [batch, pos], or padding on the left; got padding behind a text")
        order = mask.int().argsort(dim=1, stable=True)
        at = order if self.values.dim() == 2 else order[..., None].expand_as(self.values)
        moved = {
            name: word.gather(1, order.to(word.device))
            for name, word in self.words.items()
            if isinstance(word, Tensor) and word.shape == mask.shape
        }
        mask, words = mask.gather(1, order), {**self.words, **moved}
        values = self.values.gather(1, at)
        return replace(self, values=values, attention_mask=mask.long(), seen=mask, words=words, columns=order)


@dataclass(frozen=True)
class Reading:
    """How inputs are read for one model."""

    encode: Callable[[str], list[int]]
    """The ids of one text, opened by BOS or not."""
    padding_side: str
    pad: int
    d_vocab: int
    """Ids that the model embeds."""
    d_model: int
    device: torch.device | None
    """Where it wants its input; None where that is not to be changed."""
    may_be_empty: bool
    """Whether a text may have no tokens: a model cannot run on it."""
    keep: Callable[[Tensor, Tensor], Tensor]
    """From a mask of attention, [batch, heads, query, key], and values [batch, pos] to where tokens are real."""

    def __call__(self, input: Any, attention_mask: Any = None, *, residual: bool = False) -> ModelInput:
        """Read an input.

        Args:
            input: What came.
            attention_mask: [batch, pos], with the key-value cache's tokens in front if there are any, or
                [batch, heads, query, key]. One that the input brings must say the same of its tokens.
            residual: Whether a residual stream is meant, as with `start_at_layer`.

        Raises:
            InputError: It cannot be read; says what came and what was expected.
        """
        if self.padding_side not in ("left", "right"):
            raise InputError(f"padding_side is {self.padding_side!r}; expected 'left' or 'right'")
        if isinstance(input, ModelInput):
            if attention_mask is None:
                return input
            return replace(input, **self._one_mask(input.values, attention_mask, input.mask, None))
        words: dict[str, Any] = {}
        brought: Any = None
        if isinstance(input, Mapping):
            input, brought, words = _of_tokenizer(input)
        elif isinstance(input, PaddedTokens) and isinstance(input.mask, Tensor):
            input, brought = input.tokens, input.mask
        input = _unpacked(input)
        items = _items(input)
        if items is None or not items or not all(isinstance(item, str) for item in items):
            values, inferred = self._numbers(input if items is None else items, residual)
            was_text = ""
        else:
            values, inferred = self._texts(items)
            was_text = "text" if isinstance(input, str) else "texts"
        if attention_mask is None and brought is None:
            given = self._padding(inferred)
        else:
            given = self._one_mask(values, attention_mask, brought, inferred)
        return self._moved(ModelInput(values, was_text=was_text, words=words, **given))

    # --- what is read ---

    def _texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        rows = [self.encode(text) for text in texts]
        for number, row in enumerate(rows):
            if not row and not self.may_be_empty:
                which = "the text" if len(rows) == 1 else f"text {number} of {len(rows)}"
                raise InputError(f"{which} is empty: it has no token to run a model on")
        for text, row in zip(texts, rows, strict=True):
            if row and max(row) >= self.d_vocab:
                raise InputError(
                    f"the tokenizer reads {text!r:.40} as ids up to {max(row)}, but the model embeds 0 to "
                    f"{self.d_vocab - 1}: is it this model's tokenizer?"
                )
        return self._padded([torch.tensor(row, dtype=torch.long) for row in rows])

    def _numbers(self, value: Any, residual: bool) -> tuple[Tensor, Tensor | None]:
        """Ids or embeddings, and where they are real if their rows differ in length."""
        values, mask = self._rows(value) if isinstance(value, list) else (value, None)
        if not isinstance(values, Tensor):
            raise InputError(f"the input is of type {type(value).__name__}; {EXPECTED}")
        shape = tuple(values.shape)
        if values.is_floating_point():
            values = values[None] if residual and values.dim() == 2 else values
            if values.dim() != 3 or values.shape[-1] != self.d_model:
                raise InputError(
                    f"the input is {values.dtype} of shape {shape}: no token ids, which are whole numbers, and no "
                    f"{'residual stream' if residual else 'embeddings'}, which are [batch, pos, {self.d_model}]"
                )
        else:
            values = self._ids(values[None] if values.dim() == 1 else values, shape)
        if not values.numel():
            raise InputError(f"the input is empty, of shape {shape}; a model needs a token at least")
        return values, mask

    def _ids(self, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
        if ids.dtype == torch.bool or ids.is_complex():
            raise InputError(f"the input is {ids.dtype}: token ids are whole numbers (a mask goes to attention_mask=)")
        if ids.dim() != 2:
            raise InputError(f"token ids have shape {shape}; expected [batch, pos] or [pos]")
        if ids.is_meta:
            if self.device is not None and self.device.type != "meta":
                raise InputError("the input is on the meta device: it has a shape, but no token ids")
        elif ids.numel():
            low, high = (int(end) for end in ids.aminmax())
            if low < 0 or high >= self.d_vocab:
                raise InputError(f"token ids go from {low} to {high}; the model embeds 0 to {self.d_vocab - 1}")
        return ids.long()

    def _rows(self, items: list[Any]) -> tuple[Tensor, Tensor | None]:
        """Lists of numbers, or rows of them, as one tensor."""
        if not items:
            raise InputError(f"the input is an empty list; {EXPECTED}")
        nested = [_items(item) if not isinstance(item, Tensor) else item for item in items]
        if all(row is None for row in nested):
            return _whole(items), None
        if any(row is None for row in nested):
            raise _odd_list(items)
        rows = [row if isinstance(row, Tensor) else _whole(list(row or ())) for row in nested]
        if any(row.dim() != 1 for row in rows):
            if len({tuple(row.shape) for row in rows}) == 1:
                return torch.stack(rows), None
            raise InputError(f"the input is a list of shapes {[tuple(row.shape) for row in rows]}; {EXPECTED}")
        return self._padded(rows)

    def _padded(self, rows: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Rows side by side, and where they are real if they differ in length."""
        width = max(len(row) for row in rows)
        if all(len(row) == width for row in rows):
            return torch.stack(rows), None
        values = rows[0].new_full((len(rows), width), self.pad)
        mask = torch.zeros(len(rows), width, dtype=torch.bool, device=values.device)
        for at, row in enumerate(rows):
            place = slice(width - len(row), None) if self.padding_side == "left" else slice(len(row))
            values[at, place], mask[at, place] = row, True
        return values, mask

    # --- masks ---

    def _padding(self, mask: Tensor | None) -> dict[str, Any]:
        """What is known of rows that were padded here. Padding on the right is read by no real token."""
        told = mask is not None and self.padding_side == "left"
        return {"seen": mask, "attention_mask": mask.long() if told and mask is not None else None}

    def _one_mask(self, values: Tensor, asked: Any, brought: Any, inferred: Tensor | None) -> dict[str, Any]:
        """The mask that was asked for, or else the one that came with the input, where they do not contradict."""
        if asked is None:
            return self._masks(values, brought)
        given, pos = self._masks(values, asked), values.shape[1]
        said = given["seen"][:, -pos:].to(values.device)
        if brought is not None and not torch.equal(
            said, self._masks(values, brought)["seen"][:, -pos:].to(said.device)
        ):
            raise InputError(
                "attention_mask and the mask that the input brings differ in what is padding; pass one of them: the "
                "ids alone with attention_mask=, or the input as it is"
            )
        if inferred is not None and bool((said & ~inferred.to(said.device)).any()):
            raise InputError(
                f"attention_mask is not 0 where shorter rows are padded, on the {self.padding_side}; leave it out: "
                "where rows end is known"
            )
        return given

    def _masks(self, values: Tensor, attention_mask: Any) -> dict[str, Any]:
        attention_mask = _unpacked(attention_mask)
        if isinstance(attention_mask, list | tuple) and attention_mask:
            attention_mask, _ = replace(self, pad=0)._rows(list(attention_mask))
        if not isinstance(attention_mask, Tensor):
            raise InputError(
                f"attention_mask is of type {type(attention_mask).__name__}; expected a tensor [batch, pos]"
            )
        shape = tuple(attention_mask.shape)
        if attention_mask.dim() == 1 and len(values) == 1:
            attention_mask = attention_mask[None]
        batch, pos = values.shape[:2]
        fits = attention_mask.dim() in (2, 4) and attention_mask.shape[0] in (batch, 1 if len(shape) == 4 else batch)
        if not fits or attention_mask.shape[-1] < pos:
            raise InputError(
                f"attention_mask has shape {shape} for an input of {batch} × {pos} tokens; expected [{batch}, {pos}] "
                "(with the key-value cache's tokens in front, if there are any) or [batch, heads, query, key]"
            )
        if attention_mask.dim() == 4:
            if not attention_mask.is_meta and _is_of_ones(attention_mask):
                raise InputError(
                    f"attention_mask [batch, heads, query, key] holds 1 and 0 in {attention_mask.dtype}, which would "
                    "be added to the scores; expected booleans, or 0 where attention may reach and a large negative "
                    "number elsewhere"
                )
            whole, rows = attention_mask.expand(batch, -1, -1, -1), values[..., 0] if values.dim() == 3 else values
            try:
                return {"attention_mask": attention_mask, "seen": self.keep(whole, rows)}
            except ValueError as error:
                raise InputError(str(error)) from error
        seen = as_mask("attention_mask [batch, pos]", attention_mask)
        return {"attention_mask": attention_mask, "seen": seen}

    def _moved(self, given: ModelInput) -> ModelInput:
        if self.device is None:
            return given

        def moved(value: Any) -> Any:
            return value.to(self.device) if isinstance(value, Tensor) else value

        parts = {name: moved(getattr(given, name)) for name in ("values", "attention_mask", "seen")}
        return replace(given, **parts, words={name: moved(value) for name, value in given.words.items()})


def _is_of_ones(mask: Tensor) -> bool:
    """Whether numbers stand in a mask where booleans are meant."""
    if mask.dtype == torch.bool:
        return False
    return not mask.is_floating_point() or bool((mask == 1).any() & ((mask == 0) | (mask == 1)).all())


def _of_tokenizer(given: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Ids (or embeddings), mask and further words of a dictionary as tokenizers and processors make it."""
    values = given.get("input_ids")
    if values is not None and given.get("inputs_embeds") is not None:
        raise InputError("the input holds input_ids and inputs_embeds, which both say what is read; pass one of them")
    values = given.get("inputs_embeds") if values is None else values
    if values is None:
        raise InputError(f"the input is {a_kind(given)} of {sorted(map(str, given))}; expected input_ids in it")
    read = {"input_ids", "inputs_embeds", "attention_mask", *_OF_TOKENIZERS}
    return values, given.get("attention_mask"), {str(key): value for key, value in given.items() if key not in read}


def further(brought: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the input brings for the model beside ids and mask, without what is asked for by name.

    Args:
        brought: `ModelInput.words`.
        asked: Keywords of the call.

    Raises:
        InputError: Both say something, and not the same.
    """
    for name in brought.keys() & asked.keys():
        one, other = brought[name], asked[name]
        alike = isinstance(one, Tensor) and isinstance(other, Tensor)
        if not (one is other or (torch.equal(one, other.to(one.device)) if alike else one == other)):
            raise InputError(f"{name} is passed by name, and the input brings another; pass one of them")
    return {name: value for name, value in brought.items() if name not in asked}


def _unpacked(value: Any) -> Any:
    """Arrays and series of other libraries as tensors and lists; all else as it is."""
    if isinstance(value, Tensor) or not hasattr(value, "tolist"):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.tensor(value.astype(np.int64) if value.dtype.kind == "u" else value)
    return value.tolist()


def _items(value: Any) -> list[Any] | None:
    """The members of a text, a sequence (a column of `datasets`, too), an array or a series; None of anything else."""
    value = _unpacked(value)
    if isinstance(value, str):
        return [value]
    return list(value) if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray) else None


def _whole(numbers: list[Any]) -> Tensor:
    """A tensor of numbers as they are; bool among numbers is none of them."""
    if not all(isinstance(number, int | float | np.number) and not isinstance(number, bool) for number in numbers):
        raise _odd_list(numbers)
    try:
        return torch.tensor(numbers) if numbers else torch.zeros(0, dtype=torch.long)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise InputError(f"the input holds numbers that are no token ids: {error}") from error


def _odd_list(items: list[Any]) -> InputError:
    kinds = sorted({type(item).__name__ for item in items})
    chat = " (a chat goes through tokenizer.apply_chat_template first)" if "dict" in kinds else ""
    return InputError(f"the input is a list of {', '.join(kinds)}{chat}; {EXPECTED}")
