"""How often `compare` finds a difference where there is none, and where there is one.

python -m benchmarks.compared [--draws 400] [--resamples 400] [--seed 0]

Both sides are drawn from one distribution. Shares: each of 32 experts is chosen as `benchmarks.domain_tests` has it, by
independent tokens ("tokens"), or with tastes of each source, too ("sources"). Losses: sums over tokens that are skewed,
and that sources shift by normal draws. Shown is the share of draws in which any of a table's p-values is at most .05.
Power is that of shares with tastes where the second side prefers one expert by 1.5 in its logit.
"""

import argparse
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from benchmarks.domain_tests import EXPERTS, PREFERENCE, SCENARIOS, Sizes, routed, unequal
from moe_lens.stats.multiple_tests import max_t
from moe_lens.studies.chance_differences import paired, unpaired
from moe_lens.studies.comparable import Means

PAIRED: dict[str, Sizes] = {
    "12 × 60": lambda g: [[60] * 12],  # noqa: ARG005
    "1000, 9 × 20": lambda g: [[1000, *[20] * 9]],  # noqa: ARG005
    "30 of ~100": lambda g: [unequal(g, 30, 100)],
}
LOSSES = 8


def shares(generator: torch.Generator, sizes: Sequence[int], logits: Tensor, tastes: bool) -> Means:
    """Of experts; with a table of many, in which some are rare."""
    result = routed(generator, sizes, logits, 0.5 if tastes else 0.0)
    counts, tokens = result.assignments[:, 0].double(), result.tokens.double()[:, None].expand(-1, EXPERTS)
    return Means(pd.RangeIndex(EXPERTS), result.sources, counts, tokens, times=counts)


def losses(generator: torch.Generator, sizes: Sequence[int]) -> Means:
    """Of several variants of a model."""
    tokens = torch.tensor(sizes).double()[:, None].expand(-1, LOSSES)
    each = torch.stack([torch.empty(n, LOSSES).exponential_(generator=generator).sum(0) for n in sizes])
    sums = (2 + 0.3 * torch.randn(len(sizes), LOSSES, generator=generator)) * tokens + each
    return Means(pd.RangeIndex(LOSSES), tuple(map(str, range(len(sizes)))), sums, tokens)


def found(one: Means, other: Means, same: bool, resamples: int, seed: int) -> bool:
    """Whether any difference stands."""
    t, by_chance = (paired if same else unpaired)(one, other, resamples, seed)
    return bool((max_t(t, by_chance.abs().amax(1)) <= 0.05).any())


def rates(sizes: Sizes, *, draws: int, resamples: int, seed: int) -> dict[str, float]:
    """Shares of draws with something found. One domain's sizes are those of both sides, which are paired."""
    generator = torch.Generator().manual_seed(seed)
    count: dict[str, int] = dict.fromkeys(("tokens", "sources", "losses", "power"), 0)
    for number in range(draws):
        given = sizes(generator)
        one, other = given[0], given[-1]
        popular = torch.randn(EXPERTS, generator=generator)
        preferred = popular.index_add(0, popular.argsort()[EXPERTS // 2][None], torch.tensor([PREFERENCE]))
        sides: dict[str, list[Means]] = {
            "tokens": [shares(generator, of, popular, False) for of in (one, other)],
            "sources": [shares(generator, of, popular, True) for of in (one, other)],
            "losses": [losses(generator, of) for of in (one, other)],
        }
        sides["power"] = [sides["sources"][0], shares(generator, other, preferred, True)]
        for name, (first, second) in sides.items():
            count[name] += found(first, second, len(given) == 1, resamples, number)
    return {name: n / draws for name, n in count.items()}


def main() -> None:
    """Print a row for each scenario."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--resamples", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    asked = vars(parser.parse_args())
    torch.set_num_threads(1)
    two = {name: sizes for name, sizes in SCENARIOS.items() if name.count("|") == 1}
    print("| sources × tokens | tokens | sources | losses | power |")
    for name, sizes in {**PAIRED, **two}.items():
        print(f"| {name} | " + " | ".join(f"{rate:.3f}" for rate in rates(sizes, **asked).values()) + " |", flush=True)


if __name__ == "__main__":
    main()
