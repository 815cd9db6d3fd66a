"""`Routing`: which experts each token selected, and with which weights. It needs no model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from moe_lens.checked import Natural, Positive, checked
from moe_lens.errors import InputError
from moe_lens.ids import as_mask
from moe_lens.reprs import Summary
from moe_lens.storage import believed, load_tensors, save_tensors, whole_numbers


def affinity(logits: Float[Tensor, "*axes n_experts"], score: str) -> Float[Tensor, "*axes n_experts"]:
    """Affinity of all experts, in float32 at least.

    Args:
        logits: router logits.
        score: "softmax" over all experts, "sigmoid" of each, or "sqrtsoftplus", √ log(1 + e^logit) of each.

    Raises:
        InputError: another score function.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if score == "softmax":
        return wide.softmax(-1)
    if score == "sigmoid":
        return wide.sigmoid()
    if score == "sqrtsoftplus":
        return torch.nn.functional.softplus(wide).sqrt()
    raise InputError(f"the score function is {score!r}; expected softmax, sigmoid or sqrtsoftplus")


def output_factors(weights: Float[Tensor, "*axes top_k"], family: Any) -> Float[Tensor, "*axes top_k"]:
    """The factors of experts' outputs in the sum: the routing weights.

    The factors are 1 in a family that multiplies experts' inputs instead.
    """
    return torch.ones_like(weights) if getattr(family, "weighs_input", False) else weights


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class _RoutedSlots(Summary):
    """What routing is, whatever axes stand before the last one."""

    n_experts: Positive
    """Number of routed experts."""
    indices: Int[Tensor, "*axes top_k"]
    """Ids of the active experts by rank, the largest weight first; −1 in slots behind a token's number of experts,
    where tokens have different numbers of them (`use_experts`)."""
    weights: Float[Tensor, "*axes top_k"]
    """What the active experts' outputs (in Llama 4, their inputs) are multiplied by, with any scale of the family; they
    need not sum to one."""
    logits: Float[Tensor, "*axes n_experts"] | None = None
    """Router logits of all experts."""
    probs: Float[Tensor, "*axes n_experts"] | None = None
    """Affinity of all experts: the family's score (softmax, sigmoid, …) of the logits, without selection bias."""
    mask: Bool[Tensor, "*tokens"] | None = None
    """True at real tokens, [batch, pos]; None when there is no padding."""

    _layer_axes: ClassVar[int]

    def __post_init__(self) -> None:
        tokens = tuple(self.indices.shape[:-1])
        wide = (*tokens, self.n_experts)
        for name, value, shape in (
            ("weights", self.weights, tuple(self.indices.shape)),
            ("logits", self.logits, wide),
            ("probs", self.probs, wide),
        ):
            if value is not None and tuple(value.shape) != shape:
                raise InputError(f"{name} has shape {tuple(value.shape)}; expected {shape} to go with the indices")
        if self.mask is not None and tuple(self.mask.shape) != tokens[self._layer_axes :]:
            expected = tokens[self._layer_axes :]
            raise InputError(f"mask has shape {tuple(self.mask.shape)}; expected {expected}, as the indices have")

    def _sizes(self, tokens: Sequence[int]) -> str:
        return f"{' × '.join(map(str, tokens))} tokens, {self.top_k} of {self.n_experts} experts"

    @property
    def top_k(self) -> int:
        """Active experts of a token."""
        return self.indices.shape[-1]

    def dense_weights(self) -> Float[Tensor, "*axes n_experts"]:
        """Weights of all experts, zero for those not selected: the paper's g_{i,t}."""
        dense = self.weights.new_zeros(*self.indices.shape[:-1], self.n_experts)
        return dense.scatter_add(-1, self.indices.clamp(min=0), self.weights.masked_fill(self.indices < 0, 0))

    def margin(self) -> Float[Tensor, "*axes"]:
        """The smallest router logit of the selected experts minus the largest of the others.

        Zero is a tie. It is negative where something else than the logit decided (a selection bias, expert groups,
        forced indices), and infinite where every expert is selected.

        Raises:
            InputError: the router logits are not known.
        """
        if self.logits is None:
            raise InputError("the margin needs router logits, which this routing does not hold")
        empty = self.indices < 0
        chosen = self.logits.gather(-1, self.indices.clamp(min=0)).masked_fill(empty, torch.inf).amin(-1)
        first = self.indices[..., :1].expand_as(self.indices)
        others = self.logits.scatter(-1, torch.where(empty, first, self.indices), -torch.inf)
        return chosen - others.amax(-1)


@checked
@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LayerRouting(_RoutedSlots):
    """Routing of one layer: tensors are [batch, pos, …], or [pos, …] from a cache without a batch axis."""

    layer: Natural
    """The layer in the model."""

    _layer_axes: ClassVar[int] = 0

    def __repr__(self) -> str:
        return f"LayerRouting(layer {self.layer}, {self._sizes(self.indices.shape[:-1])})"


@checked
@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Routing(_RoutedSlots):
    """Routing of several layers: tensors are [layer, batch, pos, …]; `mask` is [batch, pos].

    Made by `HookedMoE.routing`, by `Routing.stack` from single layers, or by `Routing.from_arrays` from what another
    program exported.
    """

    layers: tuple[Natural, ...]
    """The layers of the model along the first axis."""

    _layer_axes: ClassVar[int] = 1

    def __repr__(self) -> str:
        return f"Routing(layers {list(self.layers)}, {self._sizes(self.indices.shape[1:-1])})"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.indices.ndim != 4:
            raise InputError(f"indices have shape {tuple(self.indices.shape)}; expected [layer, batch, pos, top_k]")
        if len(self.layers) != len(self.indices) or len(set(self.layers)) != len(self.layers):
            raise InputError(f"layers are {self.layers}; expected {len(self.indices)} different ones")

    def layer(self, layer: Natural) -> LayerRouting:
        """Routing of one layer of the model: views, no copies.

        Args:
            layer: Its number in the model; dense layers count.

        Raises:
            InputError: this routing does not hold that layer.
        """
        if layer not in self.layers:
            raise InputError(f"there is no routing of layer {layer}; this one holds layers {list(self.layers)}")
        row = self.layers.index(layer)
        return LayerRouting(
            layer=layer,
            n_experts=self.n_experts,
            indices=self.indices[row],
            weights=self.weights[row],
            logits=None if self.logits is None else self.logits[row],
            probs=None if self.probs is None else self.probs[row],
            mask=self.mask,
        )

    @classmethod
    def stack(cls, layers: Iterable[LayerRouting]) -> "Routing":
        """Stack layers of one run (copied); logits and probs are kept if every layer has them.

        Where tokens have more experts in some layers than in others (`use_experts`), layers with fewer get additional
        slots with id −1 and weight 0.

        Args:
            layers: What `cache.routing` gave, one for each layer.

        Raises:
            InputError: no layers, or layers of different tokens or numbers of experts.
        """
        parts = list(layers)
        if not parts:
            raise InputError("there is no layer to stack")
        first = parts[0]
        sizes = {part.layer: (*part.indices.shape[:-1], part.n_experts) for part in parts}
        if len(set(sizes.values())) > 1:
            raise InputError(f"layers differ in shape (tokens, n_experts): {sizes}")
        widest = max(part.top_k for part in parts)

        def joined(name: str, empty: int | None = None) -> Any:
            values = [getattr(part, name) for part in parts]
            if any(value is None for value in values):
                return None
            if empty is not None:
                values = [pad(value, (0, widest - value.shape[-1]), value=empty) for value in values]
            stacked = torch.stack([value.to(first.indices.device) for value in values])
            return stacked if stacked.ndim == 4 else stacked.unsqueeze(1)

        return cls(
            layers=tuple(part.layer for part in parts),
            n_experts=first.n_experts,
            indices=joined("indices", -1),
            weights=joined("weights", 0),
            logits=joined("logits"),
            probs=joined("probs"),
            mask=first.mask if first.mask is None or first.mask.ndim == 2 else first.mask.unsqueeze(0),
        )

    @classmethod
    def from_arrays(
        cls,
        indices: Any,
        weights: Any,
        n_experts: Positive,
        *,
        layers: Sequence[int] | None = None,
        mask: Any = None,
    ) -> "Routing":
        """Routing that another program recorded: it is checked, and slots are sorted by weight (ties: lowest id first).

        Args:
            indices: expert ids, [tokens, layers, top_k] as inference engines export them (one sequence), or
                [layers, batch, pos, top_k]; numpy or torch.
            weights: routing weights, of the same shape.
            n_experts: number of routed experts.
            layers: the model's layers that the layer axis stands for; 0, 1, … if not given.
            mask: true at real tokens, [tokens] or [batch, pos]; padding may hold anything in range.

        Raises:
            InputError: shapes that do not fit, ids out of range, an expert chosen twice by a token, weights that are
                not finite, or a layer that is zero throughout (a dense one, or one that was not recorded).
        """
        chosen, given = _tensor("indices", indices), _tensor("weights", weights)
        if chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool:
            raise InputError(f"indices are {chosen.dtype}; expected whole numbers")
        if given.is_complex() or given.dtype == torch.bool:
            raise InputError(f"weights are {given.dtype}; expected numbers")
        if chosen.shape != given.shape or chosen.ndim not in (3, 4) or 0 in chosen.shape:
            raise InputError(
                f"indices have shape {tuple(chosen.shape)} and weights {tuple(given.shape)}; expected [tokens, layers, "
                "top_k] or [layers, batch, pos, top_k] for both, and no empty axis"
            )
        chosen = chosen.long()
        given = given if given.is_floating_point() else given.float()
        real = None if mask is None else as_mask("mask", _tensor("mask", mask))
        if chosen.ndim == 3:
            chosen, given = chosen.transpose(0, 1).unsqueeze(1), given.transpose(0, 1).unsqueeze(1)
            real = None if real is None else real.reshape(1, -1)
        names = tuple(range(len(chosen))) if layers is None else tuple(layers)
        order = chosen.argsort(dim=-1)
        chosen, given = chosen.gather(-1, order), given.gather(-1, order)
        order = given.argsort(dim=-1, descending=True, stable=True)
        routing = cls(
            layers=names,
            n_experts=n_experts,
            indices=chosen.gather(-1, order),
            weights=given.gather(-1, order),
            mask=real,
        )
        routing._check_values()
        return routing

    def _check_ids(self, empty: bool = False) -> None:
        """Ids must be of experts that there are; −1, with weight 0, may stand in slots that a token does not use."""
        if self.indices.is_floating_point() or self.indices.dtype == torch.bool:
            raise InputError(f"indices are {self.indices.dtype}; expected whole numbers")
        if self.indices.numel():
            unused = (self.indices == -1) & (self.weights == 0) & empty
            ids = self.indices.masked_fill(unused, 0)
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.n_experts:
                raise InputError(f"indices go from {low} to {high}; expected expert ids from 0 to {self.n_experts - 1}")

    def _check_numbers(self) -> None:
        """Numbers must be numbers, wherever there is a token."""
        real = slice(None) if self.mask is None else self.mask
        for name in ("weights", "logits", "probs"):
            value = getattr(self, name)
            if value is not None and value[:, real].isnan().any():
                raise InputError(f"{name} hold NaN")

    def _check_values(self) -> None:
        self._check_ids()
        real = torch.ones_like(self.indices[..., 0], dtype=torch.bool)
        if self.mask is not None:
            real &= self.mask
        for row, layer in enumerate(self.layers):
            indices, weights = self.indices[row][real[row]], self.weights[row][real[row]]
            if not weights.isfinite().all():
                raise InputError(f"weights of layer {layer} are not all finite")
            if not weights.any() or (self.top_k > 1 and not indices.any()):
                raise InputError(
                    f"layer {layer} is zero throughout: it has no experts, or was not recorded. Leave it out, and name "
                    "the others with layers="
                )
            if (indices.sort(dim=-1).values.diff(dim=-1) == 0).any():
                raise InputError(f"in layer {layer} a token chose the same expert twice")

    def to_frame(self) -> pd.DataFrame:
        """Long format: a row per real token, layer and rank that holds an expert.

        Columns are layer, batch, pos, rank, expert, weight; `batch` and `pos` count along the tensors' axes.
        """
        n_layers, n_batch, n_pos, top_k = self.indices.shape
        keep = np.ones((n_batch, n_pos), bool) if self.mask is None else self.mask.cpu().numpy()
        kept = keep[None, :, :, None] & (self.indices.cpu().numpy() >= 0)
        layer, batch, pos, rank = (axis[kept] for axis in np.indices((n_layers, n_batch, n_pos, top_k), sparse=False))
        return pd.DataFrame(
            {
                "layer": np.asarray(self.layers)[layer],
                "batch": batch,
                "pos": pos,
                "rank": rank,
                "expert": self.indices.cpu().numpy()[kept],
                "weight": self.weights.detach().to("cpu", torch.float64).numpy()[kept],
            }
        )

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file.

        Args:
            path: The file; an existing one is replaced.
        """
        fields = {name: getattr(self, name) for name in ("indices", "weights", "logits", "probs", "mask")}
        tensors = {name: value.detach().cpu() for name, value in fields.items() if value is not None}
        save_tensors(path, "Routing", tensors, {"layers": self.layers, "n_experts": self.n_experts})

    @classmethod
    def load(cls, path: str | Path) -> "Routing":
        """Read what `save` wrote, onto the CPU.

        Args:
            path: The file.

        Raises:
            InputError: the file is missing, broken or holds something else.
        """
        tensors, header = load_tensors(path, "Routing")
        if not {"indices", "weights"} <= tensors.keys():
            raise InputError(f"{path} holds {sorted(tensors)}; expected at least indices and weights")
        with believed(path, "Routing"):
            layers = whole_numbers("layers", header["layers"], least=0)
            (n_experts,) = whole_numbers("n_experts", [header["n_experts"]], least=1)
            routing = cls(layers=layers, n_experts=n_experts, **tensors)
            routing._check_ids(empty=True)
            routing._check_numbers()
        return routing


def _tensor(name: str, values: Any) -> Tensor:
    """Numbers of another program as a tensor.

    Raises:
        InputError: they are no numbers, or rows of different lengths.
    """
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} cannot be read as an array of numbers: {error}") from error
