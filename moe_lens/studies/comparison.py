"""`compare`: two saved studies of one kind, or two domains of one study, with intervals of the difference.

Base against chat, before and after pruning, two seeds of training: where both read the same texts, differences are
paired by source, both sides being resampled together; otherwise each side is resampled by itself. Two domains whose
sources are the same documents, in two languages say, are paired by document if it is said what their names differ in.

Of thousands of differences many have an interval that leaves out 0 by chance. Each also has a p-value that counts all
of them: its studentised difference against the greatest one of the whole table (Westfall and Young's maxT), where
sources swap sides at random, or are assigned to sides at random if they are not paired: see `chance_differences`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.checked import Seed
from moe_lens.errors import InputError, near_miss
from moe_lens.reprs import Summary
from moe_lens.resampling import ends_of, enough, tail, times_drawn
from moe_lens.stats import MIN_SOURCES
from moe_lens.stats.multiple_tests import max_t
from moe_lens.stats.parallel_sources import parallel_key
from moe_lens.storage import written_whole
from moe_lens.studies import chance_differences as chance
from moe_lens.studies.comparable import COMPARED, Means
from moe_lens.studies.routing import NULLS
from moe_lens.studies.study_result import StudyResult

RESAMPLES = 2000
LEVEL = 0.95
CHUNK = 2**11
"""Values whose resamples are held at a time."""


@dataclass(frozen=True, eq=False)
class Comparison(Summary):
    """Differences between two sides, the second minus the first."""

    study: str
    names: tuple[str, str]
    """What the two sides are called in the table."""
    first: Mapping[str, Any]
    """The manifest of the first."""
    second: Mapping[str, Any]
    table: pd.DataFrame
    """A row per domain, quantity and what it is of.

    Columns: domain, quantity, of (such as "layer 3, expert 17"), a column with each side's name, difference (the second
    minus the first), low, high (its 95 % interval over sources), p_adjusted (counting all rows of the table: the chance
    of even one below .05 is .05 where nothing differs; missing, too, of shares of which one side, if sources are not
    paired, expects fewer than ten tokens), all three missing below ten sources on either side; paired
    (whether both read the same sources, or parallel ones), sources (of the side that has fewer), dropped (sources of
    both sides that have no parallel one on the other).
    """
    left_out: tuple[str, ...] = ()
    """What one side has and the other has not, in words: domains, and values such as those of experts or layers."""

    @property
    def same_model(self) -> bool:
        """Whether both studied one model."""
        return self.first["plan"]["model"]["fingerprint"] == self.second["plan"]["model"]["fingerprint"]

    @property
    def opened_otherwise(self) -> str | None:
        """What stands before the texts of either side, where that differs: part of each difference; None if it is one.

        Manifests of earlier versions do not say it; those opened texts with EOS where a tokenizer has no BOS.
        """
        one, other = (side["plan"].get("model", {}).get("texts_open_with") for side in (self.first, self.second))
        if one == other:
            return None
        said = ["as an earlier moe_lens did" if of is None else "".join(of) or "nothing" for of in (one, other)]
        return f"texts open with {said[0]} in {self.names[0]} and with {said[1]} in {self.names[1]}"

    @property
    def asked_otherwise(self) -> str | None:
        """In what the two studies were asked for something else, where that may be part of each difference.

        The model's precision and hooks are of it, and texts of one name that are not known to be the same.
        """
        one, other = (_asked(side["plan"]) for side in (self.first, self.second))
        said = [
            f"{key} {one.get(key)} in {self.names[0]} and {other.get(key)} in {self.names[1]}"
            for key in sorted(one.keys() | other.keys())
            if one.get(key) != other.get(key)
        ]
        texts, others = (
            {of["name"]: of for of in side["plan"].get("domains", ())} for side in (self.first, self.second)
        )
        read = [name for name in texts if name in others and name in set(self.table["domain"])]
        said += [f"other texts as {name}" for name in read if texts[name] != others[name]]
        return ", ".join(said) or None

    def found(self) -> str:
        """How many differences there are, how many chance alone would give, how many stand, and what else differs."""
        table, (one, other) = self.table, self.names
        said = [f"{len(table):,} differences, {other} minus {one}"]
        few = {of: n for of, n in zip(table["domain"], table["sources"], strict=True) if n < MIN_SOURCES}
        low, high, adjusted = (table[name].to_numpy() for name in ("low", "high", "p_adjusted"))
        bounded = int(np.isfinite(low).sum())
        if few:
            which = ", ".join(f"{domain} ({n})" for domain, n in few.items())
            said.append(f"no intervals: fewer than ten sources in {which}")
        if bounded:
            outside, stand = int(((low > 0) | (high < 0)).sum()), int((adjusted <= 1 - LEVEL).sum())
            by_chance = (1 - LEVEL) * bounded
            said.append(
                f"{outside:,} of {bounded:,} intervals leave out 0, where chance alone would give about "
                f"{by_chance:,.0f}; {stand:,} stand when all are counted (p_adjusted ≤ .05)"
            )
        if dropped := max(table["dropped"].tolist(), default=0):
            said.append(f"{dropped} sources have no parallel one and were left out")
        if (opened := self.opened_otherwise) is not None:
            said.append(f"{opened}, which is part of every difference")
        if (asked := self.asked_otherwise) is not None:
            said.append(f"{asked}, which may be part of every difference")
        if self.left_out:
            said.append(f"left out: {', '.join(self.left_out)}")
        return "; ".join(said)

    def save(self, path: str | Path) -> None:
        """Write the table as parquet, whole or not at all.

        Raises:
            InputError: It cannot be written there.
        """
        with written_whole(path) as temporary:
            self.table.to_parquet(temporary, index=False)


def compare(
    first: StudyResult,
    second: StudyResult | None = None,
    *,
    domains: tuple[str, str] | None = None,
    parallel: str | None = None,
    names: tuple[str, str] | None = None,
    seed: Seed = 0,
) -> Comparison:
    """Compare what two studies measured alike: the same domains, layers, experts, variants.

    Experts are compared by number, which means something only where one model was made from the other and has as many;
    where one has fewer, as after pruning, single experts are left out. Nulls are not compared.

    Args:
        first: What is subtracted.
        second: What it is subtracted from; the first study again if not given, two domains of which are compared.
        domains: Compare this domain of the first with that one of the second, instead of each with its like.
        parallel: A regular expression of what may differ in the names of sources of the two domains that are one
            document, such as `parallel_sources.LANGUAGE`: they are paired, those without a partner left out and
            counted. Domains without parallel sources are compared as if it was not given.
        names: What the two are called in the table; if not given, by their models, domains or places.
        seed: Of the resamples.

    Raises:
        InputError: Studies of different kinds, or with nothing in common; domains that a study does not have; parallel
            sources without two domains, or what is no regular expression.
    """
    if parallel is not None and domains is None:
        raise InputError("parallel sources are those of two domains: name two to compare, or leave it out")
    key = None if parallel is None else parallel_key(parallel)
    if second is None and domains is None:
        raise InputError(f"one study alone: name two of its domains to compare, of {list(first.domains)}")
    second = first if second is None else second
    if first.study != second.study:
        raise InputError(
            f"a study {first.study!r} and a study {second.study!r} cannot be compared; both must be one kind"
        )
    kinds = tuple(kind for kind, _ in COMPARED)
    if not any(isinstance(result, kinds) for of in first.results.values() for result in of.values()):
        raise InputError(
            f"two studies {first.study!r} cannot be compared: they keep no sums by source of which a difference has an "
            "interval. Their tables can be read side by side: moe-lens show FOLDER"
        )
    if domains is not None and second is first and domains[0] == domains[1]:
        raise InputError(f"domain {domains[0]!r} is compared with itself; name two")
    for domain, study in zip(domains or (), (first, second), strict=False):
        if domain not in study.domains:
            there = f"there are {list(study.domains)}{near_miss(domain, study.domains)}"
            raise InputError(f"there is no domain {domain!r} in the study; {there}")
    names = _named(first, second, domains) if names is None else names
    if len({*names, *_COLUMNS}) < len(_COLUMNS) + 2:
        raise InputError(f"got the names {list(names)}; expected two different ones, and none of {list(_COLUMNS)}")
    counts = [study.manifest["plan"].get("model", {}).get("experts") for study in (first, second)]
    renumbered = counts[0] != counts[1]  # as pruning does
    couples = [domains] if domains else [(domain, domain) for domain in first.domains if domain in second.results]
    rows, greatest = [], torch.zeros(RESAMPLES, dtype=torch.float64)
    alone: tuple[list[str], list[str]] = ([], [])  # values that only one side has
    for one, other in couples:
        domain = one if one == other else f"{other} minus {one}"
        alike = _texts(first, one) == _texts(second, other)
        here, others = _measured(first, one), _measured(second, other)
        alone[1].extend(name for name in others if name not in here)
        alone[0].extend(name for name in here if name not in others)
        for name, result in here.items():
            for kind, means in COMPARED:
                there = others.get(name)
                if isinstance(result, kind) and isinstance(there, kind):
                    for sides in zip(means(result), means(there), strict=True):
                        a, b = map(_without_experts, sides) if renumbered else sides
                        for values, index, like in zip(alone, (a.index, b.index), (b.index, a.index), strict=True):
                            values += [" of ".join(value) for value in index[~index.isin(like)]]
                        frame, null = _differences(*_matched(a, b, key, alike), seed)
                        greatest = torch.maximum(greatest, null)
                        rows.append(frame.assign(domain=domain))
    rows = [frame for frame in rows if len(frame)]
    single = f"single experts ({counts[0]} in {names[0]} and {counts[1]} in {names[1]}, with other numbers)"
    if not rows:
        raise InputError(
            f"the two studies {first.study!r} have nothing in common that can be compared: domains "
            f"{list(first.domains)} and {list(second.domains)}{', without ' + single if renumbered else ''}"
        )
    table = pd.concat(rows, ignore_index=True)
    adjusted = max_t(torch.tensor(table.pop("t").tolist(), dtype=torch.float64), greatest)
    table.insert(list(table.columns).index("high") + 1, "p_adjusted", adjusted.numpy())
    table.insert(0, "domain", table.pop("domain"))
    table = table.rename(columns={"first": names[0], "second": names[1]})
    left_out = [] if domains else _alone("domains", [of.domains for of in (first, second)], names)
    left_out += _alone("values", alone, names)
    left_out += [single] * renumbered
    if first.study in _BEYOND:
        left_out.append(f"what {first.study} measures beyond routing ({_BEYOND[first.study]})")
    return Comparison(first.study, names, first.manifest, second.manifest, table, tuple(left_out))


def _alone(what: str, sides: Sequence[Sequence[str]], names: tuple[str, str]) -> list[str]:
    """What one of two sides has and the other has not, in words: at most three of each."""
    found = []
    for own, other, name in zip(sides, sides[::-1], names, strict=True):
        if lost := [each for each in dict.fromkeys(own) if each not in other]:
            more = f" and {len(lost) - 3:,} more" if len(lost) > 3 else ""
            found.append(f"{what} of {name} alone ({'; '.join(lost[:3])}{more})")
    return found


def _asked(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What a study was asked for, and the precision and hooks of its model."""
    found = {key: plan[of][key] for of, leave in _HOW_ONLY.items() for key in plan.get(of, {}) if key not in leave}
    model = plan.get("model", {})
    found |= {key: model[key] for key in ("dtype", "quantised") if key in model}
    return found | ({"hooks": len(model["hooks"])} if "hooks" in model else {})


_BEYOND = {
    "ablation": "added losses",
    "atlas": "losses, knock-outs, contexts",
    "localisation": "contrasts",
    "pruning": "perplexities of smaller models",
}
"""Studies of which routing alone is compared, and what is not."""
_HOW_ONLY = {"reading": ("shard_tokens",), "settings": ("seed", "nulls")}
"""What changes how a study works or what its controls are and draw, and not what is measured or read."""
_COLUMNS = ("domain", "quantity", "of", "difference", "low", "high", "p_adjusted", "paired", "sources", "dropped")


def _named(first: StudyResult, second: StudyResult, domains: tuple[str, str] | None) -> tuple[str, str]:
    """Names that tell the two apart."""
    models = [str(study.manifest["plan"].get("model", {}).get("name")) for study in (first, second)]
    for names in (domains, tuple(models)):
        if names is not None and len({*names, *_COLUMNS}) == len(_COLUMNS) + 2:
            return names[0], names[1]
    return "first", "second"


def _without_experts(means: Means) -> Means:
    """Those of layers and models alone."""
    return means.at(means.index[~means.index.get_level_values("of").str.contains(r"\bexpert \d")])


def _measured(study: StudyResult, domain: str) -> dict[str, Any]:
    """Results of the model, without the nulls beside it: the first word of a name is the routing."""
    return {name: result for name, result in study.results[domain].items() if name.split(" ")[0] not in NULLS}


def _texts(study: StudyResult, domain: str) -> dict[str, Any]:
    """What a domain of a study was read from, whatever it is called."""
    found = next((of for of in study.manifest["plan"].get("domains", ()) if of["name"] == domain), {})
    return {key: value for key, value in found.items() if key != "name"}


def _matched(a: Means, b: Means, key: Callable[[str], str] | None, alike: bool) -> tuple[Means, Means, int, bool]:
    """Both by block of parallel sources, and how many sources are in none; as they are if none are parallel.

    And whether sources that are called alike are the same ones: those of the same texts, and parallel ones.
    """
    both = [] if key is None else sorted({*map(key, a.sources)} & {*map(key, b.sources)})
    if key is None or not both:
        return a, b, 0, alike
    dropped = sum(key(source) not in both for source in (*a.sources, *b.sources))
    return a.blocks(key, both), b.blocks(key, both), dropped, True


def _differences(
    a: Means, b: Means, dropped: int, alike: bool, seed: int
) -> tuple[pd.DataFrame, Float[Tensor, " resample"]]:
    """Differences, and the greatest studentised one of each draw in which there are none."""
    common = a.index[a.index.isin(b.index)]
    one, other = a.at(common), b.at(common)
    paired = alike and one.sources == other.sources
    fewest = min(len(one.sources), len(other.sources))
    drawn = (
        times_drawn(len(one.sources), RESAMPLES, seed),
        times_drawn(len(other.sources), RESAMPLES, seed if paired else seed + 1),
    )
    parts, greatest = [], torch.zeros(RESAMPLES, dtype=torch.float64)
    for start in range(0, len(common), CHUNK):
        part = common[start : start + CHUNK]
        here, there = one.at(part), other.at(part)
        ones = [torch.ones(1, len(side.sources), dtype=torch.float64) for side in (here, there)]
        values = here.of(ones[0])[0], there.of(ones[1])[0]
        low = high = t = torch.full_like(values[0], torch.nan)
        known = enough(here.below) & enough(there.below)
        if known.any():
            spread = there.of(drawn[1]) - here.of(drawn[0])
            beyond = torch.minimum(*(tail(side.below, LEVEL) for side in (here, there)))
            low, high = ends_of(spread, beyond).masked_fill(~known, torch.nan)
            t, by_chance = (chance.paired if paired else chance.unpaired)(here, there, RESAMPLES, seed)
            t = t.masked_fill(~known, torch.nan)
            greatest = torch.maximum(greatest, by_chance[:, known].abs().amax(1))
        columns = {
            "first": values[0],
            "second": values[1],
            "difference": values[1] - values[0],
            "low": low,
            "high": high,
            "t": t,
        }
        parts.append(pd.DataFrame({name: value.numpy() for name, value in columns.items()}, index=part))
    if not parts:
        return pd.DataFrame(), greatest
    frame = pd.concat(parts).reset_index()
    return frame[frame["difference"].notna()].assign(paired=paired, sources=fewest, dropped=dropped), greatest
