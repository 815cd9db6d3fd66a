"""Does routing depend on the domain? Tested by permuting domain labels over sources: tokens are not independent.

Whether experts' shares differ from k / N says something about concentration alone; here every quantity compares domains
with one another. Every domain has the same weight, however much text there is of it. The null hypothesis is that the
sources' routing is distributed alike in all domains, whatever their sizes: see `moe_lens.stats.source_permutation`.
Domains whose sources differ more from one another than those of others are not alike, and may be found so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb, log

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moe_lens.checked import Natural, Positive, Seed
from moe_lens.errors import InputError
from moe_lens.resampling import jackknife_interval
from moe_lens.stats.accumulator import Result
from moe_lens.stats.domain_pairs import CHUNK, PairTest, Rows, information, normalised
from moe_lens.stats.multiple_tests import enough_draws, holm, max_t, most_significant
from moe_lens.stats.routing_stats import RoutingResult
from moe_lens.stats.source_permutation import Deviations, divisions


@dataclass(frozen=True, eq=False)
class DomainComparison(Result):
    """How routing differs between domains, beside what randomly labelled sources would show."""

    domains: tuple[str, ...]
    layers: tuple[Natural, ...]
    n_sources: tuple[Natural, ...]
    """Of each domain."""
    permutations: Positive
    """How often labels were permuted; no p-value can be below 1 / (permutations + 1), nor below `smallest_p`."""
    shares: Float[Tensor, "domain layer n_experts"]
    """Specialisation N_{E,D} / N_D."""
    differences: Float[Tensor, "domain layer n_experts"]
    """Specialisation minus its mean over the other domains."""
    statistics: Float[Tensor, "domain layer n_experts"]
    """Differences in standard deviations; 0 where fewer than 10 tokens are expected in some domain: not tested.

    Nor is any expert where one source holds nearly all of a domain's text: `source_permutation.LEAST_SOURCES`."""
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
    """Jensen–Shannon divergence of the loads of two domains, nats, in [0, ln 2]; pairs in the order of `pairs`.

    It, its null and its p-value come from the sources of these two domains alone.
    """
    jsd_null: Float[Tensor, "layer pair"]
    """Its mean over permutations."""
    jsd_p_values: Float[Tensor, "layer pair"]
    """One-sided, of each layer and pair alone."""
    jsd_smallest_p: Float[Tensor, " pair"]
    """The smallest p-value that so many permutations of so many sources can give."""
    pair_sources: tuple[tuple[Natural, Natural], ...]
    """Of each pair: how many sources of either domain were used."""
    pair_dropped: tuple[Natural, ...]
    """Of each pair: how many sources were left out, as the other domain has none that is parallel to them."""
    unit_domains: Bool[Tensor, "unit domain"]
    """Which domains a unit has text in: a source, or, with a key, all sources that share it."""
    unit_tokens: Float[Tensor, "unit domain"]
    """How much."""
    pair_units: Bool[Tensor, "pair unit"]
    """Which units a pair was measured with."""
    mi_without: Float[Tensor, "unit layer"]
    """Without each unit: what intervals are made of."""
    jsd_without: Float[Tensor, "unit layer pair"]

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Every two domains once."""
        return tuple(combinations(self.domains, 2))

    @property
    def smallest_p(self) -> float:
        """The smallest p-value that so many permutations of so many sources can give of experts, and of information."""
        return 1 / min(self.permutations + 1, divisions(self.n_sources))

    def to_frame(self) -> pd.DataFrame:
        """A row per domain, layer and expert: share, difference, statistic, p_value, smallest_p, npmi."""
        axes = [self.domains, self.layers, range(self.shares.shape[-1])]
        index = pd.MultiIndex.from_product(axes, names=["domain", "layer", "expert"])
        columns = {
            "share": self.shares,
            "difference": self.differences,
            "statistic": self.statistics,
            "p_value": self.p_values,
            "npmi": self.npmi,
        }
        frame = pd.DataFrame({name: table.flatten().numpy() for name, table in columns.items()}, index=index)
        frame.insert(list(frame).index("p_value") + 1, "smallest_p", self.smallest_p)
        return frame.reset_index()

    def strongest(self, n: Positive = 10) -> pd.DataFrame:
        """The rows of `to_frame` with the smallest p-values; of equal ones, those with the largest effect."""
        return most_significant(self.to_frame(), "statistic").head(n)

    def per_layer(self) -> pd.DataFrame:
        """A row per layer: mi, low, high, null, excess (mi − null), p_value, p_holm (over layers), smallest_p; nats.

        low and high are the 95 % interval over sources of the mutual information minus what few sources add to it.
        """
        all_units, all_domains = torch.ones(len(self.unit_domains), dtype=torch.bool), range(len(self.domains))
        low, high = self._interval(self.mi, self.mi_without, all_units, all_domains)
        columns = {
            "mi": self.mi,
            "low": low.clamp(0, log(len(self.domains))),
            "high": high.clamp(0, log(len(self.domains))),
            "null": self.mi_null,
            "excess": self.mi - self.mi_null,
            "p_value": self.mi_p_values,
            "p_holm": holm(self.mi_p_values),
        }
        frame = pd.DataFrame({"layer": self.layers, **{name: value.numpy() for name, value in columns.items()}})
        return frame.assign(smallest_p=self.smallest_p)

    def per_pair(self) -> pd.DataFrame:
        """A row per layer and pair of domains, of these two alone; nats.

        Columns: layer, domain, other, jsd, low, high (95 % interval over sources of the divergence minus what few
        sources add to it), null, excess (jsd minus null), p_value, p_holm (over pairs and layers), smallest_p, sources,
        other_sources, dropped (sources that have no parallel one in the other domain).
        """
        ends = [
            self._interval(self.jsd[:, i], self.jsd_without[..., i], units, [self.domains.index(d) for d in pair])
            for i, (units, pair) in enumerate(zip(self.pair_units, self.pairs, strict=True))
        ]
        low, high = (torch.stack(of, -1).clamp(0, log(2)) for of in zip(*ends, strict=True))
        columns = {
            "jsd": self.jsd,
            "low": low,
            "high": high,
            "null": self.jsd_null,
            "excess": self.jsd - self.jsd_null,
            "p_value": self.jsd_p_values,
            "p_holm": holm(self.jsd_p_values),
            "smallest_p": self.jsd_smallest_p.expand(self.jsd.shape),
        }
        axes = [(layer, *pair) for layer in self.layers for pair in self.pairs]
        index = pd.MultiIndex.from_tuples(axes, names=["layer", "domain", "other"])
        frame = pd.DataFrame({name: value.flatten().numpy() for name, value in columns.items()}, index=index)
        sources, others = zip(*self.pair_sources, strict=True)
        each = {"sources": sources, "other_sources": others, "dropped": self.pair_dropped}
        return frame.reset_index().assign(**{name: values * len(self.layers) for name, values in each.items()})

    def nearer(self, domain: str, one: str, other: str) -> pd.DataFrame:
        """Is a domain nearer to one than to another: the divergence from one minus that from the other, nats.

        A row per layer, and a last one (layer missing) for the mean over layers: to_one, to_other, difference, low,
        high (its 95 % interval over sources; below 0: nearer to `one`).

        Raises:
            InputError: A domain that was not compared, or one that is named twice.
        """
        unknown = [name for name in (domain, one, other) if name not in self.domains]
        if unknown or len({domain, one, other}) < 3:
            raise InputError(f"got {[domain, one, other]}; expected three different ones of {list(self.domains)}")
        pairs = [frozenset(pair) for pair in self.pairs]
        places = [pairs.index(frozenset((domain, name))) for name in (one, other)]
        both, without = self.jsd[:, places], self.jsd_without[..., places]
        values, left = (torch.cat([of, of.mean(-2, keepdim=True)], -2) for of in (both, without))
        difference, left_difference = values[..., 0] - values[..., 1], left[..., 0] - left[..., 1]
        units = self.pair_units[places].any(0)
        domains = [self.domains.index(name) for name in (domain, one, other)]
        low, high = self._interval(difference, left_difference, units, domains)
        columns = {"to_one": values[:, 0], "to_other": values[:, 1], "difference": difference, "low": low, "high": high}
        layers = pd.array([*self.layers, None], dtype="Int64")
        return pd.DataFrame({"layer": layers, **{name: value.numpy() for name, value in columns.items()}})

    def nearest(self) -> pd.DataFrame:
        """`nearer` of every domain and every two others: its columns, after domain, one and other.

        Raises:
            InputError: There are two domains only.
        """
        if len(self.domains) < 3:
            raise InputError(f"got the domains {list(self.domains)}; nearer to one than to another takes three")
        parts = []
        for domain in self.domains:
            for one, other in combinations([name for name in self.domains if name != domain], 2):
                parts.append(self.nearer(domain, one, other))
                for at, (column, name) in enumerate((("domain", domain), ("one", one), ("other", other))):
                    parts[-1].insert(at, column, name)
        return pd.concat(parts, ignore_index=True)

    def _interval(
        self,
        values: Float[Tensor, "*value"],
        without: Float[Tensor, "unit *value"],
        units: Bool[Tensor, " unit"],
        domains: Sequence[int],
    ) -> tuple[Float[Tensor, "*value"], Float[Tensor, "*value"]]:
        """Of some units and domains; those that have text in the same ones are a stratum."""
        strata = self.unit_domains[units].long().unique(dim=0, return_inverse=True)[1]
        sizes = self.unit_tokens[units][:, list(domains)]
        return jackknife_interval(values, without[units], strata, sizes, corrected=True)


def compare_domains(
    results: Mapping[str, RoutingResult],
    *,
    permutations: Positive | None = None,
    seed: Seed = 0,
    parallel: Callable[[str], str] | None = None,
) -> DomainComparison:
    """Test whether experts serve domains differently.

    Labels are permuted over sources, so that all tokens of a source keep together; sizes may differ, as deviations are
    scaled to the size of the source that they are assigned to. The test of an expert compares its standardised
    difference with the greatest one of all experts, layers and domains of each permutation (Westfall and Young's maxT):
    the chance of even one false finding is the level. Few sources have few distinct permutations: then no p-value can
    be small. Everything about a pair of domains comes from these two alone, so that it does not depend on a third.

    Args:
        results: Of each domain, counted with the same model.
        permutations: How often labels are permuted; if not given, `enough_draws` for all pairs and layers.
        seed: Of the permutations.
        parallel: From the name of a source to a key that it shares with its translations, say, in other domains. A pair
            of domains that have keys in common is then compared on those, by swapping the two domains' sources of one
            key; sources without a partner are left out of the pair, and counted. The tests of experts and of mutual
            information permute all sources: where some are parallel these find too little, not too much.

    Raises:
        InputError: Fewer than two domains, or results of different models.
    """
    rows = Rows.of(results, None)
    domains, first = tuple(results), next(iter(results.values()))
    permutations = permutations or enough_draws(comb(len(domains), 2) * len(first.layers))
    deviations = Deviations.of(rows.counts, rows.tokens, rows.domain)
    error = _of_difference(deviations.errors)

    def standardised(
        shares: Float[Tensor, "some domain layer n_experts"],
    ) -> Float[Tensor, "some domain layer n_experts"]:
        return (_differences(shares) / error).nan_to_num(0, 0, 0) * deviations.tested

    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(permutations, len(rows.unit), generator=generator).argsort(-1)
    # What was observed comes first; the others are as good as it if domains mean nothing.
    greatest, mi = [], []
    parts = order.split(max(1, CHUNK // rows.counts.numel()))
    for shares in (deviations.shares()[None], *map(deviations.reassigned, parts)):
        greatest.append(standardised(shares).abs().flatten(1).amax(-1))
        mi.append(information(normalised(shares)))
    observed = deviations.shares()
    statistics = standardised(observed[None])[0]
    n_sources = tuple(len(result.sources) for result in results.values())
    smallest = 1 / min(permutations + 1, divisions(n_sources))
    p_values = max_t(statistics, torch.cat(greatest)[1:]).clamp(min=smallest)
    mi = torch.cat(mi)

    units = rows if parallel is None else Rows.of(results, parallel)
    unit_domains, n_rows = units.domains_of_units(), torch.bincount(units.domain)
    mi_without = information(units.without_units())
    tests, members, dropped = [], [], []
    for a, b in combinations(range(len(domains)), 2):
        of_pair = units.pair(a, b, parallel is not None)
        tests.append(PairTest.of(of_pair, permutations, torch.Generator().manual_seed(seed)))
        both = unit_domains[:, a] & unit_domains[:, b]
        members.append(both if parallel is not None and bool(both.any()) else unit_domains[:, [a, b]].any(1))
        dropped.append(int(n_rows[a] + n_rows[b]) - len(of_pair.unit))
    jsd = torch.stack([test.jsd for test in tests], -1)
    jsd_without = jsd.repeat(len(unit_domains), 1, 1)  # what a unit has no part in is the same without it
    for i, (test, member) in enumerate(zip(tests, members, strict=True)):
        jsd_without[member, :, i] = test.without
    return DomainComparison(
        domains=domains,
        layers=first.layers,
        n_sources=n_sources,
        permutations=permutations,
        shares=observed,
        differences=_differences(observed[None])[0],
        statistics=statistics,
        p_values=p_values,
        npmi=npmi(observed / first.top_k),
        mi=mi[0],
        mi_null=mi[1:].mean(0),
        mi_p_values=(mi >= mi[0] - 1e-12).double().mean(0).clamp(min=smallest),
        jsd=jsd,
        jsd_null=torch.stack([test.null for test in tests], -1),
        jsd_p_values=torch.stack([test.p_values for test in tests], -1),
        jsd_smallest_p=torch.tensor([test.smallest_p for test in tests], dtype=torch.float64),
        pair_sources=tuple(test.sources for test in tests),
        pair_dropped=tuple(dropped),
        unit_domains=unit_domains,
        unit_tokens=units.tokens_of_units(),
        pair_units=torch.stack(members),
        mi_without=mi_without,
        jsd_without=jsd_without,
    )


def npmi(load: Float[Tensor, "domain *rest"]) -> Float[Tensor, "domain *rest"]:
    """Normalised pointwise mutual information of domain and expert, in [−1, 1], all domains having the same weight.

    Args:
        load: p(e | d): share of the domain's assignments.
    """
    joint = load / len(load)
    value = (load / load.mean(0)).log() / -joint.log()
    return torch.where(load > 0, value, -1.0).masked_fill(load.mean(0) == 0, 0)


def _differences(shares: Float[Tensor, "some domain *rest"]) -> Float[Tensor, "some domain *rest"]:
    """From the mean of the other domains."""
    others = (shares.sum(1, keepdim=True) - shares) / (shares.shape[1] - 1)
    return shares - others


def _of_difference(errors: Float[Tensor, "domain *rest"]) -> Float[Tensor, "domain *rest"]:
    """Standard deviation of a domain's difference from the mean of the others, from those of the domains' shares."""
    squares = errors.square()
    return (squares + (squares.sum(0) - squares) / (len(errors) - 1) ** 2).sqrt()
