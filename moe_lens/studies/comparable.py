"""What can be compared of a study's results: means of sums over sources, each with a name."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.stats import MEASURES, Result, RoutingResult, SimilarityResult
from moe_lens.stats.sparse_probes import KINDS, ProbeResult
from moe_lens.studies.checkpoint_overlap import PAIRS, RUNS, Overlap
from moe_lens.studies.contrast_results import MATCHED, OPPOSITE, PICKED, ContrastResult, SteerResult
from moe_lens.studies.lens import QUANTITIES, LensTotals
from moe_lens.studies.variant_losses import WHOLE, Variant, VariantLosses


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
    times: Float[Tensor, "source value"] | None = None
    """Of shares: how many of the tokens in `below` have what is counted, which may be few."""

    def at(self, wanted: pd.Index) -> "Means":
        """Some of the values."""
        place = torch.as_tensor(self.index.get_indexer(wanted))
        return self._each(lambda sums: sums[:, place], wanted, self.sources)

    def _each(
        self,
        change: Callable[[Float[Tensor, "source value"]], Float[Tensor, "other some"]],
        index: pd.Index,
        sources: tuple[str, ...],
    ) -> "Means":
        times = None if self.times is None else change(self.times)
        return Means(index, sources, change(self.above), change(self.below), self.exponential, times)

    def blocks(self, key: Callable[[str], str], wanted: Sequence[str]) -> "Means":
        """Of some blocks of sources, in this order: all sources with one key are one."""
        place = {block: at for at, block in enumerate(wanted)}
        kept = [at for at, source in enumerate(self.sources) if key(source) in place]
        into = torch.tensor([place[key(self.sources[at])] for at in kept])
        nothing = torch.zeros(len(wanted), len(self.index), dtype=torch.float64)
        return self._each(lambda sums: nothing.index_add(0, into, sums[kept].double()), self.index, tuple(wanted))

    def of(self, times: Float[Tensor, "resample source"]) -> Float[Tensor, "resample value"]:
        """The values, with each source counted so many times."""
        mean = (times @ self.above) / (times @ self.below)
        return mean.exp() if self.exponential else mean


def _index(quantities: Iterable[str], of: Iterable[str]) -> pd.MultiIndex:
    return pd.MultiIndex.from_arrays([list(quantities), list(of)], names=["quantity", "of"])


def _routing(result: Result) -> list[Means]:
    assert isinstance(result, RoutingResult)
    cells = [f"layer {layer}, expert {expert}" for layer in result.layers for expert in range(result.n_experts)]
    tokens = result.tokens.double()[:, None]
    layers = [f"layer {layer}" for layer in result.layers]
    shares = [
        Means(
            _index([name] * len(cells), cells),
            result.sources,
            above.double().flatten(1),
            tokens.expand(-1, len(cells)),
            times=result.assignments.double().flatten(1),
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
    """Of variants that are the same in every study, which coalitions that were drawn for one are not."""
    assert isinstance(result, VariantLosses)
    same = [at for at, (what, _, _) in enumerate(result.variants) if not what.endswith(f" {MATCHED}")]
    of = [_names(result.variants)[at] for at in same]
    n = len(of)
    sums = {
        "perplexity": (result.nats, result.tokens),
        "geometric perplexity": (result.row_losses, result.rows),
        "ratio to the whole model": (result.log_ratios()[0], result.tokens),
        "geometric ratio": (result.log_ratios()[1], result.rows),
    }
    return [
        Means(
            _index([name] * n, of),
            result.sources,
            above[:, same],
            below.double()[:, None].expand(-1, n),
            exponential=True,
        )
        for name, (above, below) in sums.items()
    ]


def _names(variants: Sequence[Variant]) -> list[str]:
    """A word says what k experts are left of; several ("mass 0.3") say it all, and k tells those of one name apart."""
    likes, names = Counter(what for what, _, _ in variants), []
    for what, layer, k in variants:
        name = f"k = {k}" if what == "k" else f"{what}, k = {k}"
        if " " in what or (what, k) == (WHOLE, 0):
            name = what if likes[what] == 1 else f"{what}, {k}"
        names.append(name if layer is None else f"{name}, layer {layer}")
    return names


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


def _contrast(result: Result) -> list[Means]:
    assert isinstance(result, ContrastResult)
    cells = [f"layer {at}, expert {expert}" for at in result.layers for expert in range(result.differences.shape[-1])]
    pairs = result.pairs.double()[:, None].expand(-1, len(cells))
    return [Means(_index(["A minus B"] * len(cells), cells), result.sources, result.differences.flatten(1), pairs)]


def _steering(result: Result) -> list[Means]:
    """Of the picked experts and the opposite sign: which coalitions are matched differs from study to study."""
    assert isinstance(result, SteerResult)
    names, effects = [], []
    for at, way in enumerate(result.ways):
        for kind in (PICKED, OPPOSITE):
            run = 1 + result.kinds.index(kind)
            effects.append((-1 if way == "forbid" else 1) * (result.sums[:, at, run] - result.sums[:, at, 0]))
            names.append(f"{way}, {kind}")
    pairs = result.pairs.double()[:, None].expand(-1, len(names))
    return [Means(_index(["effect"] * len(names), names), result.sources, torch.stack(effects, 1).double(), pairs)]


def _probes(result: Result) -> list[Means]:
    """Balanced accuracy is the mean of `recall` and of 1 − `false alarms`; of labels as they are."""
    assert isinstance(result, ProbeResult)
    found = []
    for quantity, has in (("recall", 1), ("false alarms", 0)):
        said = result.said[..., 0, :, has].double()  # [source, layer, kind, label, k]
        n = result.tokens[:, :, 0, has].double()[:, None, None, :, None].expand_as(said)
        axes = [result.layers, KINDS, result.labels, result.k]
        of = [f"{label}, layer {at}, {kind}, k = {k}" for at, kind, label, k in pd.MultiIndex.from_product(axes)]
        index, tokens = _index([quantity] * len(of), of), said.flatten(1)
        found.append(Means(index, result.sources, tokens, n.flatten(1), times=tokens))
    return found


def _overlap(result: Result) -> list[Means]:
    assert isinstance(result, Overlap)
    of = [f"{pair}, layer {layer}" for pair in PAIRS for layer in result.layers]
    tokens = result.tokens.double()[:, None]
    alike = [
        Means(_index([name] * len(of), of), result.sources, same.double().flatten(1) / size, tokens.expand(-1, len(of)))
        for name, same, size in (("overlap", result.same[..., 0], result.top_k), ("top1", result.same[..., 1], 1))
    ]
    swapped = [(1, 0), (3, 2)]  # each beside the model with its own routers
    names = [RUNS[run] for run, _ in swapped]
    added = torch.stack([result.nats[:, run] - result.nats[:, own] for run, own in swapped], 1)
    n = result.predicted.double()[:, None].expand(-1, len(names))
    return [*alike, Means(_index(["added loss"] * len(names), names), result.sources, added.double(), n)]


COMPARED: tuple[tuple[type[Result], Callable[[Result], list[Means]]], ...] = (
    (RoutingResult, _routing),
    (VariantLosses, _losses),
    (SimilarityResult, _similarity),
    (LensTotals, _lens),
    (ContrastResult, _contrast),
    (SteerResult, _steering),
    (ProbeResult, _probes),
    (Overlap, _overlap),
)
"""Kinds of results, and what of each."""
