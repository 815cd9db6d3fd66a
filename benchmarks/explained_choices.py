"""How often `explain_choices` says that a feature gains where it means nothing, and where it means something.

python -m benchmarks.explained_choices [--draws 60]

Two domains of 12 sources with 60 tokens each, 40 types of tokens of which small numbers are frequent, two of eight
experts chosen by logits that are the token's (standard deviation 1), the source's (0, 0.3 or 0.8), the domain's (0 or
0.5) and Gumbel noise. Printed is the share of draws in which the lower end of the interval of the gain is above 0.
"""

import argparse

import torch
from torch import Tensor

from moe_lens.stats import TokenSampleResult, explain_choices


def draw(seed: int, of_source: float, of_domain: float) -> dict[str, TokenSampleResult]:
    """The sample of each domain."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    token, found = normal(40, 8), {}
    place, document = torch.arange(60).expand(12, 60), torch.arange(12)[:, None].expand(12, 60)
    for domain in "ab":
        tokens = (torch.rand(12, 60, generator=generator) ** 2 * 40).long()
        noise = -(-torch.rand(12, 60, 8, generator=generator).clamp(min=1e-9).log()).log()
        logits = token[tokens] + of_source * normal(12, 1, 8) + of_domain * normal(8) + noise
        previous = torch.cat([torch.full((12, 1), -1), tokens[:, :-1]], 1)
        about = torch.stack([tokens, previous, document, place, place], -1).flatten(0, 1)
        source = tuple(f"s{i}" for i in range(12) for _ in range(60))
        found[domain] = TokenSampleResult((0,), 8, source, about, logits.topk(2).indices.flatten(0, 1)[:, None])
    return found


def main() -> None:
    """Print a row for each kind of routing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=60)
    given = parser.parse_args()
    for of_source, of_domain in ((0.0, 0.0), (0.3, 0.0), (0.8, 0.0), (0.3, 0.5)):
        frames = [
            explain_choices(draw(seed, of_source, of_domain)).per_layer().set_index("feature").iloc[1:]
            for seed in range(given.draws)
        ]
        gains = sum((frame["gain_low"] > 0).astype(float) for frame in frames) / given.draws
        told = ", ".join(f"{name} {share:.2f}" for name, share in gains.items())
        print(f"source {of_source}, domain {of_domain}: {told}")


if __name__ == "__main__":
    main()
