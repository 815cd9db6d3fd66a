"""Does routing depend on the domain? Tested by permuting domain labels over sources: tokens are not independent.

Whether experts' shares differ from k / N says something about concentration alone; here every quantity compares domains
with one another. Every domain has the same weight, however much text there is of it. The null hypothesis is that the
sources' routing is distributed alike in all domains, whatever their sizes: see `moe_lens.stats.source_permutation`.
Domains whose sources differ more from one another than those of others are not alike, and may be found so.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.checked import checked
from moe_lens.errors import InputError
from moe_lens.stats.accumulator import Result
from moe_lens.stats.routing_stats import RoutingResult
from moe_lens.stats.source_permutation import Deviations

CHUNK = 2**24
"""Numbers that are held at a time while labels are permuted."""


@dataclass(frozen=True, eq=False)
class DomainComparison(Result):
    """How routing differs between domains, beside what randomly labelled sources would show."""

    domains: tuple[str, ...]
    layers: tuple[int, ...]
    n_sources: tuple[int, ...]
    """Of each domain."""
    permutations: int
    """How often labels were permuted; no p-value can be below 1 / (permutations + 1)."""
    shares: Float[Tensor, "domain layer n_experts"]
    """Specialisation N_{E,D} / N_D."""
    differences: Float[Tensor, "domain layer n_experts"]
    """Specialisation minus its mean over the other domains."""
    statistics: Float[Tensor, "domain layer n_experts"]
    """Differences in standard deviations; 0 where fewer than 10 tokens are expected in some domain: not tested."""
    p_values: Float[Tensor, "domain layer n_experts"]
    """Of the absolute statistic, against the greatest one over all domains, layers and experts: corrected for all."""
    npmi: Float[Tensor, "domain layer n_experts"]
    """ln(p(e, d) / (p(e) p(d))) / −ln p(e, d), in [−1, 1]: 0 if independent, −1 if never together (Bouma 2009)."""
    mi: Float[Tensor, " layer"]
    """I(E; D) of an assignment's expert and its domain, nats: the mean of KL(p(e | d) ‖ p(e)) over domains."""
    mi_null: Float[Tensor, " layer"]
    """Its mean over permutations: what samples of these sizes give where there is nothing."""
    mi_p_values: Float[Tensor, " layer"]
    """One-sided, of each layer alone."""
    jsd: Float[Tensor, "layer pair"]
    """Jensen–Shannon divergence of the loads of two domains, nats, in [0, ln 2]; pairs in the order of `pairs`."""
    jsd_null: Float[Tensor, "layer pair"]
    """Its mean over permutations."""
    jsd_p_values: Float[Tensor, "layer pair"]
    """One-sided, of each layer and pair alone."""

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Every two domains once."""
        return tuple((a, b) for i, a in enumerate(self.domains) for b in self.domains[i + 1 :])

    def to_frame(self) -> pd.DataFrame:
        """A row per domain, layer and expert: share, difference, statistic, p_value, npmi."""
        axes = [self.domains, self.layers, range(self.shares.shape[-1])]
        index = pd.MultiIndex.from_product(axes, names=["domain", "layer", "expert"])
        columns = {
            "share": self.shares,
            "difference": self.differences,
            "statistic": self.statistics,
            "p_value": self.p_values,
            "npmi": self.npmi,
        }
        return pd.DataFrame(
            {name: table.flatten().numpy() for name, table in columns.items()}, index=index
        ).reset_index()

    def per_layer(self) -> pd.DataFrame:
        """A row per layer: mi, null, excess (mi minus null), p_value; nats."""
        columns = {"mi": self.mi, "null": self.mi_null, "excess": self.mi - self.mi_null, "p_value": self.mi_p_values}
        return pd.DataFrame({"layer": self.layers, **{name: value.numpy() for name, value in columns.items()}})

    def per_pair(self) -> pd.DataFrame:
        """A row per layer and pair of domains: jsd, null, excess (jsd minus null), p_value; nats."""
        columns = {
            "jsd": self.jsd,
            "null": self.jsd_null,
            "excess": self.jsd - self.jsd_null,
            "p_value": self.jsd_p_values,
        }
        axes = [(layer, *pair) for layer in self.layers for pair in self.pairs]
        index = pd.MultiIndex.from_tuples(axes, names=["layer", "domain", "other"])
        return pd.DataFrame(
            {name: value.flatten().numpy() for name, value in columns.items()}, index=index
        ).reset_index()


@checked
def compare_domains(
    results: Mapping[str, RoutingResult], *, permutations: int = 1000, seed: int = 0
) -> DomainComparison:
    """Test whether experts serve domains differently.

    Labels are permuted over sources, so that all tokens of a source keep together; sizes may differ, as deviations are
    scaled to the size of the source that they are assigned to. The test of an expert compares its standardised
    difference with the greatest one of all experts, layers and domains of each permutation (Westfall and Young's maxT):
    the chance of even one false finding is the level. Few sources have few distinct permutations: then no p-value can
    be small.

    Args:
        results: Of each domain, counted with the same model.
        permutations: How often labels are permuted.
        seed: Of the permutations.

    Raises:
        InputError: Fewer than two domains, or results of different models.
    """
    domains, counts, tokens, labels = _stacked(results)
    first = next(iter(results.values()))
    deviations = Deviations.of(counts, tokens, labels)
    error = _of_difference(deviations.errors)

    def standardised(
        shares: Float[Tensor, "some domain layer n_experts"],
    ) -> Float[Tensor, "some domain layer n_experts"]:
        return (_differences(shares) / error).nan_to_num(0, 0, 0) * deviations.tested

    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(permutations, len(counts), generator=generator).argsort(-1)
    # What was observed comes first; the others are as good as it if domains mean nothing.
    greatest, mi, jsd = [], [], []
    parts = order.split(max(1, CHUNK // counts.numel()))
    for shares in (deviations.shares()[None], *map(deviations.reassigned, parts)):
        greatest.append(standardised(shares).abs().flatten(1).amax(-1))
        load = shares.clamp(min=0)
        load = load / load.sum(-1, keepdim=True)
        mi.append(_information(load))
        jsd.append(_divergences(load))
    observed = deviations.shares()
    statistics = standardised(observed[None])[0]
    p_values = _p_values_of_greatest(torch.cat(greatest), statistics.abs())
    mi, jsd = torch.cat(mi), torch.cat(jsd)
    return DomainComparison(
        domains=domains,
        layers=first.layers,
        n_sources=tuple(len(result.sources) for result in results.values()),
        permutations=permutations,
        shares=observed,
        differences=_differences(observed[None])[0],
        statistics=statistics,
        p_values=p_values,
        npmi=npmi(observed / first.top_k),
        mi=mi[0],
        mi_null=mi[1:].mean(0),
        mi_p_values=_p_values(mi, mi[0]),
        jsd=jsd[0],
        jsd_null=jsd[1:].mean(0),
        jsd_p_values=_p_values(jsd, jsd[0]),
    )


def npmi(load: Float[Tensor, "domain *rest"]) -> Float[Tensor, "domain *rest"]:
    """Normalised pointwise mutual information of domain and expert, in [−1, 1], all domains having the same weight.

    Args:
        load: p(e | d): share of the domain's assignments.
    """
    joint = load / len(load)
    value = (load / load.mean(0)).log() / -joint.log()
    return torch.where(load > 0, value, -1.0).masked_fill(load.mean(0) == 0, 0)


def _stacked(
    results: Mapping[str, RoutingResult],
) -> tuple[
    tuple[str, ...],
    Float[Tensor, "source layer n_experts"],
    Float[Tensor, " source"],
    Int[Tensor, " source"],
]:
    if len(results) < 2:
        raise InputError(f"got the domains {list(results)}; expected at least two to compare")
    sizes = {(result.layers, result.n_experts, result.top_k) for result in results.values()}
    if len(sizes) > 1:
        raise InputError(f"the domains were counted with different models: {sorted(sizes)}")
    counts = torch.cat([result.assignments.double() for result in results.values()])
    tokens = torch.cat([result.tokens.double() for result in results.values()])
    labels = torch.cat([torch.full((len(r.sources),), i) for i, r in enumerate(results.values())])
    return tuple(results), counts, tokens, labels


def _differences(shares: Float[Tensor, "some domain *rest"]) -> Float[Tensor, "some domain *rest"]:
    """From the mean of the other domains."""
    others = (shares.sum(1, keepdim=True) - shares) / (shares.shape[1] - 1)
    return shares - others


def _of_difference(errors: Float[Tensor, "domain *rest"]) -> Float[Tensor, "domain *rest"]:
    """Standard deviation of a domain's difference from the mean of the others, from those of the domains' shares."""
    squares = errors.square()
    return (squares + (squares.sum(0) - squares) / (len(errors) - 1) ** 2).sqrt()


def _information(load: Float[Tensor, "some domain layer n_experts"]) -> Float[Tensor, "some layer"]:
    """I(E; D) with domains of equal weight: the entropy of the mean minus the mean entropy."""
    return torch.special.entr(load.mean(1)).sum(-1) - torch.special.entr(load).sum(-1).mean(1)


def _divergences(load: Float[Tensor, "some domain layer n_experts"]) -> Float[Tensor, "some layer pair"]:
    first, second = torch.triu_indices(load.shape[1], load.shape[1], 1)
    alone = torch.special.entr(load).sum(-1)
    # a pair at a time: there may be many, and each is as large as the loads themselves
    return torch.stack(
        [
            torch.special.entr((load[:, a] + load[:, b]) / 2).sum(-1) - (alone[:, a] + alone[:, b]) / 2
            for a, b in zip(first.tolist(), second.tolist(), strict=True)
        ],
        -1,
    )


def _p_values(null: Float[Tensor, "labelling *shape"], observed: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Share of labellings, the observed one among them, at least as great as what was observed."""
    return (null >= observed - 1e-12).double().mean(0)


def _p_values_of_greatest(
    null: Float[Tensor, " labelling"], observed: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Share of labellings, the observed one among them, whose greatest value is at least what was observed."""
    below = torch.searchsorted(null.sort().values, observed.contiguous() - 1e-9)
    return (len(null) - below).double() / len(null)
