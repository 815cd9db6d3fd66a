"""`Selection`: which experts, ranks, layers and positions. Ablation, patching, attribution and caches share it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from numpy.typing import NDArray
from torch import Tensor

from moe_lens.checked import Natural, checked
from moe_lens.errors import InputError
from moe_lens.ids import Ids, ids, one_id
from moe_lens.protocols import Hooked

Experts = Mapping[int, Iterable[int] | Tensor | NDArray[Any]] | Iterable[tuple[int, int]]
"""`{layer: [expert, …]}` or `[(layer, expert), …]`; a mask over all experts may replace a list of ids."""
Where = int | Iterable[int] | slice | Tensor | NDArray[Any] | Callable[[Tensor], Tensor]
"""Positions (negative ones from the end), a mask [batch, pos], or a function: token ids [batch, pos] → booleans."""


@checked
@dataclass(frozen=True, eq=False)
class Step:
    """The tokens of one forward pass: which they are, and where in their texts."""

    batch: Natural
    pos: Natural
    tokens: Int[Tensor, "batch pos"] | None = None
    """Their ids; None when the model was given embeddings or a residual stream."""
    seen: Bool[Tensor, "batch total"] | None = None
    """True at real tokens, false at padding, those of earlier steps in front; None when there is no padding."""
    offset: Natural = 0
    """How many columns of earlier steps the model's key-value cache holds."""
    columns: Int[Tensor, "batch prompt"] | None = None
    """In generation: the column that each of the prompt's had in what was passed, before padding was moved."""

    @property
    def real(self) -> Bool[Tensor, "batch pos"] | None:
        """True at this step's real tokens; None when all are."""
        return None if self.seen is None else self.seen[:, -self.pos :]

    def places(self) -> Int[Tensor, "#batch pos"]:
        """Absolute positions: from 0 at the text's first real token, earlier steps counted. Meaningless at padding."""
        if self.seen is None:
            return torch.arange(self.offset, self.offset + self.pos)[None]
        return (self.seen.long().cumsum(-1) - 1)[:, -self.pos :]

    def places_from_end(self) -> Int[Tensor, "#batch pos"]:
        """Positions counted back from −1, this step's last real token. Meaningless at padding."""
        if self.real is None:
            return torch.arange(-self.pos, 0)[None]
        return -self.real.long().flip(-1).cumsum(-1).flip(-1)


@checked
@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """Chosen experts (or ranks, or the shared experts) of chosen layers at chosen positions.

    `Selection()` is every routed expert everywhere. It needs no model; `check` compares it with one.

    Raises:
        InputError: both experts and ranks, both experts and layers, or values that are not whole numbers from 0.
    """

    experts: Experts | None = None
    """Routed experts by layer, stored as a dict of sorted tuples. None: all."""
    ranks: Iterable[int] | None = None
    """Ranks by routing weight, 0 the largest; a sorted tuple. None: all."""
    layers: Iterable[int] | None = None
    """Layers of the model; a sorted tuple. None: those of `experts`, or all layers with experts."""
    shared: bool = False
    """Whether the shared experts are included; only these, if neither experts nor ranks are given."""
    where: Where | None = None
    """Which tokens. None: all.

    Positions are absolute: they count the real tokens of a text from 0, without padding and including tokens in the
    key-value cache; −1 is the last real token of each forward pass, and so every new token in generation. A mask has
    the columns of the input, and never selects tokens that are generated later. A function gets the token ids of each
    forward pass. Padding is never selected.
    """

    def __post_init__(self) -> None:
        if self.experts is not None and self.ranks is not None:
            raise InputError(f"got experts {self.experts!r} and ranks {self.ranks!r}; expected one of them")
        if self.experts is not None and self.layers is not None:
            raise InputError(f"got experts {self.experts!r} and layers {self.layers!r}; experts name their layers")
        for name in ("ranks", "layers"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, ids(name, value))
        if self.experts is not None:
            object.__setattr__(self, "experts", _by_layer(self.experts))
        object.__setattr__(self, "where", _where(self.where))

    def __str__(self) -> str:
        """In words, as an intervention's repr shows it."""
        what = []
        if self.by_layer is not None:
            what.append(f"experts { {at: list(of_layer) for at, of_layer in self.by_layer.items()} }")
        elif self.routed:
            what.append("all ranks" if self.ranks is None else f"ranks {list(self.ranks)}")
        text = " + ".join(what + ["shared"] * self.shared)
        text += "" if self.layers is None else f" of layers {list(self.layers)}"
        return text if self.where is None else f"{text} {where_text(self.where)}"

    @property
    def by_layer(self) -> dict[int, Ids] | None:
        """`experts` in the form in which it is stored."""
        return cast(Any, self.experts)

    @property
    def routed(self) -> bool:
        """Whether routed experts are selected."""
        return self.experts is not None or self.ranks is not None or not self.shared

    def check(self, model: Hooked, *, dense: bool = False) -> "Selection":
        """Return the selection, after a check that the model has everything that it names.

        Args:
            model: A `HookedMoE`.
            dense: Whether dense layers are allowed, as for the residual stream.

        Raises:
            InputError: no such layer, expert or rank, a layer without experts, or no shared experts; the message names
                the value and the valid range.
        """
        n_layers = model.cfg.n_layers
        for layer in self.layers_of(model):
            if not 0 <= layer < n_layers:
                raise InputError(f"there is no layer {layer}; the model has layers 0 to {n_layers - 1}")
            if not dense and layer not in model.moe_layers:
                raise InputError(
                    f"layer {layer} is dense; the layers with experts are {', '.join(map(str, model.moe_layers))}"
                )
        last = model.n_experts - 1
        for layer, experts in (self.by_layer or {}).items():
            if experts.mask is None and experts[-1] > last:
                raise InputError(f"there is no expert {experts[-1]} in layer {layer}; it has experts 0 to {last}")
            experts.check(f"experts of layer {layer}", model.n_experts)
        for name, count in (("ranks", model.top_k), ("layers", n_layers)):
            chosen = getattr(self, name)
            if chosen is not None and chosen.mask is not None:
                chosen.check(name, count)
        for rank in self.ranks or ():
            if rank >= model.top_k:
                raise InputError(f"there is no rank {rank}; the model has ranks 0 to {model.top_k - 1}")
        if self.shared and not model.n_shared_experts:
            raise InputError("shared=True, and the model has no shared experts")
        return self

    def layers_of(self, model: Hooked) -> tuple[int, ...]:
        """The selected layers, ascending.

        Args:
            model: A `HookedMoE`; all of its MoE layers are selected where none is named.
        """
        if self.by_layer is not None:
            return tuple(self.by_layer)
        return model.moe_layers if self.layers is None else tuple(self.layers)

    def positions(self, step: Step) -> Bool[Tensor, "batch pos"]:
        """Which tokens of a forward pass are selected; never padding.

        Args:
            step: Tokens, mask and number of earlier tokens of the forward pass.

        Raises:
            InputError: a mask of another shape, a predicate without tokens or with an answer of another shape.
        """
        chosen = self._chosen(step)
        real = step.real
        return chosen if real is None else chosen & real.to(chosen.device)

    def _chosen(self, step: Step) -> Bool[Tensor, "batch pos"]:
        shape, where = (step.batch, step.pos), self.where
        if where is None:
            return torch.ones(shape, dtype=torch.bool)
        if isinstance(where, Tensor):
            of_prompt = step.columns is not None and where.shape == step.columns.shape
            if step.offset == 0 and not of_prompt and tuple(where.shape) != shape:
                raise InputError(f"where is a mask of shape {tuple(where.shape)}; expected {shape} [batch, pos]")
            if len(where) != step.batch:
                raise InputError(f"where is a mask for a batch of {len(where)}; this one has {step.batch}")
            if step.columns is not None and of_prompt:
                where = where.gather(1, step.columns.to(where.device))
            chosen = torch.zeros(shape, dtype=torch.bool, device=where.device)
            now = where[:, step.offset : step.offset + step.pos]
            chosen[:, : now.shape[1]] = now
            return chosen
        if callable(where):
            if step.tokens is None:
                raise InputError("where is a predicate on tokens, and this forward pass was not given tokens")
            answer = where(step.tokens)
            if not isinstance(answer, Tensor) or answer.dtype != torch.bool or tuple(answer.shape) != shape:
                came = f"{answer.dtype} {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
                raise InputError(f"where returned {came}; expected a tensor of booleans of shape {shape} [batch, pos]")
            return answer
        places, from_end = step.places().expand(shape), step.places_from_end().expand(shape)
        if isinstance(where, slice):
            start, stop = where.start or 0, where.stop
            first = places.new_tensor(start) if start >= 0 else (places - from_end + start).clamp(min=0)
            inside = (places >= first) & ((places - first) % (where.step or 1) == 0)
            of_stop = from_end if stop is not None and stop < 0 else places
            return inside if stop is None else inside & (of_stop < stop)
        assert isinstance(where, tuple)
        wanted = torch.tensor(where, dtype=torch.long, device=places.device)
        return torch.isin(places, wanted[wanted >= 0]) | torch.isin(from_end, wanted[wanted < 0])

    def slots(
        self,
        layer: Natural,
        indices: Int[Tensor, "batch pos top_k"],
        positions: Bool[Tensor, "batch pos"] | None = None,
    ) -> Bool[Tensor, "batch pos top_k"]:
        """Which slots of a layer hold a selected routed expert.

        Args:
            layer: The layer.
            indices: The experts of its slots, in rank order.
            positions: What `positions` gave; None for all tokens.
        """
        chosen = torch.zeros_like(indices, dtype=torch.bool)
        if self.by_layer is not None:
            wanted = self.by_layer.get(layer, ())
            chosen = torch.isin(indices, torch.tensor(wanted, dtype=indices.dtype, device=indices.device))
        elif self.routed and (self.layers is None or layer in tuple(self.layers)):
            ranks = range(indices.shape[-1]) if self.ranks is None else tuple(self.ranks)
            if max(ranks, default=0) >= indices.shape[-1]:
                raise InputError(
                    f"there is no rank {max(ranks)} in layer {layer}: tokens have {indices.shape[-1]} experts"
                )
            chosen[..., list(ranks)] = True
        return chosen if positions is None else chosen & positions.to(chosen.device)[..., None]


@checked
@dataclass(frozen=True, eq=False)
class SelectedRows:
    """Rows of an activation that a selection names, layer by layer."""

    values: Shaped[Tensor, "rows *features"]
    layer: Int[Tensor, " rows"]
    batch: Int[Tensor, " rows"]
    pos: Int[Tensor, " rows"]
    rank: Int[Tensor, " rows"]
    expert: Int[Tensor, " rows"]


def _by_layer(experts: Any) -> dict[int, Ids]:
    if isinstance(experts, Mapping):
        numbers = {one_id("layers", layer): ids(f"experts of layer {layer}", of) for layer, of in experts.items()}
        if numbers:
            return dict(sorted(numbers.items()))
    try:
        pairs = [] if isinstance(experts, Mapping) else [(layer, expert) for layer, expert in experts]
    except (TypeError, ValueError):
        pairs = []
    if not pairs:
        raise InputError(f"experts is {experts!r}; expected {{layer: [expert, …]}} or [(layer, expert), …]")
    layers = ids("layers", [layer for layer, _ in pairs])
    return {at: ids(f"experts of layer {at}", [e for layer, e in pairs if layer == at]) for at in layers}


def _where(where: Any) -> Any:
    """Positions as a tuple, a mask as it is."""
    if where is None or callable(where):
        return where
    if isinstance(where, slice):
        parts = (where.start or 0, where.stop or 0, 1 if where.step is None else where.step)
        if any(isinstance(part, bool) or not isinstance(part, int | np.integer) for part in parts) or parts[2] < 1:
            raise InputError(f"where is {where}; expected whole numbers, and a step of at least 1")
        return where
    if isinstance(where, Tensor | np.ndarray):
        where = torch.as_tensor(where)
        if where.ndim > 1 or where.dtype == torch.bool:
            if where.ndim != 2 or where.dtype != torch.bool:
                came = f"{where.dtype} of shape {tuple(where.shape)}"
                raise InputError(f"where is {came}; expected a mask of booleans [batch, pos], or a list of positions")
            return where
        where = where.flatten().tolist()
    return ids("where", where if isinstance(where, Iterable) else [where], signed=True)


def where_text(where: Any) -> str:
    """What `Selection.where` says, in words."""
    if isinstance(where, Tensor):
        return f"where a mask {list(where.shape)} is true"
    if callable(where):
        return f"where {getattr(where, '__name__', type(where).__name__)}"
    return f"at {list(where) if isinstance(where, tuple) else where}"
