"""Plans: which experts of a model stay, how many a token uses, and what pruned experts are merged into."""

from collections.abc import Mapping, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.checked import AnyModel, Natural, Positive
from moe_lens.errors import InputError
from moe_lens.ids import Ids
from moe_lens.interventions.intervention import Intervention
from moe_lens.pruning.preview import preview
from moe_lens.pruning.scores import Scores
from moe_lens.reprs import Summary
from moe_lens.selection import Experts, Selection
from moe_lens.storage import believed, load_tensors, save_tensors, whole_numbers

Budget = Literal["layer", "global"]


@dataclass(frozen=True, eq=False)
class Plan(Summary):
    """Which experts a smaller model has. A plan changes nothing by itself: `preview` and `export` apply it."""

    model: Mapping[str, Any]
    """The model's identity: its name and sizes."""
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
        if not isinstance(self.model, Mapping):
            raise InputError(f"model is {self.model!r:.60}; expected its name and sizes")
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

    def uniform(self) -> "Plan":
        """The plan of the same size, rounded, that keeps the same number of experts in every layer, by score.

        For formats whose config has one number of experts for all layers.

        Raises:
            InputError: the plan merges: merge after this.
        """
        if self.merged is not None:
            raise InputError("this plan merges experts; make it uniform first, and merge then")
        count = max(self.top_k, round(self.share_kept * self.n_experts))
        best = self.values.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values
        return replace(self, kept=tuple(tuple(row) for row in best.tolist()))

    def check(self, model: Mapping[str, Any]) -> None:
        """Check that the plan was made for this model.

        Raises:
            InputError: the plan was made for another model; names what differs.
        """
        for what, here in model.items():
            if (there := self.model.get(what)) != here:
                raise InputError(f"the plan is for a model with {what} {there!r}; this one has {here!r}")

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file."""
        stay = torch.zeros_like(self.values, dtype=torch.bool)
        for row, experts in zip(stay, self.kept, strict=True):
            row[list(experts)] = True
        header = {"model": dict(self.model), "layers": self.layers, "top_k": self.top_k, "method": self.method}
        header["fewer"] = list(self.fewer.items())  # JSON's keys are strings
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
            merged = None
            if (into := tensors.get("into")) is not None:
                merged = {(layers[i], e): int(into[i, e]) for i, e in (into >= 0).nonzero().tolist()}
            return cls(
                model=header["model"],
                layers=layers,
                kept=tuple(tuple(row.nonzero()[:, 0].tolist()) for row in tensors["kept"]),
                top_k=top_k,
                fewer=fewer,
                values=tensors["values"],
                method=header["method"],
                merged=merged,
                shares=tensors.get("shares"),
            )


def plan(
    scores: Scores,
    keep: float | int | Literal["selected"] | None = None,
    *,
    budget: Budget | None = None,
    domain: str | None = None,
    protect: Selection | Experts = (),
    top_k: Positive | Mapping[int, Positive] | None = None,
) -> Plan:
    """Choose the experts to keep: those with the largest scores.

    Ties go to the lower expert id.

    Args:
        scores: What `score` returned.
        keep: The share of experts to keep, in (0, 1); or their number in each layer; `"selected"`: all with a score
            above 0, whatever their number; None: all (to reduce `top_k` alone).
        budget: Of a share or a number: `"layer"`, the same number in every layer, if not given; or `"global"`, the best
            of all layers together, with scores divided by their layer's sum, and at least `top_k` in each.
        domain: Keep what this domain needs (a specialist); all domains, each counting the same, if not given.
        protect: Experts that stay whatever their score, such as super experts: `[(layer, expert), …]`, one such pair,
            `{layer: [expert, …]}`, or a `Selection` of experts or of layers.
        top_k: Experts active per token in the smaller model, or in some of its layers `{layer: number}`; as before if
            not given. Layers that differ can be previewed; no family's config has words for them.

    Raises:
        InputError: too few experts for every token, more than there are, a domain or expert that does not exist, or a
            budget where `keep` says what stays in each layer.
    """
    if budget is not None and (keep is None or keep == "selected"):
        raise InputError(f"budget={budget!r} has no effect with keep={keep!r}; give a share or a number, or no budget")
    values = scores.of(domain)
    n_layers, n_experts = values.shape
    by_layer = _by_layer(scores, top_k)
    active = max(by_layer.values())
    ranked = values.clone()
    protected = _protected(protect, scores)
    for layer, expert in protected:
        ranked[scores.layers.index(layer), expert] = torch.inf
    stay = torch.zeros_like(values, dtype=torch.bool)
    if keep == "selected":
        stay = ranked > 0
    else:
        count = _count(keep, n_experts)
        if count < active:
            raise InputError(f"keep={keep} leaves {count} experts a layer, and every token needs {active}")
        stay.scatter_(
            -1, ranked.argsort(dim=-1, descending=True, stable=True)[:, : active if budget == "global" else count], True
        )
        if budget == "global":
            relative = ranked / values.clamp(min=0).sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
            rest = relative.masked_fill(stay, -torch.inf).flatten()
            more = count * n_layers - int(stay.sum())
            stay.view(-1)[rest.argsort(dim=-1, descending=True, stable=True)[:more]] = True
    lost = [(layer, e) for layer, e in protected if not stay[scores.layers.index(layer), e]]
    if lost:
        raise InputError(
            f"{len(lost)} protected experts do not fit into keep={keep}, such as {lost[0]} (layer, expert)"
        )
    method = scores.method if domain is None else f"{scores.method} on {domain}"
    return Plan(
        model=scores.model,
        layers=scores.layers,
        kept=tuple(tuple(row.nonzero()[:, 0].tolist()) for row in stay),
        top_k=active,
        values=values,
        method=method,
        fewer={layer: number for layer, number in by_layer.items() if number < active},
    )


def _protected(given: Selection | Experts, scores: Scores) -> list[tuple[int, int]]:
    """(layer, expert) of those that are to stay.

    Raises:
        InputError: there is no such expert, or the selection is of something else.
    """
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(one, int) for one in given):
        given = [cast(tuple[int, int], given)]
    n_experts = scores.values.shape[-1]
    if isinstance(given, Sized) and not len(given):
        return []
    chosen = given if isinstance(given, Selection) else Selection(experts=given)
    told = chosen.by_layer is not None or chosen.layers is not None
    if not told or chosen.ranks is not None or chosen.shared or chosen.where is not None:
        raise InputError(f"protect is the selection {chosen}; expected one of experts or layers, and of nothing else")
    by_layer = chosen.by_layer
    if by_layer is None:
        by_layer = {layer: Ids(range(n_experts)) for layer in chosen.layers or ()}
    found = []
    for layer, experts in by_layer.items():
        if layer not in scores.layers:
            raise InputError(f"protect names layer {layer}; the layers with experts are {list(scores.layers)}")
        experts.check(f"protect: experts of layer {layer}", n_experts)
        found += [(layer, expert) for expert in experts]
    return found


def _by_layer(scores: Scores, top_k: int | Mapping[int, int] | None) -> dict[int, int]:
    """Experts active in each layer."""
    given = (
        top_k if isinstance(top_k, Mapping) else dict.fromkeys(scores.layers, scores.top_k if top_k is None else top_k)
    )
    for layer, number in given.items():
        if layer not in scores.layers:
            raise InputError(f"top_k names layer {layer}; the layers with experts are {list(scores.layers)}")
        if not 1 <= number <= scores.top_k:
            raise InputError(f"top_k is {number}; expected 1 to {scores.top_k}, the model's own")
    return {layer: given.get(layer, scores.top_k) for layer in scores.layers}


def _count(keep: float | int | str | None, n_experts: int) -> int:
    """Experts of a layer that stay."""
    if keep is None:
        return n_experts
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise InputError(f"keep is {keep!r}; expected a share in (0, 1), a whole number, 'selected' or None")
    if isinstance(keep, int):
        if not 1 <= keep <= n_experts:
            raise InputError(f"keep is {keep}; expected 1 to {n_experts} experts a layer")
        return keep
    if not 0 < keep <= 1:
        raise InputError(f"keep is {keep}; expected a share of the experts, above 0 and at most 1")
    return round(Fraction(keep).limit_denominator(10**6) * n_experts)
