"""The study `routing`: which experts each domain's tokens are sent to (arXiv 2603.05806, Figure 1)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd

from moe_lens.data import TokenBatch
from moe_lens.stats import PairResult, PairStats, Result, RoutingResult, RoutingStats
from moe_lens.studies.frames import by_domain
from moe_lens.studies.running import observed
from moe_lens.studies.study import Gathered, Study


@dataclass(frozen=True)
class RoutingStudy(Study):
    """Load, specialisation and its intervals, co-activation, transitions between layers, persistence, and tests."""

    name: ClassVar[str] = "routing"
    passes: ClassVar[tuple[str, ...]] = ("routing",)

    def begin(self, model: Any, name: str) -> Gathered:  # noqa: ARG002
        """Counts of experts, and of pairs of them."""
        size = model.moe_layers, model.n_experts, model.top_k
        return {"routing": RoutingStats(*size), "pairs": PairStats(*size)}

    def step(
        self,
        model: Any,
        name: str,  # noqa: ARG002
        batch: TokenBatch,
        into: Gathered,
        prepared: Any,  # noqa: ARG002
    ) -> None:
        """One forward pass."""
        routed = observed(model, batch)
        for name in ("routing", "pairs"):
            into[name].update(routed)

    def results(self, earlier: Mapping[str, Gathered]) -> dict[str, Result]:
        """Both results."""
        return {name: earlier["routing"][name].result() for name in ("routing", "pairs")}

    def tables(
        self,
        model: Mapping[str, Any],  # noqa: ARG002
        results: Mapping[str, Mapping[str, Result]],
    ) -> dict[str, pd.DataFrame]:
        """`specialisation`, `most_specialised`, `layers`, `pairs`, `persistence`."""
        routing = {name: of["routing"] for name, of in results.items()}
        pairs = {name: of["pairs"] for name, of in results.items()}
        return {
            "specialisation": by_domain({name: of.to_frame() for name, of in routing.items()}),
            "most_specialised": by_domain({name: _routing(of).most_specialised() for name, of in routing.items()}),
            "layers": by_domain({name: _routing(of).per_layer() for name, of in routing.items()}),
            "pairs": by_domain({name: of.to_frame() for name, of in pairs.items()}),
            "persistence": by_domain({name: _pairs(of).persistence() for name, of in pairs.items()}),
        }


def _routing(result: Result) -> RoutingResult:
    assert isinstance(result, RoutingResult)
    return result


def _pairs(result: Result) -> PairResult:
    assert isinstance(result, PairResult)
    return result
