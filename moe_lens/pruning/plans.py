"""Plans: which experts of a model stay, how many a token uses, and what pruned experts are merged into."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.checked import AnyModel, Natural, Positive
from moe_lens.errors import InputError
from moe_lens.interventions.intervention import Intervention
from moe_lens.model.cache.identity import difference
from moe_lens.pruning.preview import preview
from moe_lens.pruning.scores import check_sizes
from moe_lens.reprs import Summary
from moe_lens.storage import believed, load_tensors, save_tensors, whole_numbers


@dataclass(frozen=True, eq=False)
class Plan(Summary):
    """Which experts a smaller model has. A plan changes nothing by itself: `preview` and `export` apply it."""

    model: Mapping[str, Any]
    """The model's identity: its name, its sizes, and what its routers are like."""
    layers: tuple[Natural, ...]
    """The layers that have experts."""
    kept: tuple[tuple[Natural, ...], ...]
    """The kept experts of each layer, ascending; an expert's index in this tuple is its id in the smaller model."""
    top_k: Positive
    """Active experts of a token; the largest number where layers differ."""
    values: Float[Tensor, "layer n_experts"]
    """The scores that the plan was made from; `uniform` ranks by them."""
    method: str
    """The method of the scores."""
    merged: Mapping[tuple[int, int], Natural] | None = None
    """(layer, pruned expert) → the kept expert that it is averaged into; None: pruned experts are dropped."""
    shares: Float[Tensor, "layer n_experts"] | None = None
    """Weights of the average in a plan that merges: how often each expert was selected."""
    fewer: Mapping[int, Positive] = field(default_factory=dict)
    """Layers in which fewer than `top_k` experts are active, and how many."""
    protected: tuple[tuple[Natural, Natural], ...] = ()
    """(layer, expert) of kept experts that `uniform` keeps, too, whatever their scores."""

    def __post_init__(self) -> None:
        if len(set(self.layers)) < len(self.layers):
            raise InputError(f"layers are {self.layers}; expected each once")
        if self.values.ndim != 2 or len(self.values) != len(self.layers) or len(self.kept) != len(self.layers):
            raise InputError(
                f"a plan for the layers {self.layers} keeps experts in {len(self.kept)}, with scores of shape "
                f"{tuple(self.values.shape)}; expected a row for each layer"
            )
        if self.values.isnan().any() or (self.shares is not None and self.shares.isnan().any()):
            raise InputError("values or shares hold NaN, and experts cannot be ranked by it")
        check_sizes(self.model, self.layers, self.n_experts)
        if not 1 <= self.top_k <= self.n_experts:
            raise InputError(f"top_k is {self.top_k}; expected 1 to {self.n_experts}, the number of experts")
        for layer, number in self.fewer.items():
            self._row(layer)
            if not 1 <= number < self.top_k:
                raise InputError(f"fewer is {number} in layer {layer}; expected 1 to {self.top_k - 1}, below top_k")
        for layer, experts in zip(self.layers, self.kept, strict=True):
            if any(not 0 <= expert < self.n_experts for expert in experts) or list(experts) != sorted(set(experts)):
                told = f"expected ids from 0 to {self.n_experts - 1}, ascending, each once"
                raise InputError(f"layer {layer} would keep {experts}; {told}")
        if bool(self.merged) and self.shares is None:
            raise InputError("merged is given without shares, by which experts are averaged")
        for (layer, expert), into in (self.merged or {}).items():
            if expert in self.of(layer) or into not in self.of(layer):
                raise InputError(f"layer {layer} would merge expert {expert} into {into}; expected one that stays")
        if lost := [pair for pair in self.protected if pair[1] not in self.of(pair[0])]:
            raise InputError(f"{len(lost)} protected experts would not be kept, such as {lost[0]} (layer, expert)")
        for layer, experts in zip(self.layers, self.kept, strict=True):
            if len(experts) < (needed := self.active(layer)):
                raise InputError(
                    f"layer {layer} would keep {len(experts)} experts, and every token needs {needed}; "
                    f"keep at least {needed}, or reduce top_k"
                )

    def __repr__(self) -> str:
        counts = sorted({len(experts) for experts in self.kept})
        size = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        treatment = "merged" if self.merged else "dropped"
        kept = f"keeps {size} of {self.n_experts} experts a layer by {self.method}"
        active = f"top {self.top_k}" if not self.fewer else f"top {min(self.fewer.values())} to {self.top_k}"
        return f"Plan({kept}, others {treatment}, {active})"

    @property
    def n_experts(self) -> int:
        """Experts of a layer before pruning."""
        return self.values.shape[-1]

    @property
    def share_kept(self) -> float:
        """Kept experts over all experts, in (0, 1]."""
        return sum(map(len, self.kept)) / (len(self.layers) * self.n_experts)

    @property
    def even(self) -> bool:
        """Whether every layer keeps the same number."""
        return len({len(experts) for experts in self.kept}) == 1

    def active(self, layer: Natural) -> int:
        """Experts of a layer that a token uses.

        Raises:
            InputError: the layer has no experts.
        """
        self._row(layer)
        return self.fewer.get(layer, self.top_k)

    def of(self, layer: Natural) -> tuple[int, ...]:
        """The kept experts of a layer.

        Raises:
            InputError: the layer has no experts.
        """
        return self.kept[self._row(layer)]

    def _row(self, layer: int) -> int:
        if layer not in self.layers:
            raise InputError(f"layer {layer} has no experts; the plan is for layers {list(self.layers)}")
        return self.layers.index(layer)

    def pruned(self, layer: Natural) -> tuple[int, ...]:
        """The experts of a layer that are removed."""
        stay = set(self.of(layer))
        return tuple(expert for expert in range(self.n_experts) if expert not in stay)

    def preview(self, model: AnyModel) -> AbstractContextManager[Intervention]:
        """Apply the plan to a `HookedMoE` inside `with`; see `moe_lens.pruning.preview`."""
        return preview(self, model)

    def uniform(self, groups: Positive = 1) -> "Plan":
        """The plan of the same size, rounded, that keeps the same number of experts in every layer, by score.

        Protected experts stay. For formats whose config has one number of experts for all layers.

        Args:
            groups: Of consecutive experts, each of which keeps the same number, too: those that a router chooses
                from, of which a config has one size.

        Raises:
            InputError: the plan merges: merge after this; so many groups do not divide the experts; or protected ones
                would not be kept.
        """
        if self.merged is not None:
            raise InputError("this plan merges experts; make it uniform first, and merge then")
        if self.n_experts % groups:
            raise InputError(f"groups is {groups}; expected a number that divides the {self.n_experts} experts")
        count = round(max(self.top_k, self.share_kept * self.n_experts) / groups)
        values = self.values.clone()
        for layer, expert in self.protected:
            values[self._row(layer), expert] = torch.inf
        ranked = values.unflatten(-1, (groups, -1)).argsort(dim=-1, descending=True, stable=True)
        first = torch.arange(groups)[:, None] * (self.n_experts // groups)
        best = (ranked[..., : max(1, count)] + first).flatten(1).sort(-1).values
        return replace(self, kept=tuple(tuple(row) for row in best.tolist()))

    def check(self, model: Mapping[str, Any]) -> None:
        """Check that the plan was made for this model.

        Raises:
            InputError: the plan was made for another model; names what differs.
        """
        if (said := difference(self.model, model)) is not None:
            raise InputError(f"the plan is for {said}")

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file."""
        stay = torch.zeros_like(self.values, dtype=torch.bool)
        for row, experts in zip(stay, self.kept, strict=True):
            row[list(experts)] = True
        header = {"model": dict(self.model), "layers": self.layers, "top_k": self.top_k, "method": self.method}
        header["fewer"] = list(self.fewer.items())  # JSON's keys are strings
        header["protected"] = self.protected
        tensors = {"kept": stay, "values": self.values}
        if self.merged is not None and self.shares is not None:
            into = torch.full(self.values.shape, -1)
            for (layer, expert), kept in self.merged.items():
                into[self.layers.index(layer), expert] = kept
            tensors |= {"into": into, "shares": self.shares}
        save_tensors(path, "Plan", tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, broken or holds something else.
        """
        tensors, header = load_tensors(path, "Plan")
        with believed(path, "Plan"):
            layers = whole_numbers("layers", header["layers"], least=0)
            (top_k,) = whole_numbers("top_k", [header["top_k"]], least=1)
            pairs = [whole_numbers("fewer", pair, least=0) for pair in header["fewer"]]
            fewer = {layer: number for layer, number in pairs}
            protected = [whole_numbers("protected", pair, least=0) for pair in header.get("protected", [])]
            same = {name: tuple(tensors[name].shape) for name in tensors.keys() & {"kept", "values", "into", "shares"}}
            if len(set(same.values())) > 1:
                raise InputError(f"tensors have shapes {same}; expected one shape")
            merged = None
            if (into := tensors.get("into")) is not None:
                merged = {(layers[i], e): int(into[i, e]) for i, e in (into >= 0).nonzero().tolist()}
            return cls(
                model=header["model"],
                layers=layers,
                kept=tuple(tuple(row.nonzero()[:, 0].tolist()) for row in tensors["kept"]),
                top_k=top_k,
                fewer=fewer,
                protected=tuple((layer, expert) for layer, expert in protected),
                values=tensors["values"],
                method=header["method"],
                merged=merged,
                shares=tensors.get("shares"),
            )
