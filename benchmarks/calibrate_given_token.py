"""How often `conditional_information` finds something where there is nothing, and where there is something.

python -m benchmarks.calibrate_given_token [--draws 320] [--permutations 199] [--vocabulary 20 300 5000 10000]

Two domains of 20 sources each, or 10, of 200 tokens on average; each token chooses the 6 best of 64 experts. Tokens
follow Zipf's law. Under "unigram" each token of the vocabulary has experts of its own, and half of the tokens have
other ranks in the second domain; "+ sources": so, sources are of very unequal sizes, and each shifts the logits of all
experts by normal draws (standard deviation .3); "book": so, but one source of the first domain has 4,000 tokens and its
others 100, those of the second 200; "effect": as "+ sources", and each domain shifts them, too (.15). Shares of draws
with p ≤ .05, of draws whose 95 % interval holds 0, the mean excess, and the share of the text that could be tested.
"""

import argparse
from dataclasses import dataclass

import numpy as np
import torch

from moe_lens.stats import ConditionalInformation, VocabularyResult, conditional_information

EXPERTS, TOP_K = 64, 6


@dataclass(frozen=True)
class Scenario:
    """Standard deviations of what is added to logits: by the token, the source and the domain."""

    token: float = 0.0
    source: float = 0.0
    domain: float = 0.0
    unequal: bool = False
    """Sources of the first domain are long, of the second short, and both of very different sizes."""
    book: bool = False
    """Beside one source of 4,000 tokens the others of the first domain have 100."""


SCENARIOS = {
    "uniform": Scenario(),
    "unigram": Scenario(token=1.0),
    "unigram + sources": Scenario(token=1.0, source=0.3, unequal=True),
    "book": Scenario(token=1.0, source=0.3, book=True),
    "effect": Scenario(token=1.0, source=0.3, domain=0.15, unequal=True),
}


def draw(rng: np.random.Generator, vocabulary: int, sources: int, how: Scenario) -> list[VocabularyResult]:
    """Counts of two domains."""
    frequency = 1 / np.arange(1, vocabulary + 1)
    other = frequency.copy()
    if how.token:
        changed = rng.permutation(vocabulary)[: vocabulary // 2]
        other[changed] = frequency[rng.permutation(changed)]
    slowness = np.exp(-how.token * rng.normal(size=(vocabulary, EXPERTS)))
    found = []
    for d, weights in enumerate((frequency, other)):
        shift = how.domain * rng.normal(size=EXPERTS)
        keys, first = [], []
        tokens = 0
        for source in range(sources):
            n = 200
            if how.unequal:
                n = int(np.clip(rng.lognormal(np.log(n * (0.4 if d else 1.5)), 0.9), 20, 4000))
            if how.book and not d:
                n = 100 if source else 4000
            token = rng.choice(vocabulary, n, p=weights / weights.sum())
            own = shift + how.source * rng.normal(size=EXPERTS)
            # the smallest of exponential draws with these rates: the largest of the logits with Gumbel noise
            waits = rng.standard_exponential((n, EXPERTS), dtype=np.float32) * slowness[token] * np.exp(-own)
            chosen = np.argpartition(waits, TOP_K, 1)[:, :TOP_K]
            cell = (source * vocabulary + token)[:, None] * EXPERTS + chosen
            keys.append(cell.ravel())
            first.append(cell[:, 0])
            tokens += n
        found.append(counted(np.concatenate(keys), np.concatenate(first), vocabulary, sources, tokens))
    return found


def counted(keys: np.ndarray, first: np.ndarray, vocabulary: int, sources: int, tokens: int) -> VocabularyResult:
    """What `VocabularyStats` would give, each source in a group of its own."""
    cells, assigned = np.unique(keys, return_counts=True)
    leading, counts = np.unique(first, return_counts=True)
    top1 = np.zeros_like(assigned)
    top1[np.searchsorted(cells, leading)] = counts
    return VocabularyResult(
        by="input",
        layers=(1,),
        n_experts=EXPERTS,
        top_k=TOP_K,
        d_vocab=vocabulary,
        groups=max(2, sources),
        n_tokens=tokens,
        keys=torch.from_numpy(cells),
        assigned=torch.from_numpy(assigned),
        top1=torch.from_numpy(top1),
    )


def rates(
    how: Scenario, vocabulary: int, sources: int, *, draws: int, permutations: int, seed: int
) -> dict[str, float]:
    """Shares of draws with something found, whose interval covers 0, and of the text that could be tested."""
    found: list[ConditionalInformation] = []
    for i in range(draws):
        rng = np.random.default_rng([seed, i, vocabulary, sources])
        results = draw(rng, vocabulary, sources, how)
        found.append(conditional_information(dict(zip("ab", results, strict=True)), permutations=permutations, seed=i))
    return {
        "p ≤ .05": sum(float(one.p_values[0]) <= 0.05 for one in found) / draws,
        "0 inside": sum(float(one.low[0]) <= 0 <= float(one.high[0]) for one in found) / draws,
        "mean excess": sum(float(one.excess[0]) for one in found) / draws,
        "shared": sum(float(one.shared[0]) for one in found) / draws,
    }


def main() -> None:
    """Print a row for each number of sources, vocabulary and scenario."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=320)
    parser.add_argument("--permutations", type=int, default=199)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[20, 300, 5000, 10000])
    parser.add_argument("--sources", type=int, nargs="+", default=[20, 10])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    error = 2 * (0.05 * 0.95 / args.draws) ** 0.5
    print(
        f"{args.draws} draws: a test of level .05 gives {0.05 - error:.3f} to {0.05 + error:.3f} (two standard errors)"
    )
    for sources in args.sources:
        for vocabulary in args.vocabulary:
            for name, how in SCENARIOS.items():
                how_often = {"draws": args.draws, "permutations": args.permutations, "seed": args.seed}
                found = rates(how, vocabulary, sources, **how_often)
                told = "  ".join(f"{key} {value:.3f}" for key, value in found.items())
                print(f"{sources:2d} + {sources:2d} sources, V {vocabulary:5d}, {name:18s} {told}", flush=True)


if __name__ == "__main__":
    main()
