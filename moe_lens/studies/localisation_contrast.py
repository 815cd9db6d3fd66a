"""Is what a coalition does to its own domain more than what it does to others, and more than other coalitions do?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.resampling import ends_of, enough, jackknife_variance, tail, tail_of
from moe_lens.stats.parallel_sources import blocks_left_out, resampled_blocks
from moe_lens.studies.held_against import over_each
from moe_lens.studies.localisation_effects import CoalitionEffects
from moe_lens.studies.matched_coalitions import KINDS, MATCHED, PICKED, Coalitions, beaten

HELD = ("control_least", "control_most", "over_most", "beyond_low", "beyond_high", "all_low", "all_high")


@dataclass(frozen=True, eq=False)
class Contrasts:
    """Everything that is said of coalitions, from sums by source."""

    effects: Mapping[str, CoalitionEffects]
    """By the domain that was read."""
    coalitions: Mapping[str, tuple[Coalitions, Coalitions]]
    """By the domain that they are for: those taken out of half 0, and out of half 1."""
    blocks: Mapping[str, Mapping[str, str]]
    """The block of each source: parallel sources are resampled together."""

    def contrast(self, level: float = 0.95) -> pd.DataFrame:
        """The contrast of the picked experts minus that of each kind of control: a row per domain, how and control.

        A contrast is Δ own − mean Δ of the other domains, Δ the nats a token that the loss grows by without the
        experts. Columns: estimate (contrast of the picked minus the mean contrast of the controls) with low and high,
        its interval over all sources at `level`; contrast, contrast_low, contrast_high: that of the picked by itself;
        control_least and control_most, the least and the greatest contrast of a control, and over_most, that of the
        picked minus the greatest; all_low and all_high, ends for `contrast`, and beyond_low and beyond_high, for the
        estimate, which are the jackknife's and hold for all domains and ways together, whatever `level`; starred:
        whether both are shown to be above 0 so, and over_most is, too (see `_held`);
        beaten, the share of controls whose contrast
        is below that of the picked, ties by half; controls, how many there are (0: none could be matched; then the
        estimate is missing); own and others, Δ of the picked, control_own and control_others, mean Δ of the controls;
        experts and control_experts, how many are taken out, and mass and control_mass, the share of the domain's
        routing weight that they carry, means over both halves; sources and tokens of the domain.
        """
        rows = [row for how in self._how for domain in self.effects for row in self._rows(domain, how, level)]
        return pd.DataFrame(rows).astype({"starred": "boolean"})

    def by_domain_read(self, level: float = 0.95) -> pd.DataFrame:
        """Δ of each kind of coalition in each domain: a row per domain that they are for, how, kind and domain read.

        Columns: added (nats a token, mean over the coalitions of the kind) with low and high, its interval; ratio, of
        perplexities, exp(added); tokens, the greatest number that one of the coalitions was read on; sources.
        """
        rows = []
        kinds = next(iter(self.effects.values())).kinds
        for how in self._how:
            for domain in self.effects:
                for read, values in self._weighed(domain, how, self._times).items():
                    for kind in KINDS:
                        at = [i for i, k in enumerate(kinds) if k == kind and self._there(domain)[i]]
                        if not at:
                            continue
                        mean = values[:, at].nanmean(1)
                        low, high = self._interval(mean, tail(self.effects[read].predicted, level))
                        tokens = self.effects[read].of(how)[1][:, self._number(domain)][:, at].sum(0).max()
                        if int(tokens) == 0:
                            continue
                        rows.append(
                            {"domain": domain, "how": how, "coalition": kind, "read": read, "added": float(mean[0]),
                             "low": low, "high": high, "ratio": float(mean[0].exp()), "tokens": int(tokens),
                             "sources": len(self.effects[read].sources)}
                        )  # fmt: skip
        return pd.DataFrame(rows)

    @property
    def _how(self) -> tuple[str, ...]:
        return next(iter(self.effects.values())).how

    def _number(self, domain: str) -> int:
        return list(self.effects).index(domain)

    def _there(self, domain: str) -> list[bool]:
        """Whether each coalition is there in both halves."""
        return (
            self.coalitions[domain][0].members.any((1, 2)) & self.coalitions[domain][1].members.any((1, 2))
        ).tolist()

    def _weighed(
        self, domain: str, how: str, times: Mapping[str, Float[Tensor, "resample source"]]
    ) -> dict[str, Float[Tensor, "all_and_resample variant"]]:
        """Δ of each of a domain's coalitions in every domain: of all sources, then where each counts so many times."""
        found = {}
        for read, effects in self.effects.items():
            added, tokens = (value[:, self._number(domain)].double() for value in effects.of(how))
            of = torch.cat([torch.ones(1, len(effects.sources), dtype=torch.float64), times[read]])
            found[read] = (of @ added) / (of @ tokens)
        return found

    @cached_property
    def _times(self) -> dict[str, Float[Tensor, "resample source"]]:
        return resampled_blocks({d: {s: self.blocks[d][s] for s in of.sources} for d, of in self.effects.items()})

    @cached_property
    def _but_one(self) -> tuple[dict[str, Float[Tensor, "block source"]], Int[Tensor, " block"]]:
        """How often each source counts where a block is left out, and the stratum of each block."""
        return blocks_left_out({d: {s: self.blocks[d][s] for s in of.sources} for d, of in self.effects.items()})

    @cached_property
    def _block_tokens(self) -> Float[Tensor, "block domain"]:
        """Of each block, in each domain; in the order of `_but_one`."""
        but_one = self._but_one[0]
        return torch.stack([(1 - but_one[d]) @ of.predicted.double() for d, of in self.effects.items()], 1)

    def _rows(self, domain: str, how: str, level: float) -> Iterator[dict[str, Any]]:
        own, others = _own_and_others(self._weighed(domain, how, self._times), domain)
        but_one = torch.sub(*_own_and_others(self._weighed(domain, how, self._but_one[0]), domain))[1:]
        kinds = next(iter(self.effects.values())).kinds
        picked = kinds.index(PICKED)
        there = self._there(domain)
        size, mass = self._sizes(domain)
        for control in KINDS:
            if control == PICKED:
                continue
            at = [i for i, kind in enumerate(kinds) if kind == control and there[i] and bool(own[0, i].isfinite())]
            if control != MATCHED and not at:
                continue
            contrasts = (own - others)[:, at]
            mine, mine_but_one = (own - others)[:, picked], but_one[:, picked]
            difference = mine - contrasts.nanmean(1)  # from no controls, missing
            low, high = self._interval(difference, self._tail(mine_but_one - but_one[:, at].nanmean(1), level))
            held = self._held(torch.cat([(own - others)[:1], but_one]), picked, at) if at else {}
            mine_low, mine_high = self._interval(mine, self._tail(mine_but_one, level))
            yield {
                "domain": domain,
                "how": how,
                "control": control,
                "estimate": float(difference[0]),
                "low": low,
                "high": high,
                "contrast": float(mine[0]),
                "contrast_low": mine_low,
                "contrast_high": mine_high,
                **{name: held.get(name, float("nan")) for name in HELD},
                "starred": held.get("starred"),
                "beaten": beaten(contrasts[0], float(mine[0])) if at else float("nan"),
                "controls": len(at),
                "own": float(own[0, picked]),
                "others": float(others[0, picked]),
                "control_own": _mean(own[0, at]),
                "control_others": _mean(others[0, at]),
                "experts": float(size[picked]),
                "control_experts": _mean(size[at]),
                "mass": float(mass[picked]),
                "control_mass": _mean(mass[at]),
                "sources": len(self.effects[domain].sources),
                "tokens": int(self.effects[domain].predicted.sum()),
            }

    def _held(
        self, contrasts: Float[Tensor, "all_and_block variant"], picked: int, controls: Sequence[int]
    ) -> dict[str, Any]:
        """The picked held against their controls, as the atlas holds experts (see `held_against`), but in one point.

        Each control reads a part of the other domains' texts only, so that an interval beside a single one would be
        that of the part. The interval that has to leave out 0 is therefore of what the picked have beyond the mean of
        the controls; beyond the costliest of them they need to have something.

        Args:
            contrasts: Of every coalition, from all sources first, then without each block of them.
            picked: Which coalition is held against the others.
            controls: Those others.
        """
        theirs = contrasts[:, list(controls)]
        two = torch.stack([contrasts[:, picked], theirs.nanmean(1)], 1)
        found = over_each(two[0], two[1:], self._but_one[1], self._block_tokens, len(self.effects) * len(self._how))
        held = {"beyond_low": found["over_most_low"], "beyond_high": found["over_most_high"]}
        held |= {"all_low": found["all_low"], "all_high": found["all_high"]}
        each = theirs[0][theirs[0].isfinite()]
        held |= {"control_least": float(each.min()), "control_most": float(each.max())}
        held["over_most"] = float(two[0, 0]) - held["control_most"]
        starred = found["starred"]
        return held | {"starred": None if starred is None else starred and held["over_most"] > 0}

    def _sizes(self, domain: str) -> tuple[Float[Tensor, " variant"], Float[Tensor, " variant"]]:
        """Experts and routing weight of each coalition, means over both halves."""
        of = self.coalitions[domain]
        size = torch.stack([c.members.sum((1, 2)).double() for c in of]).mean(0)
        return size, torch.stack([c.mass for c in of]).mean(0)

    def _tail(self, without: Float[Tensor, " block"], level: float) -> Float[Tensor, ""]:
        """See `tail`; as many sources count as the domains have in which the statistic varies."""
        return tail_of(1 + jackknife_variance(without, self._but_one[1], self._block_tokens)[1], level)

    def _interval(self, values: Float[Tensor, " all_and_resample"], beyond: Float[Tensor, ""]) -> tuple[float, float]:
        """Ends over the resamples, which follow the value of all sources; missing with too few sources somewhere."""
        known = all(bool(enough(of.predicted)) for of in self.effects.values())
        if not known or not bool(values.isfinite().any()):
            return float("nan"), float("nan")
        low, high = ends_of(values[1:], beyond).tolist()
        return low, high


def _own_and_others(
    deltas: Mapping[str, Float[Tensor, "resample variant"]], domain: str
) -> tuple[Float[Tensor, "resample variant"], Float[Tensor, "resample variant"]]:
    """Δ in the domain itself, and its mean over the others."""
    return deltas[domain], torch.stack([values for read, values in deltas.items() if read != domain]).nanmean(0)


def _mean(values: Tensor) -> float:
    return float(values.nanmean()) if values.numel() else float("nan")


def table(
    domains: Mapping[str, tuple[Coalitions, Coalitions]], layers: Sequence[int], kinds: Sequence[tuple[str, int]]
) -> pd.DataFrame:
    """Who is in the coalitions: a row for every expert.

    Columns: domain, out_of (the half of the sources that it is taken out of), coalition, number, layer, expert.
    """
    rows = [
        {"domain": domain, "out_of": half, "coalition": kind, "number": number, "layer": layers[row], "expert": expert}
        for domain, halves in domains.items()
        for half, of in enumerate(halves)
        for (kind, number), members in zip(kinds, of.members, strict=True)
        for row, expert in members.nonzero().tolist()
    ]
    return pd.DataFrame(rows, columns=["domain", "out_of", "coalition", "number", "layer", "expert"])
