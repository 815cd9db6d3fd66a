"""Which experts the domains are sent to (arXiv 2603.05806, Figure 1)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moe_lens.data import Tokens
from moe_lens.stats import RoutingResult, RoutingStats, observe
from moe_lens.studies.forward_passes import nothing
from moe_lens.studies.frames import by_domain

PASSES = 1
"""How many times every batch is read."""


@dataclass(frozen=True, eq=False)
class Specialisation:
    """Routing counts of every domain."""

    domains: Mapping[str, RoutingResult]

    def to_frame(self) -> pd.DataFrame:
        """One row per domain, layer and expert: assigned, tokens, share (in [0, 1])."""
        return by_domain({name: result.to_frame() for name, result in self.domains.items()})

    def most_specialised(self) -> pd.DataFrame:
        """One row per domain and layer: see `RoutingResult.most_specialised`."""
        return by_domain({name: result.most_specialised() for name, result in self.domains.items()})

    def coverage(self, share: float = 0.5) -> pd.DataFrame:
        """One row per domain and layer: how many experts together take `share` of the assignments."""
        return by_domain(
            {
                name: pd.DataFrame({"layer": result.layers, "experts": result.experts_covering(share).tolist()})
                for name, result in self.domains.items()
            }
        )


def specialisation(model: Any, domains: Sequence[Tokens], *, on_batch: Callable[[], None] = nothing) -> Specialisation:
    """Count which experts each domain's tokens are sent to.

    Args:
        model: A `HookedMoE`.
        domains: The texts.
        on_batch: Called after every batch, for progress.
    """
    results = {}
    for domain in domains:
        stats = RoutingStats(model.moe_layers, model.n_experts, model.top_k)
        for batch in domain:
            stats.update(observe(model, batch))
            on_batch()
        results[domain.domain] = stats.result()
    return Specialisation(results)
