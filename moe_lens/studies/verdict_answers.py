"""Bounds, thresholds and answers: what verdicts are made of. `moe_lens.studies.verdicts` says what they mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Answer = Literal["holds", "contradicted", "undecided"]
HOLDS: Answer = "holds"
CONTRADICTED: Answer = "contradicted"
UNDECIDED: Answer = "undecided"

NO_DAGGER = "no †"

ROUNDING = 1e-12
"""Of shares of some dozens of controls: .1 is more than 1 − .9 in floating point."""

FACTORS = (0.5, 1.0, 2.0)
"""Distances of a † threshold from what it is measured from, at which verdicts are also shown."""


@dataclass(frozen=True)
class Threshold:
    """Where a bound is drawn."""

    value: float
    origin: float
    """What the distance of the threshold is measured from: the value of a perfect, or an absent, effect."""
    ours: bool = False
    """Whether it is ours (†), not the paper's."""
    strict: bool = False
    """Whether the threshold itself is on the other side."""

    def at(self, factor: float) -> float:
        """The threshold at so many times its distance; the paper's own stay where they are."""
        return self.origin + factor * (self.value - self.origin) if self.ours else self.value


THRESHOLDS: dict[str, Threshold] = {
    "share": Threshold(0.5, 0.0, strict=True),
    "experts for half": Threshold(1 / 8, 0.0, ours=True),
    "agreement": Threshold(0.95, 1.0, ours=True),
    "agreement where it matters": Threshold(0.9, 1.0, ours=True),
    "KL left": Threshold(0.1, 0.0, ours=True),
    "cosine": Threshold(0.95, 1.0),
    "cosine gained": Threshold(0.9, 1.0, ours=True),
    "perplexity": Threshold(1.05, 1.0),
    "pruned perplexity": Threshold(1.05, 1.0, ours=True),
    "controls beaten": Threshold(0.95, 1.0),
    "nothing": Threshold(0.0, 0.0, strict=True),
}
"""By name. "experts for half" is a share of all experts; "nothing" is what differences are compared with."""


@dataclass(frozen=True)
class Bound:
    """A quantity of one domain, and the side of a threshold that the claim puts it on."""

    what: str
    value: float
    low: float | None
    """Ends of its simultaneous interval; None below ten sources, and of a share that was counted."""
    high: float | None
    above: bool
    """Whether the claim says that it is above the threshold; below it otherwise."""
    threshold: Threshold
    control: bool = False
    """Whether it belongs to the inference alone."""
    others: "tuple[Bound, ...]" = ()
    """What is measured instead at half and at double the distance, where a † is part of the measurement."""
    counted: bool = False
    """Whether it is a share of random controls, counted over ten sources or more, ties by half. It holds where
    it reaches the threshold, .95; it contradicts where as many of the controls do better, where the share is
    .05 at most: the control's difference is then wholly on the other side. Between the two, what was picked may
    be a control like others; as an interval with 0 in it, that decides nothing. Of 40 controls like what was
    picked, each of the two happens in 7 of 100 cases."""

    def answer(self, factor: float = 1.0) -> Answer:
        """On which side of the threshold, at so many times its distance, the interval lies."""
        instead = dict(zip((FACTORS[0], FACTORS[2]), self.others, strict=False)).get(factor)
        if instead is not None:
            return instead.answer(factor)
        at = self.threshold.at(factor)
        if self.counted:
            reached, other = self.value >= at - ROUNDING, self.value <= 1 - at + ROUNDING
            return HOLDS if reached else CONTRADICTED if other else UNDECIDED
        if self.low is None or self.high is None:
            return UNDECIDED
        low, high = (self.low, self.high) if self.above else (-self.high, -self.low)
        at = at if self.above else -at
        wholly, other = (low > at, high <= at) if self.threshold.strict else (low >= at, high < at)
        return HOLDS if wholly else CONTRADICTED if other else UNDECIDED


@dataclass(frozen=True)
class OfDomain:
    """What one domain says about a claim."""

    domain: str
    sources: int
    bounds: tuple[Bound, ...]
    missing: str = ""
    """What of the controls was not run, if so."""

    def number(self, factor: float = 1.0) -> Answer:
        """Whether the number is reproduced."""
        return together([bound.answer(factor) for bound in self.bounds if not bound.control])

    def inference(self, factor: float = 1.0) -> Answer:
        """Whether the number and its controls support the inference."""
        missing: list[Answer] = [UNDECIDED] if self.missing else []
        return together([*(bound.answer(factor) for bound in self.bounds), *missing])


def together(answers: Sequence[Answer]) -> Answer:
    """All must hold; one that is contradicted decides."""
    if CONTRADICTED in answers:
        return CONTRADICTED
    return HOLDS if answers and set(answers) == {HOLDS} else UNDECIDED


def over_domains(answers: Sequence[Answer]) -> str:
    """Of all domains: the answer that they share, or "mixed (a of b hold, c contradicted)"; the rest is undecided."""
    if len(set(answers)) == 1:
        return answers[0]
    held, against = answers.count(HOLDS), answers.count(CONTRADICTED)
    return f"mixed ({held} of {len(answers)} hold, {against} contradicted)" if answers else UNDECIDED


@dataclass(frozen=True)
class Verdict:
    """A claim, and what all domains say about it."""

    key: str
    claim: str
    estimate: str
    """What is estimated, and what the inference takes."""
    has_number: bool
    domains: tuple[OfDomain, ...] = ()
    missing: str = ""
    """Why nothing could be said, if so."""

    def number(self, factor: float = 1.0) -> str:
        """Whether the number is reproduced, over all domains; "–" where the claim names none."""
        if not self.has_number:
            return "–"
        return over_domains([of.number(factor) for of in self.domains])

    def inference(self, factor: float = 1.0) -> str:
        """Whether the inference is supported, over all domains."""
        return over_domains([of.inference(factor) for of in self.domains])

    def elsewhere(self, factor: float) -> str:
        """Both verdicts with † thresholds at so many times their distance; "no †" where all thresholds are the paper's.

        A row that was not run has no thresholds; its verdict is the same at every distance.
        """
        if not self.domains:
            return f"{self.number(factor)} / {self.inference(factor)}"
        ours = {bound.control for of in self.domains for bound in of.bounds if bound.threshold.ours}
        if not ours:
            return NO_DAGGER
        number = self.number(factor) if False in ours or not self.has_number else NO_DAGGER
        return f"{number} / {self.inference(factor)}"
