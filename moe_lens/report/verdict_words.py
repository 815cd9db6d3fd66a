"""Verdicts in the words and units of the page: what was measured over domains, what its control gives, what decides."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moe_lens.report.rendering import ranged
from moe_lens.studies.verdict_answers import FACTORS, HOLDS, NO_DAGGER, Bound, OfDomain, Verdict


@dataclass(frozen=True)
class Form:
    """How numbers of a kind are written; a space that does not break stands before a unit."""

    digits: int
    unit: str = ""
    sign: str = ""
    scale: float = 1.0
    less: float = 0.0
    """What is subtracted first: a ratio is said as a change."""

    def range(self, values: Sequence[float]) -> str:
        """The least and the greatest, or the one that all are."""
        return ranged([self._scaled(v) for v in values], f"{self.sign}.{self.digits}f", self.unit)

    def one(self, value: float) -> str:
        """A single value, with a digit more."""
        return f"{self._plain(value)}{self.unit}"

    def ends(self, low: float, high: float) -> str:
        """An interval, without the unit of the value that it stands under."""
        return f"[{self._plain(low)}, {self._plain(high)}]"

    def limit(self, value: float) -> str:
        """A threshold, with as many digits as it has."""
        return f"{self._scaled(value):{self.sign}.4g}{self.unit}"

    def _plain(self, value: float) -> str:
        return f"{self._scaled(value):{self.sign}.{self.digits + 1}f}"

    def _scaled(self, value: float) -> float:
        return self.scale * (value - self.less)


PERCENT = Form(0, "\u00a0%", scale=100.0)
POINTS = Form(0, " points", scale=100.0)
CHANGE = Form(0, "\u00a0%", sign="+", scale=100.0, less=1.0)
TWO, THREE = Form(2), Form(3)


@dataclass(frozen=True)
class Words:
    """How a quantity is said."""

    label: str
    form: Form
    control: str = ""
    """Of a difference: what is subtracted; its own value is what a reader looks for."""
    minuend: str = ""
    """Of a difference: the quantity that it is subtracted from."""
    control_form: Form | None = None


_SHARE, _HALF = "greatest share", "share of experts for half"
_RATIO, _KL = "perplexity ratio, k = 1 ÷ all", "KL ratio: KL(ensemble ‖ u + g₀E₀) / KL(ensemble ‖ u)"

WORDS: tuple[tuple[str, Words], ...] = (
    (_SHARE, Words("the busiest expert's share of tokens", PERCENT)),
    (
        "greatest share − its share by the token alone",
        Words("its share − that by the token alone", POINTS, "the same expert by the token alone", _SHARE, PERCENT),
    ),
    ("greatest share of a random router", Words("a random router's busiest expert", PERCENT)),
    (_HALF, Words("experts that take half, of all", PERCENT)),
    (
        "share of experts for half − a random router's",
        Words("experts for half − a random router's", POINTS, "a random router", _HALF, PERCENT),
    ),
    ("agreement with the ensemble", Words("u + g₀E₀ predicts the ensemble's token", PERCENT)),
    (_KL, Words("KL ratio", TWO)),
    (
        "KL ratio − a random active expert's",
        Words("KL ratio − a random active expert's", TWO, "KL ratio of one random active expert", _KL),
    ),
    (
        "agreement where u alone differs from the ensemble",
        Words("the same, where u alone predicts another token", PERCENT),
    ),
    ("cos(u + a₀, u + S)", Words("cosine, greatest layer", THREE)),
    ("(cos − cos_u) / (1 − cos_u)", Words("share of the gap 1 − cos_u that rank 0 closes", PERCENT)),
    ("cos(a₀, S − a₀)", Words("leave-one-out cosine", TWO)),
    (_RATIO, Words("perplexity, k = 1", CHANGE)),
    (
        "perplexity ratio − a random active expert's",
        Words("perplexity ratio − a random active expert's", TWO, "one random active expert", _RATIO, CHANGE),
    ),
    ("perplexity, pruned ÷ whole", Words("perplexity without the experts that the domain chooses least", CHANGE)),
    (r"share of (\d+) random plans beaten", Words(r"\1 random plans of this size, worse", PERCENT)),
    (
        "contrast (Δ own − Δ others), picked − matched",
        Words("contrast beyond matched coalitions, nats a token", TWO),
    ),
    (r"share of (\d+) matched coalitions beaten", Words(r"\1 matched coalitions, beaten", PERCENT)),
)
"""By what a bound says it is: itself, or a pattern where a number stands in it."""


def words(what: str) -> Words:
    """How a bound is said; what nothing was written for here is said as it is."""
    for pattern, said in WORDS:
        if pattern == what:
            return said
        if (found := re.fullmatch(pattern, what) if "(\\d" in pattern else None) is not None:
            return replace(said, label=found.expand(said.label))
    return Words(what, TWO)


@dataclass(frozen=True)
class Line:
    """A quantity over all domains, and what is claimed of it."""

    label: str
    values: str
    claimed: str


@dataclass(frozen=True)
class Cell:
    """A quantity in one domain."""

    value: str
    interval: str
    answer: str


@dataclass(frozen=True)
class Shown:
    """A row of the table."""

    verdict: Verdict
    number: tuple[Line, ...]
    control: tuple[Line, ...]
    reasons: tuple[str, ...]
    """Which quantities do not hold, and where."""
    matrix: tuple[tuple[Line, tuple[Cell | None, ...]], ...]
    """Each quantity, by domain."""
    half: str
    double: str
    """Both verdicts with † thresholds at half and at double their distance; empty where there is no †."""


def shown(verdict: Verdict) -> Shown:
    """A verdict as a row of the table."""
    kinds = {bound.what: bound for of in verdict.domains for bound in of.bounds}
    lines = {what: _line(bound, verdict) for what, bound in kinds.items()}
    at = [verdict.elsewhere(factor) for factor in (FACTORS[0], FACTORS[2])]
    half, double = at if verdict.domains and NO_DAGGER not in at else ("", "")
    return Shown(
        verdict=verdict,
        number=tuple(lines[what] for what, bound in kinds.items() if not bound.control),
        control=tuple(lines[what] for what, bound in kinds.items() if bound.control),
        reasons=tuple(_reasons(verdict)),
        matrix=tuple(
            (_line(bound, verdict, itself=True), tuple(_cell(of, what) for of in verdict.domains))
            for what, bound in kinds.items()
        ),
        half=half,
        double=double,
    )


def _values(verdict: Verdict, what: str) -> dict[str, float]:
    return {of.domain: bound.value for of in verdict.domains for bound in of.bounds if bound.what == what}


def _line(bound: Bound, verdict: Verdict, itself: bool = False) -> Line:
    """A quantity; of a difference, the control that is subtracted, unless the difference `itself` is wanted."""
    said, values = words(bound.what), _values(verdict, bound.what)
    if said.control and not itself:
        ours = _values(verdict, said.minuend)
        theirs = [ours[domain] - value for domain, value in values.items()]
        form = said.control_form or said.form
        return Line(said.control, form.range(theirs), f"claimed {'less' if bound.above else 'more'} than ours")
    threshold = bound.threshold
    sign = (">" if bound.above else "<") if threshold.strict else ("≥" if bound.above else "≤")
    claimed = f"claimed {sign}\u00a0{said.form.limit(threshold.value)}{' †' if threshold.ours else ''}"
    return Line(said.label, said.form.range(list(values.values())), claimed)


def _cell(of: OfDomain, what: str) -> Cell | None:
    bound = next((bound for bound in of.bounds if bound.what == what), None)
    if bound is None:
        return None
    form = words(what).form
    ends = "" if bound.low is None or bound.high is None else form.ends(bound.low, bound.high)
    return Cell(form.one(bound.value), ends, bound.answer())


def _reasons(verdict: Verdict) -> list[str]:
    """What keeps the inference from holding, and in which domains."""
    found: dict[str, dict[str, list[str]]] = {}
    for of in verdict.domains:
        for bound in of.bounds:
            if (answer := bound.answer()) != HOLDS:
                found.setdefault(words(bound.what).label, {}).setdefault(answer, []).append(of.domain)
        if of.missing:
            found.setdefault(of.missing, {}).setdefault("undecided", []).append(of.domain)
    return [
        f"{label}: {'; '.join(f'{answer} {_where(where, verdict)}' for answer, where in answers.items())}"
        for label, answers in found.items()
    ]


def _where(domains: Sequence[str], verdict: Verdict) -> str:
    return "everywhere" if len(domains) == len(verdict.domains) > 1 else f"in {', '.join(domains)}"
