"""How often the jackknife's intervals hold the true value, and how often experts are starred that cost nothing.

python -m benchmarks.jackknife [--draws 20000] [--divergences 200] [--seed 0]

Of sources of equal sizes, and where few hold most of the text. Means: each source adds an effect of its own to an
expert's cost, which is 0 on average (standard deviation .1), and each token (.3). "starred" is the share of draws in
which the interval of the cost lies above 0, which a star asks for (see `moe_lens.studies.held_against`): as one test
(at most .025 is claimed), and as one of ten (.0025 for each); "mean" is the coverage of its 95 % interval. "difference"
is that of the mean of one domain less the mean of another, whose sources are the same ones, with half of their effect
in common. JSD: coverage of the divergence of two domains of such sources by `compare_domains`; tokens choose the 4 best
of 32 experts; "parallel": where the sources of both domains are the same ones.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.domain_tests import EXPERTS, routed, unequal
from moe_lens.resampling import jackknife_interval
from moe_lens.stats import RoutingResult, compare_domains
from moe_lens.stats.domain_pairs import information, normalised
from moe_lens.studies.held_against import LEVEL

OWN, TOKEN = 0.1, 0.3
SHARED, ALONE = 0.3, 0.3
"""Standard deviations of what a source adds to logits in all domains, and in each."""

SIZES: dict[str, Callable[[torch.Generator], list[int]]] = {
    "10 × 60": lambda g: [60] * 10,  # noqa: ARG005
    "2 × 5,000, 8 × 100": lambda g: [5000] * 2 + [100] * 8,  # noqa: ARG005
    "3 × 3,000, 9 × 50": lambda g: [3000] * 3 + [50] * 9,  # noqa: ARG005
    "1 × 5,000, 9 × 50": lambda g: [5000] + [50] * 9,  # noqa: ARG005
    "4 × 2,000, 16 × 40": lambda g: [2000] * 4 + [40] * 16,  # noqa: ARG005
    "10 of ~200": lambda g: unequal(g, 10, 200),
    "20 of ~200": lambda g: unequal(g, 20, 200),
}


def of_means(generator: torch.Generator, sizes: Tensor, draws: int) -> dict[str, Tensor]:
    """What was found in each draw."""

    def normal() -> Tensor:
        return torch.randn(len(sizes), draws, generator=generator, dtype=torch.float64)

    def means(own: Tensor) -> tuple[Tensor, Tensor]:
        """Of all sources, and without each one."""
        sums = sizes[:, None] * OWN * own + sizes.sqrt()[:, None] * TOKEN * normal()
        return sums.sum(0) / sizes.sum(), (sums.sum(0) - sums) / (sizes.sum() - sizes)[:, None]

    strata, shared = torch.zeros(len(sizes), dtype=torch.long), normal()
    one, other = (means((shared + normal()) / 2**0.5) for _ in range(2))
    low, high = jackknife_interval(*one, strata, sizes)
    of_ten, _ = jackknife_interval(*one, strata, sizes, level=1 - (1 - LEVEL) / 10)
    both = one[0] - other[0], one[1] - other[1]
    near, far = jackknife_interval(*both, strata, torch.stack([sizes, sizes], 1))
    return {
        "starred": low > 0,
        "of ten": of_ten > 0,
        "mean": (low <= 0) & (high >= 0),
        "difference": (near <= 0) & (far >= 0),
    }


def of_divergences(
    generator: torch.Generator, sizes: Callable[[torch.Generator], list[int]]
) -> Callable[[], dict[str, bool]]:
    """Draws of two domains, whose true divergence is that of many sources."""
    logits = 0.7 * torch.randn(2, EXPERTS, generator=generator)

    def domains(given: list[list[int]], shared: list[Tensor]) -> dict[str, RoutingResult]:
        return {f"d{i}": routed(generator, given[i], logits[i] + SHARED * shared[i], shift=ALONE) for i in range(2)}

    def tastes(n: int) -> Tensor:
        return torch.randn(n, EXPERTS, generator=generator)

    many = domains([[20] * 20_000] * 2, [tastes(20_000), tastes(20_000)])
    loads = torch.stack([normalised(of.assignments.sum(0).double()) for of in many.values()])
    truth = float(information(loads)[0])

    def draw() -> dict[str, bool]:
        one, other = sizes(generator), sizes(generator)
        same = tastes(len(one))
        found = {}
        apart, parallel = domains([one, other], [tastes(len(one)), tastes(len(other))]), domains([one] * 2, [same] * 2)
        for name, of, key in (("JSD", apart, None), ("JSD, parallel", parallel, str)):
            row = compare_domains(of, permutations=1, parallel=key).per_pair().iloc[0]
            found[name] = bool(row["low"] <= truth <= row["high"])
        return found

    return draw


def rates(
    sizes: Callable[[torch.Generator], list[int]], *, draws: int, divergences: int, seed: int
) -> dict[str, float]:
    """Shares of draws, by what was asked; of means, a hundred draws have the same sizes."""
    generator = torch.Generator().manual_seed(seed)
    means = [of_means(generator, torch.tensor(sizes(generator)).double(), 100) for _ in range(draws // 100)]
    draw = of_divergences(generator, sizes)
    found = [draw() for _ in range(divergences)]
    return {name: float(torch.cat([one[name] for one in means]).double().mean()) for name in means[0]} | {
        name: sum(one[name] for one in found) / divergences for name in found[0]
    }


def main() -> None:
    """Print a row for each kind of sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20000)
    parser.add_argument("--divergences", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = vars(parser.parse_args())
    torch.set_num_threads(1)
    for name, sizes in SIZES.items():
        found = rates(sizes, **asked)
        print(f"{name:20s}" + "  ".join(f"{key} {value:.4f}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
