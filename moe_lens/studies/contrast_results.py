"""What the study `contrast` sums up by unit, and what it says of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.stats import Accumulator, Result, bootstrap_all
from moe_lens.stats.sign_flip_test import beyond_rounding, sign_test
from moe_lens.stats.sums import BySource

PICKED, OPPOSITE, MATCHED = "picked", "opposite", "matched"
SHUFFLES = 100
"""Times that A and B are swapped at random, to see how often the test then finds something."""


@dataclass(frozen=True, eq=False)
class ContrastResult(Result):
    """Sums over pairs, by unit."""

    layers: tuple[int, ...]
    sources: tuple[str, ...]
    """The units."""
    pairs: Int[Tensor, " unit"]
    differences: Float[Tensor, "unit layer n_experts"]
    """Share of the tokens looked at that choose the expert, in A minus in B."""
    shared: Int[Tensor, " unit"]
    """Pairs of which A and B have tokens in common."""
    same: Float[Tensor, "unit layer n_experts"]
    """The same difference at these tokens, each weighing as much in A as in B."""
    mass: Float[Tensor, "unit 2 layer n_experts"]
    """Routing weight in A and in B."""

    def by_unit(self) -> Float[Tensor, "unit layer n_experts"]:
        """Mean difference of each unit's pairs."""
        return self.differences / self.pairs[:, None, None]

    def at_same_tokens(self) -> Float[Tensor, "unit layer n_experts"]:
        """That at common tokens, of the units that have some."""
        some = self.shared > 0
        return self.same[some] / self.shared[some][:, None, None]

    def experts(self, draws: int, seed: int) -> pd.DataFrame:
        """A row per layer and expert, the largest |t| first.

        Columns: layer, expert, difference (mean over units of the share in A minus in B), t, p_value (of the greatest
        |t| of all experts; missing below ten units); same, same_t, same_p_value: likewise at tokens that both have.
        """
        index = pd.MultiIndex.from_product([self.layers, range(self.differences.shape[-1])], names=["layer", "expert"])
        columns: dict[str, Any] = {}
        for prefix, values in (("", self.by_unit()), ("same_", self.at_same_tokens())):
            known = len(values) > 0
            found = sign_test(values if known else self.by_unit()[:1] * 0, draws, seed)
            named = {f"{prefix}t": found.t, f"{prefix}p_value": found.p_values}
            for name, value in {"same" if prefix else "difference": found.mean, **named}.items():
                columns[name] = (value if known else value * torch.nan).flatten().numpy()
        frame = pd.DataFrame(columns, index=index).reset_index()
        return frame.sort_values("t", key=abs, ascending=False, kind="stable", ignore_index=True)

    def test(self, draws: int, seed: int) -> pd.DataFrame:
        """A row for all tokens looked at, and one for tokens that both prompts have.

        Columns: tokens; experts_found (p ≤ .05 once all are counted), shuffled (share of random swaps of A and B in
        which any expert is found), smallest_p; units, pairs; finding.
        """
        rows = []
        for tokens, values, n in (("all", self.by_unit(), self.pairs), ("same", self.at_same_tokens(), self.shared)):
            row: dict[str, Any] = {"tokens": tokens, "units": len(values), "pairs": int(n.sum())}
            if len(values) < 10:
                few = {"experts_found": pd.NA, "shuffled": float("nan"), "smallest_p": float("nan")}
                rows.append(
                    {**row, **few, "finding": f"no test: {len(values)} unit{'s' * (len(values) != 1)}, ten are needed"}
                )
                continue
            found = sign_test(values, draws, seed)
            generator = torch.Generator().manual_seed(seed + 1)
            swaps = torch.randint(2, (SHUFFLES, len(values), 1, 1), generator=generator) * 2.0 - 1
            level = [bool((sign_test(values * swap, 200, seed + 2).p_values <= 0.05).any()) for swap in swaps]
            n_found = int((found.p_values <= 0.05).sum())
            row |= {"experts_found": n_found, "shuffled": sum(level) / SHUFFLES, "smallest_p": found.smallest_p}
            rows.append({**row, "finding": "A and B choose different experts" if n_found else "not rejected"})
        columns = ["tokens", "experts_found", "shuffled", "smallest_p", "units", "pairs", "finding"]
        return pd.DataFrame(rows, columns=columns).astype({"experts_found": "Int64"})

    def to_frame(self) -> pd.DataFrame:
        """A row per layer and expert, as `experts` has them with 1,000 draws."""
        return self.experts(1000, 0)


class ContrastStats(Accumulator[ContrastResult]):
    """Sums differences of pairs, by unit."""

    def __init__(self, layers: Sequence[int], n_experts: int):
        self.layers = tuple(layers)
        self._sums, self._counts = BySource(), BySource()
        about = {"layers": self.layers, "n_experts": n_experts}
        super().__init__(about, {"sums": self._sums, "counts": self._counts})

    @property
    def seen(self) -> bool:
        """Whether there were any pairs."""
        return bool(self._counts.sources)

    def update(
        self,
        differences: Float[Tensor, "pair layer n_experts"],
        same: Float[Tensor, "pair layer n_experts"],
        shared: Bool[Tensor, " pair"],
        mass: Float[Tensor, "pair 2 layer n_experts"],
        units: Sequence[str],
    ) -> Self:
        """Count pairs."""
        self._sums.add(torch.cat([differences[:, None], same[:, None], mass], 1), units)
        self._counts.add(torch.stack([torch.ones_like(shared), shared], 1).long(), units)
        return self

    def result(self) -> ContrastResult:
        """The sums so far."""
        sums, counts = self._sums.stacked(), self._counts.stacked()
        pairs, shared = counts.unbind(1)
        both = (pairs, sums[:, 0]), (shared, sums[:, 1])
        differences, same = (beyond_rounding(values, n[:, None, None]) for n, values in both)
        return ContrastResult(self.layers, self._counts.sources, pairs, differences, shared, same, sums[:, 2:].clone())


@dataclass(frozen=True, eq=False)
class SteerResult(Result):
    """Sums over pairs of answer − foil, by unit."""

    ways: tuple[str, ...]
    kinds: tuple[str, ...]
    """Of the runs after the clean one."""
    sources: tuple[str, ...]
    """The units."""
    pairs: Int[Tensor, " unit"]
    sums: Float[Tensor, "unit way run"]
    """In nats; the first run is clean. NaN where no coalition could be matched."""

    def n_matched(self, way: str) -> int:
        """Matched coalitions of a way that were run in all units."""
        runs = self.sums[:, self.ways.index(way), 1:]
        return int((torch.tensor([kind == MATCHED for kind in self.kinds]) & ~runs.isnan().any(0)).sum())

    def to_frame(self) -> pd.DataFrame:
        """A row for each way and kind.

        Columns: way, kind; clean and steered: answer − foil in nats, mean over pairs; effect, with its 95 % interval
        over units (low, high): how far steering moves it in the expected direction (down where A's experts are
        forbidden in A's prompts, up where they are pushed in B's); beyond, with beyond_low and beyond_high: the effect
        of the picked minus the mean of the matched; beaten: share of matched coalitions whose effect is smaller;
        coalitions (how many were run in all units), units, pairs.
        """
        rows = []
        for at, way in enumerate(self.ways):
            sign = -1 if way == "forbid" else 1
            clean, runs = self.sums[:, at, 0], self.sums[:, at, 1:]
            effects = sign * (runs - clean[:, None])
            run = ~effects.isnan().any(0)
            is_matched = torch.tensor([kind == MATCHED for kind in self.kinds]) & run
            for kind in dict.fromkeys(self.kinds):
                of = torch.tensor([each == kind for each in self.kinds]) & run
                effect = effects[:, of].mean(1)
                row: dict[str, Any] = {"way": way, "kind": kind, "clean": self._mean(clean)}
                row["steered"] = self._mean(runs[:, of].mean(1))
                row |= dict(zip(("effect", "low", "high"), mean_and_ends(effect, self.pairs), strict=True))
                beyond = effect - effects[:, is_matched].mean(1) if kind != MATCHED else effect * torch.nan
                names = ("beyond", "beyond_low", "beyond_high")
                row |= dict(zip(names, mean_and_ends(beyond, self.pairs), strict=True))
                smaller = (effects[:, is_matched].sum(0) < effect.sum()).double().mean()
                row["beaten"] = float(smaller) if kind != MATCHED else float("nan")
                counted = {"coalitions": int(of.sum()), "units": len(self.sources), "pairs": int(self.pairs.sum())}
                rows.append({**row, **counted})
        return pd.DataFrame(rows)

    def _mean(self, sums: Float[Tensor, " unit"]) -> float:
        return float(sums.sum() / self.pairs.sum())


class SteerStats(Accumulator[SteerResult]):
    """Sums outcomes of pairs, by unit."""

    def __init__(self, ways: Sequence[str], kinds: Sequence[str]):
        self.ways, self.kinds = tuple(ways), tuple(kinds)
        self._sums, self._pairs = BySource(), BySource()
        about = {"ways": self.ways, "kinds": self.kinds}
        super().__init__(about, {"sums": self._sums, "pairs": self._pairs})

    @property
    def seen(self) -> bool:
        """Whether there were any pairs."""
        return bool(self._pairs.sources)

    def update(self, outcomes: Float[Tensor, "pair way run"], units: Sequence[str]) -> Self:
        """Count pairs."""
        self._sums.add(outcomes, units)
        self._pairs.add(torch.ones(len(outcomes), dtype=torch.long), units)
        return self

    def result(self) -> SteerResult:
        """The sums so far."""
        return SteerResult(self.ways, self.kinds, self._pairs.sources, self._pairs.stacked(), self._sums.stacked())


def mean_and_ends(sums: Float[Tensor, " unit"], counts: Int[Tensor, " unit"]) -> tuple[float, float, float]:
    """Mean over what was counted, and its 95 % interval over units; NaN below ten of them."""
    mean = float(sums.sum() / counts.sum())
    ends = bootstrap_all(lambda times: (times @ sums) / (times @ counts.double()), counts)
    return (mean, float("nan"), float("nan")) if ends is None else (mean, float(ends[0]), float(ends[1]))
