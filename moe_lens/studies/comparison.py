"""`compare`: two saved studies of one kind, with intervals of the difference.

Base against chat, before and after pruning, two seeds of training: where both read the same texts, differences are
paired by source, both sides being resampled together; otherwise each side is resampled by itself.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.checked import checked
from moe_lens.errors import InputError
from moe_lens.stats import MEASURES, MIN_SOURCES, Result, RoutingResult, SimilarityResult
from moe_lens.stats.resampling import tail
from moe_lens.storage import written_whole
from moe_lens.studies.lens import QUANTITIES, LensTotals
from moe_lens.studies.study_result import StudyResult
from moe_lens.studies.variant_losses import VariantLosses
from moe_lens.summary import Summary

RESAMPLES = 2000
LEVEL = 0.95
CHUNK = 2**11
"""Values whose resamples are held at a time."""


@dataclass(frozen=True, eq=False)
class Means:
    """Means of sums over sources, each with its name: what a difference can be taken of."""

    index: pd.Index
    """Of the values: the quantity first."""
    sources: tuple[str, ...]
    above: Float[Tensor, "source value"]
    below: Float[Tensor, "source value"]
    exponential: bool = False
    """Whether a value is exp(above / below), as perplexity is."""

    def at(self, wanted: pd.Index) -> "Means":
        """Some of the values."""
        place = torch.as_tensor(self.index.get_indexer(wanted))
        return Means(wanted, self.sources, self.above[:, place], self.below[:, place], self.exponential)

    def of(self, times: Float[Tensor, "resample source"]) -> Float[Tensor, "resample value"]:
        """The values, with each source counted so many times."""
        mean = (times @ self.above) / (times @ self.below)
        return mean.exp() if self.exponential else mean


@dataclass(frozen=True, eq=False)
class Comparison(Summary):
    """Differences between two studies, the second minus the first."""

    study: str
    first: Mapping[str, Any]
    """The manifest of the first."""
    second: Mapping[str, Any]
    table: pd.DataFrame
    """A row per domain, quantity and what it is of.

    Columns: domain, quantity, of (such as "layer 3, expert 17"), first, second, difference, low, high (its 95 %
    interval over sources, missing below ten of them on either side), paired (whether both read the same sources).
    """

    @property
    def same_model(self) -> bool:
        """Whether both studied one model."""
        return self.first["plan"]["model"]["fingerprint"] == self.second["plan"]["model"]["fingerprint"]

    def save(self, path: Any) -> None:
        """Write the table as parquet, whole or not at all.

        Raises:
            InputError: It cannot be written there.
        """
        with written_whole(path) as temporary:
            self.table.to_parquet(temporary, index=False)


@checked
def compare(first: StudyResult, second: StudyResult, *, seed: int = 0) -> Comparison:
    """Compare what two studies measured alike: the same domains, layers, experts, variants.

    Experts are compared by number, which means something only where one model was made from the other.

    Args:
        first: What is subtracted.
        second: What it is subtracted from.
        seed: Of the resamples.

    Raises:
        InputError: Studies of different kinds, or with nothing in common.
    """
    if first.study != second.study:
        raise InputError(
            f"a study {first.study!r} and a study {second.study!r} cannot be compared; both must be one kind"
        )
    rows = []
    for domain in (domain for domain in first.domains if domain in second.results):
        for name, result in first.results[domain].items():
            for kind, means in _KINDS:
                other = second.results[domain].get(name)
                if isinstance(result, kind) and isinstance(other, kind):
                    tables = zip(means(result), means(other), strict=True)
                    rows += [_differences(a, b, seed).assign(domain=domain) for a, b in tables]
    rows = [frame for frame in rows if len(frame)]
    if not rows:
        raise InputError(
            f"the two studies {first.study!r} have nothing in common that can be compared: domains "
            f"{list(first.domains)} and {list(second.domains)}"
        )
    table = pd.concat(rows, ignore_index=True)
    table.insert(0, "domain", table.pop("domain"))
    return Comparison(first.study, first.manifest, second.manifest, table)


def _differences(a: Means, b: Means, seed: int) -> pd.DataFrame:
    common = a.index[a.index.isin(b.index)]
    one, other = a.at(common), b.at(common)
    paired = one.sources == other.sources
    enough = min(len(one.sources), len(other.sources)) >= MIN_SOURCES
    drawn = _drawn(len(one.sources), seed), _drawn(len(other.sources), seed if paired else seed + 1)
    parts = []
    for start in range(0, len(common), CHUNK):
        part = common[start : start + CHUNK]
        here, there = one.at(part), other.at(part)
        ones = [torch.ones(1, len(side.sources), dtype=torch.float64) for side in (here, there)]
        values = here.of(ones[0])[0], there.of(ones[1])[0]
        low = high = torch.full_like(values[0], torch.nan)
        if enough:
            spread = there.of(drawn[1]) - here.of(drawn[0])
            beyond = min(tail(side.below.sum(1), LEVEL) for side in (here, there))
            low, high = spread.nanquantile(torch.tensor([beyond, 1 - beyond], dtype=torch.float64), dim=0)
        columns = {
            "first": values[0],
            "second": values[1],
            "difference": values[1] - values[0],
            "low": low,
            "high": high,
        }
        parts.append(pd.DataFrame({name: value.numpy() for name, value in columns.items()}, index=part))
    if not parts:
        return pd.DataFrame()
    frame = pd.concat(parts).reset_index()
    return frame[frame["difference"].notna()].assign(paired=paired)


def _drawn(n_sources: int, seed: int) -> Float[Tensor, "resample source"]:
    """How often each source is drawn in each resample: the same for as many sources and one seed."""
    drawn = torch.randint(n_sources, (RESAMPLES, n_sources), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(RESAMPLES, n_sources, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(1, dtype=torch.float64).expand(RESAMPLES, n_sources)
    )


def _index(quantities: Iterable[str], of: Iterable[str]) -> pd.MultiIndex:
    return pd.MultiIndex.from_arrays([list(quantities), list(of)], names=["quantity", "of"])


def _routing(result: Result) -> list[Means]:
    assert isinstance(result, RoutingResult)
    cells = [f"layer {layer}, expert {expert}" for layer in result.layers for expert in range(result.n_experts)]
    tokens = result.tokens.double()[:, None]
    layers = [f"layer {layer}" for layer in result.layers]
    shares = [
        Means(
            _index([name] * len(cells), cells), result.sources, above.double().flatten(1), tokens.expand(-1, len(cells))
        )
        for name, above in (("share", result.assignments), ("weight", result.weights))
    ]
    decided = [
        Means(
            _index([name] * len(layers), layers),
            result.sources,
            result.sums[..., at].double(),
            result.measured[..., at].double(),
        )
        for at, name in enumerate(("router_entropy", "margin"))
    ]
    return [*shares, *decided]


def _losses(result: Result) -> list[Means]:
    assert isinstance(result, VariantLosses)
    of = [f"{what}, k = {k}" + ("" if layer is None else f", layer {layer}") for what, layer, k in result.variants]
    n = len(of)
    sums = {
        "perplexity": (result.nats, result.tokens),
        "geometric perplexity": (result.row_losses, result.rows),
        "ratio to the whole model": (result.log_ratios()[0], result.tokens),
        "geometric ratio": (result.log_ratios()[1], result.rows),
    }
    return [
        Means(_index([name] * n, of), result.sources, above, below.double()[:, None].expand(-1, n), exponential=True)
        for name, (above, below) in sums.items()
    ]


def _similarity(result: Result) -> list[Means]:
    assert isinstance(result, SimilarityResult)
    measures = list(MEASURES)
    names = [(measure, f"layer {layer}") for layer in result.layers for measure in measures]
    tokens = result.tokens.double()[..., None].expand(-1, -1, len(measures))
    return [Means(_index(*zip(*names, strict=True)), result.sources, result.sums.flatten(1), tokens.flatten(1))]


def _lens(result: Result) -> list[Means]:
    assert isinstance(result, LensTotals)
    names = [(what, f"layer {at}, {which}") for at in result.layers for which in result.sums for what in QUANTITIES]
    sums = result.totals.flatten(1), result.tokens.double().flatten(1)
    return [Means(_index(*zip(*names, strict=True)), result.sources, *sums)]


_KINDS: tuple[tuple[type[Result], Callable[[Result], list[Means]]], ...] = (
    (RoutingResult, _routing),
    (VariantLosses, _losses),
    (SimilarityResult, _similarity),
    (LensTotals, _lens),
)
