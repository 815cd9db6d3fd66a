"""Which experts tokens are sent to, and how decidedly (section 3 of "MoE Lens", arXiv 2603.05806)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.argument_checks import Within
from moe_lens.checked import Natural, Positive, Seed
from moe_lens.errors import InputError
from moe_lens.resampling import Interval, bootstrap, bootstrap_all, halves, jackknife_interval
from moe_lens.stats import load_evenness
from moe_lens.stats.accumulator import Accumulator, Result
from moe_lens.stats.routed_batch import RoutedBatch
from moe_lens.stats.sums import BySource

LAYER_MEASURES = {
    "gini": "Gini coefficient of the load: 0 even, near 1 if few experts take all",
    "load_entropy": "entropy of the load over experts, nats: ln E if even",
    "imbalance": "greatest load over mean load: 1 if even",
    "experts_50": "how many experts take half of the assignments",
    "experts_80": "how many experts take 80 % of the assignments",
    "router_entropy": "entropy of a token's affinities for all experts, nats, mean over tokens: ln E if undecided",
    "margin": "router logit of rank k minus that of rank k + 1, mean over tokens: 0 is a tie",
}
"""What is measured of a layer, and what each is."""
_COUNTS = ("experts_50", "experts_80")
"""Whole numbers that chance makes smaller: neither way gives intervals that can be trusted."""


@dataclass(frozen=True, eq=False)
class RoutingResult(Result):
    """Counts of tokens and of assignments, by source."""

    layers: tuple[Natural, ...]
    top_k: Positive
    sources: tuple[str, ...]
    tokens: Int[Tensor, " source"]
    assignments: Int[Tensor, "source layer n_experts"]
    """Tokens whose selected set contains the expert: what the router selected, also where an intervention left it out
    afterwards (`keep_top`), and its weight is 0. `ImportanceStats` counts what was computed."""
    top1: Int[Tensor, "source layer n_experts"]
    """Tokens to which the router gives the expert the greatest weight."""
    weights: Float[Tensor, "source layer n_experts"]
    """Sums of the expert's routing weight over tokens."""
    sums: Float[Tensor, "source layer 2"]
    """Sums over tokens of the router's entropy and of the margin."""
    measured: Int[Tensor, "source layer 2"]
    """Tokens whose entropy and margin are known: it takes affinities, or logits, of all experts."""

    @property
    def n_tokens(self) -> int:
        """Tokens counted, N_D in the paper."""
        return int(self.tokens.sum())

    @property
    def n_experts(self) -> int:
        """Routed experts in a layer."""
        return self.assignments.shape[-1]

    @property
    def baseline(self) -> float:
        """Specialisation of every expert under uniform routing: top_k / n_experts."""
        return self.top_k / self.n_experts

    @property
    def specialisation(self) -> Float[Tensor, "layer n_experts"]:
        """N_{E,D} / N_D: share of tokens whose selected set contains the expert, in [0, 1]; a layer sums to top_k."""
        return self.assignments.sum(0).double() / self.n_tokens

    @property
    def expert_load(self) -> Float[Tensor, "layer n_experts"]:
        """Share of the layer's assignments that the expert takes, in [0, 1]; a layer sums to 1."""
        return self.specialisation / self.top_k

    def experts_covering(self, share: Annotated[float, Within(0, 1)] = 0.5) -> Int[Tensor, " layer"]:
        """The smallest number of experts that together take at least `share` of a layer's assignments."""
        return load_evenness.experts_covering(self.assignments.sum(0), share)

    def interval(self, layer: Natural, expert: Natural) -> Interval | None:
        """95 % interval of an expert's specialisation, resampling sources; None when there are too few.

        Raises:
            InputError: there is no such layer or expert.
        """
        if layer not in self.layers or expert >= self.n_experts:
            raise InputError(
                f"there are no counts of expert {expert} of layer {layer}; there are some of layers "
                f"{list(self.layers)}, with experts 0 to {self.n_experts - 1}"
            )
        assigned = self.assignments[:, self.layers.index(layer), expert].double()
        return bootstrap(lambda times: (times @ assigned) / (times @ self.tokens.double()), self.tokens)

    def intervals(self) -> Float[Tensor, "2 layer n_experts"] | None:
        """Lower and upper ends of `interval` for every expert; None when there are too few sources."""
        tokens, assigned = self.tokens.double(), self.assignments.double()
        return bootstrap_all(
            lambda times: torch.einsum("rs,sle->rle", times, assigned) / (times @ tokens)[:, None, None],
            self.tokens,
        )

    def concentrated(self) -> Bool[Tensor, "layer n_experts"] | None:
        """Whether the expert's interval leaves out k / N, the share under uniform routing; None with too few sources.

        This is a statement about concentration alone: in a trained model nearly every expert differs from k / N, in
        any domain. Whether load *depends* on the domain is what `compare_domains` tests. An expert that no token
        chose, whose interval is a point, counts as concentrated, however few tokens there are.
        """
        ends = self.intervals()
        return None if ends is None else (ends[0] > self.baseline) | (ends[1] < self.baseline)

    def picked_and_measured_apart(self, seed: Seed = 0) -> Float[Tensor, " layer"] | None:
        """Specialisation of the most specialised expert, picked on one half of the sources and measured on the other.

        The largest of many noisy shares is too large; this one is not. Mean of both directions; None for one source.
        """
        if len(self.sources) < 2:
            return None
        half = halves(self.sources, seed)
        member = torch.tensor([half[source] == 0 for source in self.sources])
        shares = [self.assignments[m].sum(0).double() / self.tokens[m].sum() for m in (member, ~member)]
        measured = [there.gather(-1, here.argmax(-1, keepdim=True))[:, 0] for here, there in (shares, shares[::-1])]
        return (measured[0] + measured[1]) / 2

    def most_specialised(self) -> pd.DataFrame:
        """Per layer: the most specialised expert, its share, interval, and its share if picked on other sources."""
        shares, experts = self.specialisation.max(-1)
        apart = self.picked_and_measured_apart()
        rows = []
        for i, layer in enumerate(self.layers):
            interval = self.interval(layer, int(experts[i]))
            rows.append(
                {
                    "layer": layer,
                    "expert": int(experts[i]),
                    "share": float(shares[i]),
                    "low": interval.low if interval else None,
                    "high": interval.high if interval else None,
                    "picked_apart": float(apart[i]) if apart is not None else None,
                    "tokens": self.n_tokens,
                    "sources": len(self.sources),
                }
            )
        return pd.DataFrame(rows)

    def _layer_measures(self, times: Float[Tensor, "resample source"]) -> Float[Tensor, "resample layer measure"]:
        counts = torch.einsum("rs,sle->rle", times, self.assignments.double())
        means = torch.einsum("rs,slm->rlm", times, self.sums) / torch.einsum(
            "rs,slm->rlm", times, self.measured.double()
        )
        columns = {
            "gini": load_evenness.gini(counts),
            "load_entropy": load_evenness.entropy(counts),
            "imbalance": load_evenness.imbalance(counts),
            "experts_50": load_evenness.experts_covering(counts, 0.5),
            "experts_80": load_evenness.experts_covering(counts, 0.8),
            "router_entropy": means[..., 0],
            "margin": means[..., 1],
        }
        assert columns.keys() == LAYER_MEASURES.keys()
        return torch.stack([column.double() for column in columns.values()], -1)

    def per_layer(self) -> pd.DataFrame:
        """A row per layer and each of `LAYER_MEASURES`: value, its 95 % interval over sources, tokens, sources.

        Value and interval of `router_entropy` and `margin` are missing where the routing did not hold affinities or
        logits; intervals are where there are fewer than `MIN_SOURCES` sources, and of `experts_50` and `experts_80`.
        Chance makes loads uneven: the intervals of `gini` and of `load_entropy` are a jackknife's, of the value less
        this bias, and may lie beside the value; that of `imbalance` is one of the value.
        """
        values = self._layer_measures(torch.ones(1, len(self.sources), dtype=torch.float64))[0]
        tokens = self.tokens[:, None, None].expand(-1, len(self.layers), len(LAYER_MEASURES) - self.measured.shape[-1])
        ends = bootstrap_all(self._layer_measures, torch.cat([tokens, self.measured], -1))
        if ends is not None:
            without = self._layer_measures(1 - torch.eye(len(self.sources), dtype=torch.float64))
            strata, n = torch.zeros(len(self.sources), dtype=torch.long), self.n_experts
            limits = {"gini": (0, 1 - 1 / n), "load_entropy": (0, math.log(n)), "imbalance": (1, n)}
            for at, name in enumerate(LAYER_MEASURES):
                if name in limits:
                    # of a maximum the bias is small beside the interval; without it coverage would be worse
                    found = jackknife_interval(
                        values[:, at], without[..., at], strata, self.tokens, corrected=name != "imbalance"
                    )
                    ends[..., at] = torch.stack(found).clamp(*limits[name])
                elif name in _COUNTS:
                    ends[..., at] = torch.nan
        low, high = (torch.full_like(values, torch.nan),) * 2 if ends is None else ends
        index = pd.MultiIndex.from_product([self.layers, LAYER_MEASURES], names=["layer", "measure"])
        columns = {name: table.flatten().numpy() for name, table in (("value", values), ("low", low), ("high", high))}
        return pd.DataFrame(columns, index=index).reset_index().assign(tokens=self.n_tokens, sources=len(self.sources))

    def to_frame(self) -> pd.DataFrame:
        """One row per layer and expert.

        Columns: assigned and top1 (tokens), weight (sum of routing weights), tokens, share (specialisation), and low
        and high, its 95 % interval over sources; missing when there are too few.
        """
        ends = self.intervals()
        low, high = (torch.full_like(self.specialisation, torch.nan),) * 2 if ends is None else ends
        columns = {
            "assigned": self.assignments.sum(0),
            "top1": self.top1.sum(0),
            "weight": self.weights.sum(0),
            "share": self.specialisation,
            "low": low,
            "high": high,
        }
        index = pd.MultiIndex.from_product([self.layers, range(self.n_experts)], names=["layer", "expert"])
        frame = pd.DataFrame({name: value.flatten().numpy() for name, value in columns.items()}, index=index)
        return frame.reset_index().assign(tokens=self.n_tokens)


class RoutingStats(Accumulator[RoutingResult]):
    """Counts per source, layer and expert; memory grows with the number of sources only."""

    def __init__(self, layers: Sequence[int], n_experts: Positive, top_k: Positive):
        self.layers, self.n_experts, self.top_k = tuple(layers), n_experts, top_k
        self._tokens, self._counts, self._weights = BySource(), BySource(), BySource()
        self._sums, self._measured = BySource(), BySource()
        super().__init__(
            {"layers": self.layers, "n_experts": n_experts, "top_k": top_k},
            {
                "tokens": self._tokens,
                "counts": self._counts,
                "weights": self._weights,
                "sums": self._sums,
                "measured": self._measured,
            },
        )

    def update(self, batch: RoutedBatch) -> Self:
        """Count a batch.

        Raises:
            InputError: The layers, experts or the number of active experts are not those announced.
        """
        routing, mask = batch.routing, batch.mask
        check_sizes(batch, self.layers, self.n_experts, self.top_k)
        filled = mask.any(-1).tolist()
        sources = [source for source, any_ in zip(batch.sources, filled, strict=True) if any_]
        rows = mask.any(-1)
        self._tokens.add(mask.sum(-1)[rows], sources)
        top1 = torch.zeros_like(routing.indices[:, :, 0, :1].expand(-1, -1, self.n_experts))
        leading = routing.indices[..., 0]
        top1.scatter_add_(-1, leading, mask.to(leading.dtype).expand_as(leading))
        counts = torch.stack([batch.chosen.sum(2).long(), top1], 1)  # [layer, 2, batch, n_experts]
        self._counts.add(counts.permute(2, 1, 0, 3)[rows], sources)
        # float32 does for the weights of one row, and what is added up is float64
        given = routing.weights.float().masked_fill(~mask[None, ..., None], 0)
        weights = torch.zeros_like(batch.chosen[:, :, 0]).scatter_add_(-1, routing.indices.flatten(2), given.flatten(2))
        self._weights.add(weights.transpose(0, 1)[rows], sources)
        values = torch.stack([router_entropy(batch), margin(batch)], -1)  # [layer, batch, pos, 2]
        known = values.isfinite() & mask[..., None]
        self._sums.add(values.masked_fill(~known, 0).sum(2, dtype=torch.float64).transpose(0, 1)[rows], sources)
        self._measured.add(known.sum(2).transpose(0, 1)[rows], sources)
        return self

    def result(self) -> RoutingResult:
        """The counts so far."""
        if not self._tokens.sources:
            raise InputError("no tokens were counted; update with a batch that holds text first")
        counts = self._counts.stacked()
        return RoutingResult(
            self.layers,
            self.top_k,
            self._tokens.sources,
            self._tokens.stacked(),
            counts[:, 0],
            counts[:, 1],
            self._weights.stacked(),
            self._sums.stacked(),
            self._measured.stacked(),
        )


def check_sizes(batch: RoutedBatch, layers: Sequence[int], n_experts: int, top_k: int) -> None:
    """Refuse a batch of another model.

    Raises:
        InputError: other layers, experts or active experts than announced.
    """
    routing = batch.routing
    came = {"layers": list(routing.layers), "n_experts": routing.n_experts, "top_k": routing.top_k}
    expected = {"layers": list(layers), "n_experts": n_experts, "top_k": top_k}
    if came != expected:
        raise InputError(f"this batch has {came}; expected {expected}")


def router_entropy(batch: RoutedBatch) -> Float[Tensor, "layer batch pos"]:
    """Entropy in nats of each token's affinities, made to sum to 1; NaN where the routing does not hold them."""
    probs = batch.routing.probs
    if probs is None:
        return torch.full(batch.routing.indices.shape[:-1], torch.nan, device=batch.routing.indices.device)
    # H(p / s) = H(p) / s + ln s, s the sum of p: no second table of all experts is made
    p = probs.float()
    total = p.sum(-1)
    # −Σ p ln p, of which 0 ln 0 is 0; log is vectorised where torch.special.entr is not
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1) / total + total.log()


def margin(batch: RoutedBatch) -> Float[Tensor, "layer batch pos"]:
    """`Routing.margin` of each token; NaN where the routing does not hold logits."""
    if batch.routing.logits is None:
        return torch.full(batch.routing.indices.shape[:-1], torch.nan, device=batch.routing.indices.device)
    return batch.routing.margin().float()
