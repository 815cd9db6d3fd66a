"""I(expert; domain | token): what the domain says about the expert once the token is known."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.checked import checked
from moe_lens.errors import InputError
from moe_lens.stats.accumulator import Result
from moe_lens.stats.vocabulary_specialisation import VocabularyResult


@dataclass(frozen=True, eq=False)
class ConditionalInformation(Result):
    """I(E; D | X) of an assignment's expert, its domain and its token, beside what permuted labels give; nats.

    Domains have the same weight. A token that occurs in one domain only says nothing, and adds 0.
    """

    domains: tuple[str, ...]
    layers: tuple[int, ...]
    permutations: int
    information: Float[Tensor, " layer"]
    null: Float[Tensor, " layer"]
    """Mean over permutations: finite samples of rare tokens give much even where there is nothing."""
    p_values: Float[Tensor, " layer"]
    """One-sided, of each layer alone."""
    shared: float
    """Share of the text, in [0, 1], that is of tokens which occur in two domains at least."""

    def to_frame(self) -> pd.DataFrame:
        """A row per layer: information, null, excess (information minus null), p_value, shared."""
        columns = {
            "information": self.information,
            "null": self.null,
            "excess": self.information - self.null,
            "p_value": self.p_values,
        }
        frame = pd.DataFrame({"layer": self.layers, **{name: value.numpy() for name, value in columns.items()}})
        return frame.assign(shared=self.shared)


@checked
def conditional_information(
    results: Mapping[str, VocabularyResult], *, permutations: int = 200, seed: int = 0
) -> ConditionalInformation:
    """Measure I(E; D | X) and its permutation null.

    Domain labels are permuted over groups of sources, among those in which a token occurs: routing keeps its dependence
    on the token, and tokens of a group keep together. As in `compare_domains`, deviations are permuted, from what the
    token is sent to anywhere, scaled to how often it occurs in the group that they are assigned to: each domain keeps
    its amount of text, and of each token.

    Args:
        results: Of each domain, counted by `VocabularyStats(…, groups=…)` with the same settings.
        permutations: How often labels are permuted.
        seed: Of the permutations.

    Raises:
        InputError: fewer than two domains, counts that do not fit one another, or a single group, with which there is
            nothing to permute.
    """
    domains, first = tuple(results), next(iter(results.values()), None)
    if first is None or len(results) < 2:
        raise InputError(f"got the domains {list(results)}; expected at least two to compare")
    about = {(r.by, r.layers, r.n_experts, r.top_k, r.d_vocab, r.groups) for r in results.values()}
    if len(about) > 1:
        raise InputError(f"the domains were counted in different ways: {sorted(about)}")
    if first.groups == 1:
        raise InputError("all sources were counted in one group; count with VocabularyStats(…, groups=10) or so")
    generator = torch.Generator().manual_seed(seed)
    values = torch.zeros(permutations + 1, len(first.layers), dtype=torch.float64)
    shared = 0.0
    for i, layer in enumerate(first.layers):
        units = _units(list(results.values()), layer)
        values[0, i] = units.information(units.counts)
        for j in range(permutations if len(units.token) else 0):
            values[j + 1, i] = units.information(units.reassigned(units.permuted(generator)))
        shared = units.shared  # the same in every layer
    return ConditionalInformation(
        domains=domains,
        layers=first.layers,
        permutations=permutations,
        information=values[0],
        null=values[1:].mean(0),
        p_values=(values >= values[0] - 1e-12).double().mean(0),
        shared=shared,
    )


@dataclass(frozen=True, eq=False)
class _Units:
    """Of one layer: what a group of sources did with a token, for tokens that occur in two domains at least."""

    token: Int[Tensor, " unit"]
    """Counted from 0, ascending."""
    domain: Int[Tensor, " unit"]
    group: Int[Tensor, " unit"]
    """Of sources, numbered through all domains."""
    counts: Float[Tensor, "unit n_experts"]
    outside: Float[Tensor, " domain"]
    """Assignments of other tokens."""
    shared: float

    def permuted(self, generator: torch.Generator) -> Int[Tensor, " unit"]:
        """For each unit another one of its token: groups are put in a random order, the same for all tokens."""
        random = torch.rand(int(self.group.max()) + 1, generator=generator)[self.group].argsort()
        return random[self.token[random].argsort(stable=True)]

    @cached_property
    def deviations(
        self,
    ) -> tuple[Float[Tensor, "unit n_experts"], Float[Tensor, "unit n_experts"], Float[Tensor, "unit 1"]]:
        """What is expected of each unit; how it deviates, in units of its spread; and its spread, up to a factor."""
        n_tokens = int(self.token[-1]) + 1
        size = self.counts.sum(-1, keepdim=True)

        def of_token(values: Float[Tensor, "unit some"]) -> Float[Tensor, "unit some"]:
            return torch.zeros(n_tokens, values.shape[1], dtype=torch.float64).index_add_(0, self.token, values)[
                self.token
            ]

        share, leverage = of_token(self.counts) / of_token(size), size / of_token(size)
        deviation = self.counts - share * size
        units = of_token(torch.ones_like(size))
        # the variance of a count is p (1 − p) n (1 + ρ (n − 1)), ρ that of all tokens and experts
        binomial = (share * (1 - share)).sum(-1, keepdim=True) * (1 - leverage)
        more = (deviation.square().sum(-1, keepdim=True) / size - binomial).sum()
        rho = float((more / (binomial * (size - 1)).sum()).nan_to_num(0, 0, 0).clamp(0, 1))
        spread = (size * (1 + rho * (size - 1))).sqrt()
        relative = ((1 - 1 / units) / (1 - leverage)).sqrt()
        return share * size, deviation / spread * relative, spread

    def reassigned(self, order: Int[Tensor, " unit"]) -> Float[Tensor, "unit n_experts"]:
        """Counts if each unit deviated as much as the one in its place in `order`; may be a little below 0."""
        expected, standard, spread = self.deviations
        return expected + standard[order] * spread

    def information(self, counts: Float[Tensor, "unit n_experts"]) -> Float[Tensor, ""]:
        """I(E; D | X) of these counts."""
        n_domains, n_experts = len(self.outside), self.counts.shape[-1]
        if not len(self.token):
            return torch.zeros((), dtype=torch.float64)
        inside = torch.zeros(int(self.token[-1]) + 1, n_domains, n_experts, dtype=torch.float64)
        inside.view(-1, n_experts).index_add_(0, self.token * n_domains + self.domain, counts)
        size = inside.sum(-1, keepdim=True)
        inside = inside.clamp(min=0)
        inside = inside * (size / inside.sum(-1, keepdim=True)).nan_to_num(0, 0, 0)
        # every domain has the same weight, whatever its size
        p = inside / (inside.sum((0, 2)) + self.outside)[:, None] / n_domains
        entropy = torch.special.entr
        # H(X, E) + H(X, D) − H(X, D, E) − H(X); constants of tokens outside cancel
        return entropy(p.sum(1)).sum() + entropy(p.sum(2)).sum() - entropy(p).sum() - entropy(p.sum((1, 2))).sum()


def _units(results: list[VocabularyResult], layer: int) -> _Units:
    first = results[0]
    unit_keys, experts, counts = [], [], []
    for d, result in enumerate(results):
        group, token, place, expert = result.cells()
        here = place == result.layers.index(layer)
        unit_keys.append((token[here] * len(results) + d) * result.groups + group[here])
        experts.append(expert[here])
        counts.append(result.assigned[here])
    keys, unit = torch.cat(unit_keys).unique(return_inverse=True)
    table = torch.zeros(len(keys), first.n_experts, dtype=torch.float64)
    table.view(-1).index_add_(0, unit * first.n_experts + torch.cat(experts), torch.cat(counts).double())
    domain = keys // first.groups % len(results)
    token = keys // first.groups // len(results)
    kept = _in_two_domains(token, domain)
    total = torch.zeros(len(results), dtype=torch.float64).index_add_(0, domain, table.sum(-1))
    outside = torch.zeros_like(total).index_add_(0, domain[~kept], table[~kept].sum(-1))
    return _Units(
        token=token[kept].unique(return_inverse=True)[1],
        domain=domain[kept],
        group=(keys % (first.groups * len(results)))[kept],
        counts=table[kept],
        outside=outside,
        shared=float((1 - outside / total).mean()),
    )


def _in_two_domains(token: Int[Tensor, " unit"], domain: Int[Tensor, " unit"]) -> Bool[Tensor, " unit"]:
    tokens, place = token.unique(return_inverse=True)
    low = torch.full((len(tokens),), int(domain.max()) + 1).scatter_reduce_(0, place, domain, "amin")
    high = torch.full((len(tokens),), -1).scatter_reduce_(0, place, domain, "amax")
    return (low < high)[place]
