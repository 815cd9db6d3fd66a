"""One expert against the ensemble: cosines with controls, perplexity by k (Figure 3 of arXiv 2603.05806)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from moe_lens import names
from moe_lens.data import TokenBatch, Tokens
from moe_lens.protocols import require_stream_width
from moe_lens.routing import output_factors
from moe_lens.stats import ActivationMeans, LossResult, LossStats, Means, SimilarityResult, SimilarityStats, halves
from moe_lens.studies.forward_passes import Hooks, each_layer, losses, nothing, predicted
from moe_lens.studies.frames import by_domain


def passes(top_k: int) -> int:
    """How many times every batch is read: means, similarity, and k = 0 … top_k − 1 twice."""
    return 2 + 2 * top_k


@dataclass(frozen=True, eq=False)
class SingleExpert:
    """Results of every domain."""

    similarity: Mapping[str, SimilarityResult]
    dropped: Mapping[str, tuple[LossResult, ...]]
    """Losses with the k experts of largest weight in every layer, the others' weights set to 0; k = 0 … top_k."""
    replaced: Mapping[str, tuple[LossResult, ...]]
    """The same with the other experts' outputs replaced by their means, their weights kept."""
    apart: Mapping[str, bool]
    """Whether means were estimated on other sources than those evaluated; False where a domain has a single source."""

    def similarity_frame(self) -> pd.DataFrame:
        """One row per domain, layer and measure: mean, interval, tokens, sources."""
        return by_domain({name: result.to_frame() for name, result in self.similarity.items()})

    def perplexity_frame(self) -> pd.DataFrame:
        """One row per domain, treatment of the other experts ("dropped", "replaced") and number k of experts kept.

        Columns: loss (nats per token), perplexity, its interval, geometric_perplexity (every window counting the same,
        as the paper's authors average), ratio to all experts, its paired interval, tokens, sources.
        """
        rows = []
        for treatment, results in (("dropped", self.dropped), ("replaced", self.replaced)):
            for domain, by_k in results.items():
                for k, result in enumerate(by_k):
                    alone, ratio = result.interval(), result.ratio_interval(by_k[-1])
                    rows.append(
                        {
                            "domain": domain,
                            "others": treatment,
                            "k": k,
                            "loss": result.loss,
                            "perplexity": result.perplexity,
                            "low": alone.low if alone else None,
                            "high": alone.high if alone else None,
                            "geometric_perplexity": result.geometric_perplexity,
                            "ratio": result.ratio(by_k[-1]),
                            "ratio_low": ratio.low if ratio else None,
                            "ratio_high": ratio.high if ratio else None,
                            "tokens": result.n_tokens,
                            "sources": len(result.sources),
                        }
                    )
        return pd.DataFrame(rows)


class _CrossFit:
    """Means of either half of a domain's sources; a row is given those of the half that it does not belong to."""

    def __init__(self, model: Any, domain: Tokens, on_batch: Callable[[], None]):
        self.half = halves(domain.sources)
        self.apart = len(domain.sources) > 1
        require_stream_width(model, "means of their outputs")
        size = model.moe_layers, model.n_experts, model.top_k, model.cfg.d_model
        stats = [ActivationMeans(*size) for _ in range(2 if self.apart else 1)]
        wanted = [names.RESID_MID, names.EXPERT_INDICES, names.ROUTING_WEIGHTS, names.EXPERT_OUT]
        for batch in domain:
            member = torch.tensor([self.half[source] for source in batch.sources])[:, None]

            def update(layer: int, of: dict[str, Tensor], batch: TokenBatch = batch, member: Tensor = member) -> None:
                resid, indices, weights, outputs = (of[name].cpu() for name in wanted)
                weights = output_factors(weights, model.family)
                for number, accumulator in enumerate(stats):
                    accumulator.update(layer, resid, outputs, weights, indices, batch.counted & (member == number))

            losses(model, batch, each_layer(model, wanted, update))
            on_batch()
        self.means = [accumulator.result() for accumulator in stats]

    def of_rows(self, batch: TokenBatch) -> list[Means]:
        """The means for each row."""
        return [self.means[1 - self.half[source] if self.apart else 0] for source in batch.sources]

    def replaced(self, model: Any, batch: TokenBatch, k: int) -> Hooks:
        """All experts of a token but the k of largest weight replaced by their means, in all layers."""
        halves = [self.half[source] if self.apart else 0 for source in batch.sources]
        hooks: Hooks = []
        for half in sorted(set(halves)):
            rows = torch.tensor([of_row == half for of_row in halves])[:, None].expand(batch.tokens.shape)
            means = self.means[1 - half if self.apart else 0].per_expert
            ranks = range(k, model.top_k)
            hooks += model.ablate(ranks=ranks, how="mean", reference=means, where=rows).fwd_hooks
        return hooks


def single_expert(model: Any, domains: Sequence[Tokens], *, on_batch: Callable[[], None] = nothing) -> SingleExpert:
    """Compare one expert with all active ones: in direction, and in what the others are worth to the loss.

    Means, which centre the cosines and stand in for dropped experts, are those of the domain's other half of sources.

    Args:
        model: A `HookedMoE`.
        domains: The texts.
        on_batch: Called after every batch, `passes(top_k)` times for each.
    """
    similarity, dropped, replaced, apart = {}, {}, {}, {}
    for domain in domains:
        crossfit = _CrossFit(model, domain, on_batch)
        cosines, whole = SimilarityStats(model.moe_layers), LossStats()
        for batch in domain:
            means = crossfit.of_rows(batch)

            def update(
                layer: int, of: dict[str, Tensor], batch: TokenBatch = batch, means: list[Means] = means
            ) -> None:
                resid, parts = of[names.RESID_MID], of[names.EXPERT_WEIGHTED]
                cosines.update(layer, resid, parts, batch.counted, batch.sources, means)  # noqa: B023

            nats = losses(model, batch, each_layer(model, [names.RESID_MID, names.EXPERT_WEIGHTED], update))
            whole.update(nats, predicted(batch), batch.sources)
            on_batch()
        similarity[domain.domain], apart[domain.domain] = cosines.result(), crossfit.apart
        for results, filled in ((dropped, False), (replaced, True)):
            fewer = [LossStats() for _ in range(model.top_k)]
            for batch in domain:
                for k, stats in enumerate(fewer):
                    hooks = crossfit.replaced(model, batch, k) if filled else model.keep_top(k).fwd_hooks
                    stats.update(losses(model, batch, hooks), predicted(batch), batch.sources)
                    on_batch()
            results[domain.domain] = (*(stats.result() for stats in fewer), whole.result())
    return SingleExpert(similarity, dropped, replaced, apart)
