"""The study `probe`: do a few experts, or a few of their neurons, tell what a token is (arXiv 2604.02178)?"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens import names
from moe_lens.checked import Natural, Seed
from moe_lens.data import TokenBatch
from moe_lens.errors import InputError, UnfitError
from moe_lens.stats import Result
from moe_lens.stats.parallel_sources import LANGUAGE, balanced_halves, parallel_blocks
from moe_lens.stats.sparse_probes import (
    KINDS,
    ProbeResult,
    ProbeScores,
    Sums,
    at_components,
    component_sums,
    discriminant,
    pick_components,
)
from moe_lens.studies.forward_passes import each_layer, forward, token_places
from moe_lens.studies.study import TEXTS, Earlier, Gathered, Study
from moe_lens.studies.token_labels import LabelTable
from moe_lens.studies.token_tables import needs_domain

K = (1, 2, 4, 8, 16)
"""How many components probes see, as far as there are so many, if nothing else is asked for."""
LEAST = 20
"""Tokens with a label, and without it, that each half must have."""


@dataclass(frozen=True, eq=False)
class _Prepared:
    halves: Mapping[str, Natural]
    domain: str
    picked: Int[Tensor, "half layer kind label most"] | None = None
    """Labels as they are, then shuffled."""
    weights: Tensor | None = None
    """[half, layer, kind, label, k, most]"""
    thresholds: Tensor | None = None


@dataclass(frozen=True)
class Probe(Study):
    """k-sparse probes of experts and of expert neurons for labels of tokens."""

    labels: pd.DataFrame
    """A row per token, as `label_tokens` gives it: document, position, domain, and a column of truth values each."""
    k: tuple[Natural, ...] | None = None
    """How many components a probe sees; those of `K` for which a layer has experts, if not given."""
    parallel: str = LANGUAGE
    """What may differ in the names of sources that are one document in several domains: they are in one half."""
    seed: Seed = 0
    """Of halves and of shuffled labels."""

    name: ClassVar[str] = "probe"
    passes: ClassVar[tuple[str, ...]] = ("texts", "pick", "fit", "score")

    @cached_property
    def table(self) -> LabelTable:
        """The labels by place."""
        return LabelTable(self.labels)

    def settings(self) -> dict[str, Any]:
        """What was asked for; labels by their digest."""
        whole = json.dumps(self.labels.to_dict("list"), default=str)
        digest = hashlib.sha256(whole.encode()).hexdigest()[:16]
        return {"labels": digest, "k": self.k, "parallel": self.parallel, "seed": self.seed}

    def check(self, model: Any) -> None:
        """Refuse numbers of components that make no sense, and tables that are none of labels."""
        if self.k is not None and not (self.k and 1 <= min(self.k) <= max(self.k) <= model.n_experts):
            raise InputError(
                f"k is {list(self.k)}; expected numbers from 1 to the {model.n_experts} experts of a layer"
            )
        parallel_blocks({}, self.parallel)
        assert self.table.names

    def numbers(self, model: Any) -> list[int]:
        """How many components its probes see, ascending."""
        return sorted(set(self.k)) if self.k is not None else [k for k in K if k <= model.n_experts]

    def begin(self, model: Any, name: str) -> Gathered:
        """Empty sums."""
        if name == "texts":
            return {}
        if name == "score":
            widths = (1, int(model.W_out[model.moe_layers[0]].shape[1]))
            return {"probes": ProbeScores(model.moe_layers, self.table.names, self.numbers(model), widths)}
        units = [f"{layer} {kind}" for layer in model.moe_layers for kind in KINDS]
        kinds = ("moments", "labelled") if name == "pick" else ("squares", "sums")
        return {"sums": Sums(["n", *(f"{unit} {kind}" for unit in units for kind in kinds)])}

    def prepare(self, model: Any, name: str, domain: str, earlier: Earlier) -> _Prepared | None:
        """Halves of the sources; then what is picked on either; then the probes."""
        if name == "texts":
            needs_domain(self.labels, "the labels", earlier)
            return None
        sources = {of: passes["texts"][TEXTS].result().sources for of, passes in earlier.items()}
        halves = balanced_halves(parallel_blocks(sources, self.parallel), self.seed)
        prepared = _Prepared(halves[domain], domain)
        if name == "pick":
            return prepared
        sums, numbers = partial(_pooled, earlier, "pick"), self.numbers(model)
        n = sums("n").double()  # [half, label, without or with]
        self._enough(n)
        picked = torch.stack([torch.stack([torch.stack([
            pick_components(sums(f"{layer} {kind} moments")[half], sums(f"{layer} {kind} labelled")[half],
                            float(n[half, 0].sum()), n[half, :, 1], numbers[-1])
            for kind in KINDS]) for layer in model.moe_layers]) for half in (0, 1)])  # fmt: skip
        if name == "fit":
            return replace(prepared, picked=picked)
        weights, thresholds = [], []
        fitted = partial(_pooled, earlier, "fit")
        for k in numbers:
            parts = [
                [discriminant(fitted(f"{at} {kind} squares")[..., :k, :k], fitted(f"{at} {kind} sums")[..., :k], n)
                 for kind in KINDS] for at in model.moe_layers
            ]  # fmt: skip
            pad = (0, numbers[-1] - k)
            weights.append(torch.stack([torch.stack([torch.nn.functional.pad(w, pad) for w, _ in of]) for of in parts]))
            thresholds.append(torch.stack([torch.stack([t for _, t in of]) for of in parts]))
        order = (2, 0, 1, 3, 4, 5)  # [layer, kind, half, label, k, …] to half first
        return replace(
            prepared,
            picked=picked,
            weights=torch.stack(weights, 4).permute(*order),
            thresholds=torch.stack(thresholds, 4).permute(*order[:5]),
        )

    def _enough(self, n: Tensor) -> None:
        for label, of in zip(self.table.names, n.unbind(1), strict=False):
            if float(of.min()) < LEAST:
                raise UnfitError(
                    f"the label {label!r} is on {int(of[:, 1].sum())} of {int(of.sum())} tokens that were read; each "
                    f"half of the sources must have {LEAST} with it and {LEAST} without it"
                )

    def step(self, model: Any, name: str, batch: TokenBatch, into: Gathered, prepared: Any) -> None:
        """Sum up components, or what the picked ones are, or count what probes say."""
        if name == "texts":
            return
        counted, half = batch.counted, torch.tensor([prepared.halves[source] for source in batch.sources])
        labels = self._labels(batch, prepared.domain)[counted]
        of_half = half[:, None].expand(counted.shape)[counted]
        wanted = [names.EXPERT_INDICES, names.ROUTING_WEIGHTS, names.EXPERT_POST]
        said: list[Tensor] = []

        def look(layer: int, of: dict[str, Tensor]) -> None:
            indices, weights, inner = (batch.unpack(of[each]).cpu()[counted] for each in wanted)
            for kind, values in zip(KINDS, (weights[..., None].float(), inner.float()), strict=True):
                if name == "score":
                    said.append(self._said(model, layer, kind, values, indices, of_half, prepared))
                else:
                    self._sum(model, name, layer, kind, (values, indices), labels, of_half, into, prepared)

        forward(model, batch, each_layer(model, wanted, look), blocks_only=True)
        if name != "score":
            n = torch.stack([labels[of_half == side].sum(0) for side in (0, 1)])
            every = torch.stack([(of_half == side).sum() for side in (0, 1)])
            into["sums"].update("n", torch.stack([every[:, None] - n, n], -1))
            return
        row = torch.arange(len(half))[:, None].expand(counted.shape)[counted]
        classes = torch.stack([~labels, labels], -1).long()  # [token, label, without or with]
        tokens = classes.new_zeros(len(half), *classes.shape[1:]).index_add_(0, row, classes)
        both = torch.stack(said, 1).long()  # [token, unit, label, k]
        both = both[..., None] * classes[:, None, :, None, :]
        counts = both.new_zeros(len(half), *both.shape[1:]).index_add_(0, row, both)
        n_labels = len(self.table.names)
        counts = counts.unflatten(1, (-1, len(KINDS))).unflatten(3, (2, n_labels)).transpose(3, 4)
        into["probes"].update(
            tokens.unflatten(1, (2, n_labels)).transpose(1, 2),
            counts,
            prepared.picked[..., :n_labels, :],
            batch.sources,
        )

    def _sum(
        self, model: Any, name: str, layer: int, kind: str, of: tuple[Tensor, Tensor], labels: Tensor, half: Tensor,
        into: Gathered, prepared: _Prepared,
    ) -> None:  # fmt: skip
        values, indices = of
        parts = []
        for side in (0, 1):
            at = half == side
            if name == "pick":
                parts.append(component_sums(values[at], indices[at], labels[at], model.n_experts))
                continue
            assert prepared.picked is not None
            own = prepared.picked[side, model.moe_layers.index(layer), KINDS.index(kind)]
            x, y = at_components(values[at], indices[at], own).double(), labels[at].double()
            sums = torch.stack([torch.einsum("nlk,nl->lk", x, weight) for weight in (1 - y, y)], 1)
            parts.append((torch.einsum("nlk,nlj->lkj", x, x), sums))
        for key, value in zip(
            ("moments", "labelled") if name == "pick" else ("squares", "sums"), zip(*parts, strict=True), strict=True
        ):
            into["sums"].update(f"{layer} {kind} {key}", torch.stack(value))

    def _said(
        self, model: Any, layer: int, kind: str, values: Tensor, indices: Tensor, half: Tensor, prepared: _Prepared
    ) -> Bool[Tensor, "token label k"]:
        """What the probes of the other half of the sources say."""
        at = (model.moe_layers.index(layer), KINDS.index(kind))
        picked, weights, thresholds = prepared.picked, prepared.weights, prepared.thresholds
        assert picked is not None and weights is not None and thresholds is not None
        found = torch.zeros(len(values), *weights.shape[3:5], dtype=torch.bool)
        for side in (0, 1):
            here, other = half == side, (1 - side, *at)
            x = at_components(values[here], indices[here], picked[other]).double()
            found[here] = torch.einsum("nlm,lkm->nlk", x, weights[other]) > thresholds[other]
        return found

    def _labels(self, batch: TokenBatch, domain: str) -> Bool[Tensor, "batch pos label"]:
        """Labels as they are, then shuffled among the counted tokens of each row."""
        places, n = token_places(batch), len(self.table.names)
        found = torch.zeros(*batch.tokens.shape, 2 * n, dtype=torch.bool)
        for row, window in enumerate(batch.windows):
            at = batch.counted[row].nonzero()[:, 0]
            if len(at):
                positions = places["position"][row, at].tolist()
                own = self.table.of(domain, window.document, positions, batch.tokens[row, at])
                key = hashlib.sha256(f"{self.seed} {window.document} {window.start} {window.source}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
                found[row, at] = torch.cat([own, own[torch.randperm(len(at), generator=generator)]], 1)
        return found

    def results(self, earlier: Mapping[str, Gathered]) -> dict[str, Result]:
        """What probes said."""
        return {"probes": earlier["score"]["probes"].result()}

    def tables(
        self,
        model: Mapping[str, Any],  # noqa: ARG002
        results: Mapping[str, Mapping[str, Result]],
    ) -> dict[str, pd.DataFrame]:
        """`probes` and `components`, of all domains together: see `ProbeResult`."""
        parts = [of["probes"] for of in results.values()]
        found = [part for part in parts if isinstance(part, ProbeResult)]
        of = parallel_blocks({domain: of.sources for domain, of in zip(results, found, strict=True)}, self.parallel)
        blocks = [block for of_domain in of.values() for block in of_domain.values()]
        sources = tuple(sorted(set(blocks)))  # parallel ones are one, and are drawn together
        at = torch.tensor([sources.index(block) for block in blocks])
        sums = {}
        for name in ("tokens", "said"):
            every = torch.cat([getattr(of, name) for of in found])
            sums[name] = every.new_zeros(len(sources), *every.shape[1:]).index_add_(0, at, every)
        pooled = replace(found[0], sources=sources, **sums)
        return {"probes": pooled.to_frame(), "components": pooled.components()}


def _pooled(earlier: Earlier, name: str, key: str) -> Tensor:
    """A sum over all domains."""
    parts = []
    for of in earlier.values():
        sums = of[name]["sums"]
        assert isinstance(sums, Sums)
        parts.append(sums.parts[key].value)
    return torch.stack(parts).sum(0)
