"""What a study found, in a few lines, and numbers in words: with their intervals, or across domains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_lens import names
from moe_lens.reprs import Summary
from moe_lens.stats import MIN_SOURCES


@dataclass(frozen=True)
class Findings(Summary):
    """The main findings of a study, in sentences; `str` gives all of it, a line each."""

    lines: tuple[str, ...]
    """What was found, five at most. "(name)" at the end of a line is the table that has all of it."""
    warnings: tuple[str, ...] = ()
    """Where numbers are less, or something else, than they seem: no interval, fewer texts than asked for, …"""
    then: str = ""
    """What to run next."""
    about: str = field(default="", repr=False)
    """Study, model, domains."""

    def __str__(self) -> str:
        parts = [self.about, *(f"  {line}" for line in self.lines)]
        parts += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(part for part in [*parts, self.then and f"next: {self.then}"] if part)


def too_few(sources: Mapping[str, int]) -> tuple[str, ...]:
    """A warning where domains have fewer sources than an interval takes."""
    few = [f"{name} ({n})" for name, n in sources.items() if n < MIN_SOURCES]
    said = f"no interval where there are fewer than ten sources: {', '.join(few)}"
    return (f"{said}; read more tokens, or say of each text which document it is from (source)",) if few else ()


def left_out(hooks: Sequence[str]) -> tuple[str, ...]:
    """A warning where interventions left selected experts out.

    Args:
        hooks: Those on the model, as the manifest has them.
    """
    by = ", ".join(dict.fromkeys(line.split(": ")[1].split()[0] for line in hooks if f".{names.EXPERT_KEPT}," in line))
    return (f"{by} left experts out that the router selected; shares and loads count these, too",) if by else ()


def repeated_texts(repeated: Mapping[str, int]) -> tuple[str, ...]:
    """A warning where sources have the same texts, and so are not independent."""
    some = [f"{name} ({n:,})" for name, n in repeated.items() if n]
    said = f"texts that other sources have too, word for word: {', '.join(some)}"
    return (f"{said}; these sources are not independent, and intervals are too narrow",) if some else ()


def too_short(read: Mapping[str, int], asked: int | None) -> tuple[str, ...]:
    """A warning where domains hold fewer tokens than were asked for."""
    short = [f"{name} ({n:,})" for name, n in read.items() if asked is not None and n < asked]
    return (
        (f"{', '.join(short)}: all of its texts, which are fewer than the {asked:,} tokens asked for",) if short else ()
    )


def value(row: Any, name: str, ends: tuple[str, str] = ("low", "high"), form: str = ".3g") -> str:
    """A number of a row with its interval: `1.53 [1.4, 1.67]`."""
    if row[name] != row[name]:
        return number(row[name])
    low, high = (row[end] for end in ends)
    span = "no interval" if low != low or low is None else f"{low:{form}}, {high:{form}}"
    return f"{number(row[name], form)} [{span}]"


def number(of: float, form: str = ".3g") -> str:
    """A number, or that there is none."""
    return "not measured" if of != of else f"{of:{form}}"


def across(rows: Any, name: str, ends: tuple[str, str] = ("low", "high"), form: str = ".3g") -> str:
    """The least and the greatest over domains, each with its interval and domain; one of them if there is but one."""
    rows = rows[rows[name].notna()]
    if not len(rows):
        return "not measured"
    order = rows.sort_values(name, kind="stable")
    shown = [order.iloc[0], *([order.iloc[-1]] if len(order) > 1 else [])]
    return " to ".join(f"{value(row, name, ends, form)} ({row['domain']})" for row in shown)


@dataclass(frozen=True)
class Margin:
    """What an effect has to be smaller than to be called none; named, and chosen before anything is run."""

    value: float
    unit: str


MARGINS = {
    "explained": Margin(0.01, "of the squared error"),  # a hundredth of all that there is to explain
    "nats": Margin(0.01, "nats a token"),  # 1 % of perplexity
    "logits": Margin(0.1, "logits"),  # the odds of answer against foil change by a tenth
}
"""By what is measured."""


def told(rows: Any, name: str, margin: Margin, ends: tuple[str, str] = ("low", "high")) -> str:
    """What the intervals of an effect say of 0, to be put after its numbers; empty where each leaves it out.

    "No effect" takes every interval wholly inside of the margin; one that has 0 in it and reaches beyond the margin
    says only that the effect is not distinguishable from 0.
    """
    known = rows[rows[name].notna() & rows[ends[0]].notna()]
    low, high = known[ends[0]], known[ends[1]]
    if not len(known) or len(known) < int(rows[name].notna().sum()):
        return ""
    if bool((low > -margin.value).all() and (high < margin.value).all()):
        return f": no effect within ± {margin.value:g} {margin.unit}"
    within = int(((low <= 0) & (high >= 0)).sum())
    if not within:
        return ""
    return ": not distinguishable from 0" + (f" in {within} of {len(known)}" if len(known) > 1 else "")
