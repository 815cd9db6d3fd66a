"""How often the 95 % intervals of `moe_lens.stats.bootstrap` hold the true value, with few sources of unequal sizes.

python -m benchmarks.intervals [--draws 1000] [--seed 0]

Sources have as many tokens as a lognormal distribution says: 100 on average, the logarithm with deviation 0 or 1.
Three quantities, each a ratio of sums over sources: the share of an expert that a tenth of the tokens choose, of one
that 2 % choose (normal logits by source, standard deviation 0.7 and 1.2), and a mean loss (by source 3 ± 0.5 nats, by
token ± 2). Coverage is the share of draws in which the interval holds the true value, beside that of plain percentiles;
width is the ratio of their median widths.

And how often those of the evenness of a layer's load do: 64 experts, top-6, sources of equal sizes, logits of experts
that are normal, and by source shift normally; beside the coverage of the bootstrap, which `experts_50` and `experts_80`
would have. The last number is that of verdict 1b: how many experts take half, the last in part, mean over 27 layers.
"""

import argparse

import torch
from torch import Tensor

from moe_lens.resampling import jackknife_interval
from moe_lens.stats import RoutingResult, bootstrap_all, load_evenness

EVENNESS = {
    "gini": load_evenness.gini,
    "load_entropy": load_evenness.entropy,
    "imbalance": load_evenness.imbalance,
    "experts_50": lambda load: load_evenness.experts_covering(load, 0.5).double(),
    "experts_80": lambda load: load_evenness.experts_covering(load, 0.8).double(),
}
LOADS = [
    (n, tokens, *spread)
    for n, tokens in ((10, 60), (10, 200), (30, 200), (12, 1000))
    for spread in ((0.0, 0.0), (0.1, 0.0), (0.3, 0.3), (0.7, 0.3))
] + [(15, 137, 0.3, 0.8)]
"""Sources, tokens of each, deviation of the logits of experts, and of their shift by source."""
KINDS = ("share 10 %", "share 2 %", "loss")


def draw(generator: torch.Generator, kind: str, draws: int, n: int, unequal: float) -> tuple[Tensor, Tensor]:
    """Sums and sizes of sources, [draw, source]."""

    def normal() -> Tensor:
        return torch.randn(draws, n, generator=generator, dtype=torch.float64)

    sizes = (100 * (unequal * normal() - unequal**2 / 2).exp()).round().clamp(min=5)
    if kind == "loss":
        return sizes * (3 + 0.5 * normal()) + 2 * sizes.sqrt() * normal(), sizes
    logit, spread = (-2.4, 0.7) if kind == "share 10 %" else (-4.5, 1.2)
    return torch.binomial(sizes, (logit + spread * normal()).sigmoid(), generator=generator), sizes


def coverage(kind: str, n: int, unequal: float, draws: int, seed: int) -> tuple[float, float, float]:
    """Share of intervals that hold the true value, that of plain percentiles, and how much wider the first are."""
    generator = torch.Generator().manual_seed(seed)
    sums, sizes = draw(generator, kind, 400, 1000, unequal)
    truth = float(sums.sum() / sizes.sum())
    sums, sizes = draw(generator, kind, draws, n, unequal)
    held = torch.zeros(2, draws)
    width = torch.zeros(2, draws)
    for i in range(draws):
        values: list[Tensor] = []

        def mean(times: Tensor, i: int = i, values: list[Tensor] = values) -> Tensor:
            values.append((times @ sums[i]) / (times @ sizes[i]))
            return values[0]

        ends = bootstrap_all(mean, sizes[i], seed=i)
        assert ends is not None
        plain = values[0].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        for j, (low, high) in enumerate((ends.tolist(), plain.tolist())):
            held[j, i], width[j, i] = low <= truth <= high, high - low
    share = held.mean(1).tolist()
    medians = width.median(1).values
    return share[0], share[1], float(medians[0] / medians[1])


def evenness(n: int, tokens: int, spread: float, by_source: float, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Share of intervals that hold the true value of each of `EVENNESS`, and of those of the bootstrap."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(64, generator=generator, dtype=torch.float64)

    def shares(sources: int) -> Tensor:
        shift = torch.randn(sources, 64, generator=generator, dtype=torch.float64)
        return (6 * (logits + by_source * shift).softmax(-1)).clamp(max=1)

    truth = measured(shares(100_000).mean(0))
    held = torch.zeros(2, draws, len(EVENNESS))
    names, size, none = tuple(map(str, range(n))), torch.full((n,), tokens), torch.zeros(n, 1, 2)
    for i in range(draws):
        counts = torch.binomial(torch.full((n, 64), float(tokens)).double(), shares(n), generator=generator)
        of = counts.long()[:, None]
        rows = RoutingResult((0,), 6, names, size, of, of, counts[:, None], none.double(), none.long()).per_layer()
        ours = torch.tensor(rows.set_index("measure").loc[list(EVENNESS), ["low", "high"]].to_numpy()).T
        resampled = bootstrap_all(lambda times, counts=counts: measured(times @ counts), size, seed=i)
        assert resampled is not None
        for j, (low, high) in enumerate((ours, resampled)):
            held[j, i] = ((low <= truth + 1e-12) & (truth - 1e-12 <= high)).float()  # of an even load
            held[j, i, low.isnan()] = torch.nan
    return held[0].mean(0), held[1].mean(0)


def half(n: int, tokens: int, spread: float, by_source: float, draws: int, seed: int, layers: int = 27) -> Tensor:
    """Share of intervals that hold the true mean over layers of the experts for half, as in verdict 1b; mean error."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(layers, 64, generator=generator, dtype=torch.float64)

    def shares(sources: int) -> Tensor:
        shift = torch.randn(sources, layers, 64, generator=generator, dtype=torch.float64)
        return (6 * (logits + by_source * shift).softmax(-1)).clamp(max=1)

    def mean(load: Tensor) -> Tensor:
        return load_evenness.experts_covering_in_part(load, 0.5).mean(-1)

    truth = float(mean(torch.stack([shares(1000).sum(0) for _ in range(20)]).sum(0)))
    found: list[tuple[bool, float]] = []
    one, sizes = torch.zeros(n, dtype=torch.long), torch.full((n,), tokens)
    for _ in range(draws):
        counts = torch.binomial(torch.full((n, layers, 64), float(tokens)).double(), shares(n), generator=generator)
        total = counts.sum(0)
        low, high = jackknife_interval(mean(total), mean(total - counts), one, sizes, corrected=True)
        found.append((bool(low <= truth <= high), float((low + high) / 2 - truth)))
    return torch.tensor(found).mean(0)


def measured(load: Tensor) -> Tensor:
    """Each of `EVENNESS`, in the last axis."""
    return torch.stack([measure(load) for measure in EVENNESS.values()], -1)


def main() -> None:
    """Print a row for each quantity, number of sources and inequality; and for each of `LOADS`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for kind in KINDS:
        for unequal in (0.0, 1.0):
            for n in (10, 20, 30):
                ours, plain, wider = coverage(kind, n, unequal, args.draws, args.seed)
                sizes = "unequal" if unequal else "equal"
                row = f"{kind:11s} {n} sources of {sizes:8s} coverage {ours:.3f}, percentiles {plain:.3f}"
                print(f"{row}, width × {wider:.2f}", flush=True)
    for n, tokens, spread, by_source in LOADS:
        covered = zip(EVENNESS, *evenness(n, tokens, spread, by_source, args.draws, args.seed), strict=True)
        said = ", ".join(f"{name} {ours:.3f} (bootstrap {plain:.3f})" for name, ours, plain in covered)
        held, error = half(n, tokens, spread, by_source, args.draws, args.seed).tolist()
        said += f", half in part {held:.3f}, off by {error:.2f} experts"
        print(f"{n} sources of {tokens}, deviations {spread} and {by_source}: {said}", flush=True)


if __name__ == "__main__":
    main()
