"""From what a study found to verdicts: bounds of quantities over sources, and a rule that answers a claim by them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Real
from torch import Tensor

from moe_lens.resampling import jackknife_interval
from moe_lens.stats import Result, bootstrap
from moe_lens.studies.study_result import StudyResult
from moe_lens.studies.verdict_answers import Bound, OfDomain, Threshold, Verdict

RESAMPLES = 4000
"""Of sources: simultaneous intervals reach far into the tails."""

LEVEL = 0.95

Studies = Mapping[str, StudyResult]
Thresholds = Mapping[str, Threshold]
Times = Float[Tensor, "resample source"]
Statistic = Callable[[Times], Float[Tensor, " resample"]]
R = TypeVar("R", bound=Result)


class NotRun(Exception):
    """Something that a rule needs was not run, or texts do not allow it."""


@dataclass(frozen=True)
class Read:
    """What a study found of one domain; makes bounds that hold for all domains of the row together."""

    study: StudyResult
    domain: str
    thresholds: Thresholds

    @property
    def level(self) -> float:
        """Of one domain's intervals."""
        return 1 - (1 - LEVEL) / len(self.study.results)

    @property
    def plan(self) -> dict[str, Any]:
        """Of the study."""
        return self.study.manifest["plan"]

    @property
    def seed(self) -> int:
        """Of halves and controls."""
        return int(self.plan["settings"].get("seed", 0))

    def result(self, kind: type[R], name: str) -> R:
        """A result of the domain."""
        found = self.study.results[self.domain].get(name)
        if found is None:
            raise NotRun(f"{name} was not run")
        assert isinstance(found, kind)
        return found

    def bound(
        self,
        what: str,
        statistic: Statistic,
        sizes: Real[Tensor, " source"],
        *,
        threshold: str,
        above: bool = False,
        control: bool = False,
        biased: bool = False,
    ) -> Bound:
        """A quantity with its interval; the claim says that it is below the threshold, or above.

        Of one that chance biases, both are the jackknife's, less this bias.
        """
        value = statistic(torch.ones(1, len(sizes), dtype=torch.float64))[0]
        if biased:
            one = torch.zeros(len(sizes), dtype=torch.long)
            without = statistic(1 - torch.eye(len(sizes), dtype=torch.float64))
            ends = jackknife_interval(value, without, one, sizes, corrected=True, level=self.level)
            value = value if ends[0].isnan() else (ends[0] + ends[1]) / 2
            low, high = (None if end.isnan() else float(end) for end in ends)
        else:
            interval = bootstrap(statistic, sizes, level=self.level, resamples=RESAMPLES)
            low, high = (None, None) if interval is None else (interval.low, interval.high)
        return Bound(what, float(value), low, high, above, self.thresholds[threshold], control)

    def beaten(self, what: str, share: float, beside: Bound) -> Bound:
        """The share of random controls that are beaten: nearly all of them, nearly none, or undecided.

        It decides nothing where `beside`, the quantity that controls are compared by, has too few sources for an
        interval.
        """
        at, counted = self.thresholds["controls beaten"], beside.low is not None
        return Bound(what, share, None, None, True, at, control=True, counted=counted)


@dataclass(frozen=True)
class Rule:
    """A claim, and the bounds that answer it in one domain of a study."""

    key: str
    claim: str
    estimate: str
    """What is estimated, and what the inference takes."""
    study: str
    bounds: Callable[[Read], Iterator[Bound]]
    has_number: bool = True

    def __call__(self, studies: Studies, thresholds: Thresholds) -> Verdict:
        """Apply it to every domain."""
        verdict = Verdict(self.key, self.claim, self.estimate, self.has_number)
        result = studies.get(self.study)
        if result is None:
            return replace(verdict, missing=f"the study {self.study} was not run")
        sources = {row["name"]: int(row["sources"]) for row in result.manifest["read"]}
        domains = []
        for name in result.results:
            found: list[Bound] = []
            missing = ""
            try:
                for bound in self.bounds(Read(result, name, thresholds)):
                    found.append(bound)  # noqa: PERF402  # those before something that was not run are kept
            except NotRun as error:
                missing = str(error)
            domains.append(OfDomain(name, sources[name], tuple(found), missing))
        if not any(of.bounds for of in domains):
            return replace(verdict, missing=domains[0].missing)
        return replace(verdict, domains=tuple(domains))
