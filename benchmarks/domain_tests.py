"""How often `compare_domains` finds something where there is nothing, and where there is something.

python -m benchmarks.domain_tests [--draws 1000] [--permutations 199] [--seed 0]

Sources are routed from one and the same distribution in all domains: each source shifts the logits of all experts by
normal draws of its own, so that its tokens depend on one another, and each token chooses the 4 best of 32 experts. What
differs is how many sources a domain has, and of how many tokens. Shares of draws in which any expert of any domain is
significant at 5 % (the family-wise error), and in which the layer's mutual information is, beside those of the plain
test, which permutes labels over sums as they are. Power is the same share, of a third of the draws, where the first
domain prefers one expert by 1.5 in its logit. "mi, excess": mean of information less its null, beside mean information.
"""

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_lens.stats import RoutingResult, compare_domains

EXPERTS, TOP_K = 32, 4
SHIFT = 0.5
"""Standard deviation of what a source adds to an expert's logit."""

PREFERENCE = 1.5
"""What the first domain adds to the logit of one expert, where power is measured."""

Sizes = Callable[[torch.Generator], list[list[int]]]


def unequal(generator: torch.Generator, n: int, mean: float) -> list[int]:
    """Sizes from a lognormal distribution whose logarithm has a standard deviation of 1."""
    sizes = mean * (torch.randn(n, generator=generator) - 0.5).exp()
    return sizes.round().int().clamp(min=5).tolist()


SCENARIOS: dict[str, Sizes] = {
    "12 × 60 | 12 × 60": lambda g: [[60] * 12, [60] * 12],  # noqa: ARG005
    "10 × 20 | 30 × 200": lambda g: [[20] * 10, [200] * 30],  # noqa: ARG005
    "30 × 20 | 10 × 200": lambda g: [[20] * 30, [200] * 10],  # noqa: ARG005
    "1000, 9 × 20 | 12 × 60": lambda g: [[1000, *[20] * 9], [60] * 12],  # noqa: ARG005
    "1000, 9 × 20 | 1000, 9 × 20": lambda g: [[1000, *[20] * 9], [1000, *[20] * 9]],  # noqa: ARG005
    "400, 9 × 20 | 400, 9 × 20": lambda g: [[400, *[20] * 9], [400, *[20] * 9]],  # noqa: ARG005
    "4000, 19 × 100 | 20 × 200": lambda g: [[4000, *[100] * 19], [200] * 20],  # noqa: ARG005
    "12 of ~40 | 20 of ~100": lambda g: [unequal(g, 12, 40), unequal(g, 20, 100)],
    "10 of ~30 | 15 of ~60 | 30 of ~150": lambda g: [unequal(g, 10, 30), unequal(g, 15, 60), unequal(g, 30, 150)],
}
"""Tokens of each source, by domain; "of ~40": of unequal sizes, 40 on average."""


def routed(generator: torch.Generator, sizes: Sequence[int], logits: Tensor, shift: float = SHIFT) -> RoutingResult:
    """Counts of sources of these sizes."""
    shifted = logits + shift * torch.randn(len(sizes), EXPERTS, generator=generator)
    source = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    noise = torch.empty(len(source), EXPERTS).exponential_(generator=generator).log()
    chosen = (shifted[source] - noise).topk(TOP_K).indices
    counts = torch.zeros(len(sizes), EXPERTS, dtype=torch.long)
    counts.view(-1).index_add_(
        0, (source[:, None] * EXPERTS + chosen).flatten(), torch.ones(chosen.numel(), dtype=torch.long)
    )
    nothing = torch.zeros(len(sizes), 1, 2)
    return RoutingResult(
        layers=(0,),
        top_k=TOP_K,
        sources=tuple(f"s{i:03d}" for i in range(len(sizes))),
        tokens=torch.tensor(sizes),
        assignments=counts[:, None],
        top1=torch.zeros_like(counts[:, None]),
        weights=torch.zeros(len(sizes), 1, EXPERTS),
        sums=nothing,
        measured=nothing.long(),
    )


def draw(generator: torch.Generator, sizes: Sizes, preference: float = 0.0) -> dict[str, RoutingResult]:
    """Domains of these sizes; the first prefers one of the experts, by so much in its logit."""
    popular = torch.randn(EXPERTS, generator=generator)
    preferred = torch.zeros(EXPERTS).index_fill_(0, popular.argsort()[EXPERTS // 2], preference)
    return {f"d{i}": routed(generator, of, popular + preferred * (i == 0)) for i, of in enumerate(sizes(generator))}


def plain(results: dict[str, RoutingResult], permutations: int, seed: int) -> tuple[float, float]:
    """Least p-value of all experts, and that of mutual information, with labels permuted over sums as they are."""
    counts = torch.cat([result.assignments[:, 0].double() for result in results.values()])
    tokens = torch.cat([result.tokens.double() for result in results.values()])
    labels = torch.cat([torch.full((len(result.sources),), i) for i, result in enumerate(results.values())])
    order = torch.rand(permutations, len(labels), generator=torch.Generator().manual_seed(seed)).argsort(-1)
    member = torch.nn.functional.one_hot(torch.cat([labels[None], labels[order]])).double().mT
    shares = member @ counts / (member @ tokens)[..., None]
    differences = shares - (shares.sum(1, keepdim=True) - shares) / (shares.shape[1] - 1)
    z = ((differences - differences.mean(0)) / differences.std(0)).nan_to_num(0, 0, 0).abs().amax((1, 2))
    load = shares / TOP_K
    information = torch.special.entr(load.mean(1)).sum(-1) - torch.special.entr(load).sum(-1).mean(1)
    return tuple(float((value >= value[0] - 1e-9).double().mean()) for value in (z, information))  # pyright: ignore[reportReturnType]


def rates(sizes: Sizes, *, draws: int, permutations: int, seed: int) -> dict[str, float]:
    """Shares of draws with something found, by what was looked for."""
    generator = torch.Generator().manual_seed(seed)
    found = dict.fromkeys(("experts", "experts, plain", "mi", "mi, plain", "power", "power, plain"), 0)
    excess = information = 0.0
    for i in range(draws):
        nothing = draw(generator, sizes)
        ours, plainly = compare_domains(nothing, permutations=permutations, seed=i), plain(nothing, permutations, i)
        found["experts"] += float(ours.p_values.min()) <= 0.05
        found["experts, plain"] += plainly[0] <= 0.05
        found["mi"] += float(ours.mi_p_values[0]) <= 0.05
        found["mi, plain"] += plainly[1] <= 0.05
        excess, information = excess + float(ours.mi - ours.mi_null), information + float(ours.mi)
        if i % 3:
            continue
        something = draw(generator, sizes, PREFERENCE)
        found["power"] += float(compare_domains(something, permutations=permutations, seed=i).p_values.min()) <= 0.05
        found["power, plain"] += plain(something, permutations, i)[0] <= 0.05
    of = {name: (draws + 2) // 3 if name.startswith("power") else draws for name in found}
    return {**{name: n / of[name] for name, n in found.items()}, "mi, excess": excess / information}


def main() -> None:
    """Print a row for each scenario."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--permutations", type=int, default=199)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    error = 2 * (0.05 * 0.95 / args.draws) ** 0.5
    print(
        f"{args.draws} draws: a test of level .05 gives {0.05 - error:.3f} to {0.05 + error:.3f} (two standard errors)"
    )
    for name, sizes in SCENARIOS.items():
        found = rates(sizes, draws=args.draws, permutations=args.permutations, seed=args.seed)
        print(f"{name:36s}" + "  ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
