"""How often the 95 % intervals of `moe_lens.stats.bootstrap` hold the true value, with few sources of unequal sizes.

python -m benchmarks.intervals [--draws 1000] [--seed 0]

Sources have as many tokens as a lognormal distribution says: 100 on average, the logarithm with deviation 0 or 1.
Three quantities, each a ratio of sums over sources: the share of an expert that a tenth of the tokens choose, of one
that 2 % choose (normal logits by source, standard deviation 0.7 and 1.2), and a mean loss (by source 3 ± 0.5 nats, by
token ± 2). Coverage is the share of draws in which the interval holds the true value, beside that of plain percentiles;
width is the ratio of their median widths.
"""

import argparse

import torch
from torch import Tensor

from moe_lens.stats import bootstrap_all

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


def main() -> None:
    """Print a row for each quantity, number of sources and inequality."""
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


if __name__ == "__main__":
    main()
