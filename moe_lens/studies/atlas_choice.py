"""What chooses an expert: domains, tokens, and other experts. Tables from counts alone."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.resampling import bootstrap_all, enough, times_drawn
from moe_lens.stats import (
    ImportanceResult,
    PairResult,
    Result,
    RoutingResult,
    VocabularyResult,
    compare_domains,
)
from moe_lens.studies.frames import by_domain
from moe_lens.studies.localisation_scores import ScoreResult

RARE = 30
"""An expert that fewer tokens chose is too rare for its choices to say anything."""
AT_LEAST = 5
"""Occurrences of a token below which no lift is told; and tokens that two experts share."""
KEPT_TOKENS, KEPT_PARTNERS, KEPT_PAIRS, SENT = 15, 5, 15, 3
RESAMPLES = 1000

R = TypeVar("R", bound=Result)


def of_kind(results: Mapping[str, Mapping[str, Result]], name: str, kind: type[R]) -> dict[str, R]:
    """One result of each domain."""
    found: dict[str, R] = {}
    for domain, of in results.items():
        result = of[name]
        assert isinstance(result, kind)
        found[domain] = result
    return found


def tables(results: Mapping[str, Mapping[str, Result]], *, seed: int) -> dict[str, pd.DataFrame]:
    """`experts`, `domains`, `tokens`, `sent`, `partners` and `pairs`."""
    routing = of_kind(results, "routing", RoutingResult)
    tokens = of_kind(results, "tokens", VocabularyResult)
    effects = of_kind(results, "first_order", ScoreResult)
    layers = next(iter(routing.values())).layers
    counts = {layer: Choices.of(tokens, layer) for layer in layers}
    pooled = pooled_pairs(of_kind(results, "pairs", PairResult))
    return {
        "experts": _experts(results, routing, counts, effects),
        "domains": _domains(routing, counts, effects, seed),
        "tokens": pd.concat([counts[layer].choosing(layer) for layer in layers], ignore_index=True),
        "sent": pd.concat([counts[layer].sent(layer) for layer in layers], ignore_index=True),
        "partners": partners(pooled),
        "pairs": strongest_pairs(pooled),
    }


class Choices:
    """Which tokens chose which experts of a layer, by domain."""

    def __init__(
        self,
        tokens: Int[Tensor, " token"],
        assigned: Int[Tensor, "domain token n_experts"],
        occurred: Int[Tensor, "domain token"],
    ):
        self.tokens, self.assigned, self.occurred = tokens, assigned, occurred
        self.together, self.in_all = assigned.sum(0), occurred.sum(0)

    @classmethod
    def of(cls, results: Mapping[str, VocabularyResult], layer: int) -> "Choices":
        """Of all tokens that occurred in any domain."""
        found = [result.table(layer) for result in results.values()]
        union = torch.cat([tokens for tokens, _ in found]).unique()
        assigned = torch.zeros(len(found), len(union), found[0][1].shape[-1], dtype=torch.long)
        occurred = torch.zeros(len(found), len(union), dtype=torch.long)
        for number, (tokens, counts) in enumerate(found):
            at = torch.searchsorted(union, tokens)
            assigned[number, at], occurred[number, at] = counts[0], counts[1].sum(-1)
        return cls(union, assigned, occurred)

    def token_alone(self) -> Float[Tensor, "domain n_experts"]:
        """Share of each domain's tokens, if every token chose as it does in all domains together."""
        chance = self.together.double() / self.in_all[:, None]
        return (self.occurred.double() @ chance) / self.occurred.sum(1, keepdim=True)

    def entropy(self) -> Float[Tensor, " n_experts"]:
        """Entropy in nats of the tokens that chose each expert; NaN for those that none chose."""
        share = self.together.double() / self.together.sum(0)
        return torch.special.entr(share).sum(0)

    def lift(self) -> Float[Tensor, "token n_experts"]:
        """Share of a token's occurrences that chose the expert, over the share of all tokens that did."""
        base = self.together.sum(0).double() / self.in_all.sum()
        return self.together.double() / self.in_all[:, None] / base

    def choosing(self, layer: int) -> pd.DataFrame:
        """For each expert the tokens that add most to its divergence from the base rate, n ln(lift), greatest first.

        Columns: layer, expert, place, token, assigned (how often it chose the expert), occurred, lift. Of tokens that
        occurred `AT_LEAST` times, chosen above the base rate.
        """
        lift = self.lift()
        gain = (self.together.double() * lift.log()).nan_to_num(0, 0, 0)
        gain[self.in_all < AT_LEAST] = 0
        best, row = gain.T.topk(min(KEPT_TOKENS, len(self.tokens)), dim=1)
        expert, place = (best > 0).nonzero().unbind(-1)
        at = row[expert, place]
        columns = {
            "layer": layer,
            "expert": expert.numpy(),
            "place": place.numpy(),
            "token": self.tokens[at].numpy(),
            "assigned": self.together[at, expert].numpy(),
            "occurred": self.in_all[at].numpy(),
            "lift": lift[at, expert].numpy(),
        }
        return pd.DataFrame(columns)

    def sent(self, layer: int) -> pd.DataFrame:
        """For each token the experts that it chose most often: layer, token, expert, assigned, occurred.

        Of those chosen equally often, the ones that fewer tokens choose come first.
        """
        base = self.together.sum(0).double() / self.together.sum()
        expert = (self.together - base / 2).topk(min(SENT, self.together.shape[1]), dim=1).indices
        best = self.together.gather(1, expert)
        row, place = (best > 0).nonzero().unbind(-1)
        columns = {
            "layer": layer,
            "token": self.tokens[row].numpy(),
            "expert": expert[row, place].numpy(),
            "assigned": best[row, place].numpy(),
            "occurred": self.in_all[row].numpy(),
        }
        return pd.DataFrame(columns)


def _experts(
    results: Mapping[str, Mapping[str, Result]],
    routing: Mapping[str, RoutingResult],
    counts: Mapping[int, Choices],
    effects: Mapping[str, ScoreResult],
) -> pd.DataFrame:
    """A row per layer and expert, over the tokens of all domains together.

    Columns: assigned, top1, tokens; share, weight (mean where chosen), entropy (of the tokens that chose it, nats),
    relative_norm, max_activation, super_expert (see `stats.SCORES`), saved (nats a token, first order) and
    predicted; rare: fewer than `RARE` tokens chose it.
    """
    assigned, top1, weights = (
        torch.stack([getattr(of, name).sum(0) for of in routing.values()]).sum(0)
        for name in ("assignments", "top1", "weights")
    )
    n = sum(of.n_tokens for of in routing.values())
    parts = list(of_kind(results, "importance", ImportanceResult).values())
    importance = replace(
        parts[0],
        n_tokens=n,
        routed=torch.stack([of.routed for of in parts]).sum(0),
        sums=torch.stack([of.sums for of in parts]).sum(0),
        greatest=torch.stack([of.greatest for of in parts]).amax(0),
    )
    predicted = sum(int(of.predicted.sum()) for of in effects.values())
    columns = {
        "assigned": assigned,
        "top1": top1,
        "share": assigned.double() / n,
        "weight": weights / assigned,
        "entropy": torch.stack([of.entropy() for of in counts.values()]),
        "relative_norm": importance.score("relative_norm").masked_fill(assigned == 0, torch.nan),
        "max_activation": importance.score("max_activation"),
        "super_expert": importance.super_experts(),
        "saved": torch.stack([of.saved.sum(0) for of in effects.values()]).sum(0) / predicted,
        "rare": assigned < RARE,
    }
    index = pd.MultiIndex.from_product([counts, range(assigned.shape[1])], names=["layer", "expert"])
    frame = pd.DataFrame({name: value.flatten().numpy() for name, value in columns.items()}, index=index)
    return frame.reset_index().assign(tokens=n, predicted=predicted)


def _domains(
    routing: Mapping[str, RoutingResult],
    counts: Mapping[int, Choices],
    effects: Mapping[str, ScoreResult],
    seed: int,
) -> pd.DataFrame:
    """A row per domain, layer and expert.

    Columns: assigned, tokens, sources; share, low, high (95 % over sources); uniform and token_alone, what the share
    would be if all experts were alike, and if a token chose as it does in all domains; difference (from the mean of the
    other domains), p_value (maxT, corrected for all domains, layers and experts; missing where not tested); first
    (share of resamples of all sources in which the expert is its layer's foremost); saved, saved_low, saved_high (nats
    a token, first order) and predicted.
    """
    frames = {}
    firsts = first_in_resamples(routing, seed=seed)
    alone = torch.stack([of.token_alone() for of in counts.values()], 1)  # [domain, layer, expert]
    for number, (domain, of) in enumerate(routing.items()):
        frame = of.to_frame().drop(columns=["top1", "weight"])
        score = effects[domain]
        saved, predicted = score.saved, score.predicted.double()

        def mean(times: Tensor, saved: Tensor = saved, predicted: Tensor = predicted) -> Tensor:
            return torch.einsum("rs,sle->rle", times, saved) / (times @ predicted)[:, None, None]

        total = saved.sum(0) / predicted.sum()
        ends = bootstrap_all(mean, score.predicted, resamples=RESAMPLES)
        low, high = (torch.full_like(total, torch.nan),) * 2 if ends is None else ends
        more = {"token_alone": alone[number], "first": firsts[number], "saved": total}
        more |= {"saved_low": low, "saved_high": high}
        frame = frame.assign(**{name: value.flatten().numpy() for name, value in more.items()})
        frames[domain] = frame.assign(
            uniform=of.baseline, sources=len(of.sources), predicted=int(score.predicted.sum())
        )
    frame = by_domain(frames)
    if len(routing) == 1:
        return frame.assign(difference=np.nan, p_value=np.nan)
    tests = compare_domains(routing, seed=seed).to_frame()
    p_value = tests["p_value"].where(tests["statistic"] != 0)
    return frame.assign(difference=tests["difference"], p_value=p_value)


def first_in_resamples(routing: Mapping[str, RoutingResult], *, seed: int) -> Float[Tensor, "domain layer n_experts"]:
    """Share of resamples in which an expert is a layer's foremost for a domain, as `atlas_knockouts.worth` has it.

    Sources of every domain are drawn with replacement; NaN where one of the domains has fewer than `MIN_SOURCES`.
    """
    first = next(iter(routing.values()))
    shape = len(routing), *first.specialisation.shape
    if not all(bool(enough(of.tokens)) for of in routing.values()):
        return torch.full(shape, torch.nan, dtype=torch.float64)
    times = [times_drawn(len(of.sources), RESAMPLES, seed + i) for i, of in enumerate(routing.values())]
    found = torch.zeros(shape, dtype=torch.float64)
    for row in range(shape[1]):
        shares = torch.stack(
            [
                (drawn @ of.assignments[:, row].double()) / (drawn @ of.tokens.double())[:, None]
                for drawn, of in zip(times, routing.values(), strict=True)
            ]
        )
        others = (shares.sum(0) - shares) / max(1, len(shares) - 1)
        best = (shares - others).argmax(-1, keepdim=True)
        found[:, row] = torch.zeros_like(shares).scatter(-1, best, 1).mean(1)
    return found


def pooled_pairs(results: Mapping[str, PairResult]) -> PairResult:
    """The counts of all domains together; sources keep the domain before their name."""
    parts = list(results.values())
    summed = {
        name: torch.stack([getattr(of, name) for of in parts]).sum(0)
        for name in ("together", "onwards", "left", "right")
    }
    joined = {name: torch.cat([getattr(of, name) for of in parts]) for name in ("neighbours", "kept")}
    sources = tuple(f"{domain}/{source}" for domain, of in results.items() for source in of.sources)
    return replace(parts[0], n_tokens=sum(of.n_tokens for of in parts), sources=sources, **summed, **joined)


def partners(pairs: PairResult) -> pd.DataFrame:
    """For each expert those that go with it: in its layer ("with"), in the layer before, and in the next ("after").

    Columns: kind, layer, expert, place, other_layer, other, tokens (that chose both), lift. Ordered by n ln(lift); of
    pairs that share `AT_LEAST` tokens, above what independent choices would give.
    """
    frames = []
    itself = torch.eye(pairs.together.shape[-1], dtype=torch.bool)
    for row, layer in enumerate(pairs.layers):
        found = [("with", layer, pairs.together[row].masked_fill(itself, 0), pairs.coactivation_lift[row])]
        if row > 0:
            counts, lift = pairs.onwards[row - 1], pairs.transition_lift[row - 1]
            found.append(("before", pairs.layers[row - 1], counts.T, lift.T))
        if row + 1 < len(pairs.layers):
            found.append(("after", pairs.layers[row + 1], pairs.onwards[row], pairs.transition_lift[row]))
        for kind, other_layer, counts, lift in found:
            gain = (counts.double() * lift.log()).nan_to_num(0, 0, 0).masked_fill(counts < AT_LEAST, 0)
            best, other = gain.topk(min(KEPT_PARTNERS, gain.shape[1]), dim=1)
            expert, place = (best > 0).nonzero().unbind(-1)
            others = other[expert, place]
            columns = {
                "kind": kind,
                "layer": layer,
                "expert": expert.numpy(),
                "place": place.numpy(),
                "other_layer": other_layer,
                "other": others.numpy(),
                "tokens": counts[expert, others].numpy(),
                "lift": lift[expert, others].numpy(),
            }
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def strongest_pairs(pairs: PairResult) -> pd.DataFrame:
    """For each layer the pairs of experts that most tokens choose, and those that go together most beyond chance.

    Columns: layer, expert, other (the greater id), tokens (that chose both), of (tokens in all), lift (over independent
    choices), by_tokens and by_lift: places in the order of tokens, and in that of n ln(lift), among the first
    `KEPT_PAIRS` of which every row is in one or both, missing in the other. Of pairs that share `AT_LEAST` tokens.
    """
    frames = []
    upper = torch.ones(pairs.together.shape[1:], dtype=torch.bool).triu(1)
    first, second = upper.nonzero().unbind(-1)
    for row, layer in enumerate(pairs.layers):
        tokens, lift = pairs.together[row][upper], pairs.coactivation_lift[row][upper]
        gain = (tokens.double() * lift.log()).nan_to_num(0, 0, 0)
        columns: dict[str, object] = {"layer": layer, "expert": first.numpy(), "other": second.numpy()}
        columns |= {"tokens": tokens.numpy(), "of": pairs.n_tokens, "lift": lift.numpy()}
        frame = pd.DataFrame(columns)
        kept = (tokens >= AT_LEAST).numpy()
        for name, order in (("by_tokens", tokens.double()), ("by_lift", gain)):
            place = pd.Series(order.numpy()).where(kept & (order > 0).numpy()).rank(ascending=False, method="first")
            frame[name] = (place - 1).where(place <= KEPT_PAIRS).astype("Int64")
        frames.append(frame[frame["by_tokens"].notna() | frame["by_lift"].notna()])
    return pd.concat(frames, ignore_index=True)
