"""Sources that are one document in several domains, as a chapter in three languages: kept together wherever they go."""

import random
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.errors import InputError
from moe_lens.resampling import times_drawn, units

LANGUAGE = r"(?<=/)[a-z]{2,3}([-_][A-Za-z]{2,4})?(?=/)"
"""A language code between slashes: `handbook/de-DE/backup.html` and `handbook/fr-FR/backup.html` are parallel."""

LEAST_SOURCES = 3
"""Of a domain: to be fitted, to choose penalties, and to be predicted."""


def parallel_blocks(sources: Mapping[str, Sequence[str]], differ: str = LANGUAGE) -> dict[str, dict[str, str]]:
    """The block that each source of each domain belongs to: sources of one block are parallel.

    Args:
        sources: Of each domain.
        differ: A regular expression of what may differ in the names of parallel sources.

    Raises:
        InputError: It is no regular expression.
    """
    key = parallel_key(differ)
    return {domain: {name: key(name) for name in names} for domain, names in sources.items()}


def parallel_key(differ: str = LANGUAGE) -> Callable[[str], str]:
    """From the name of a source to what parallel ones have in common.

    Args:
        differ: A regular expression of what may differ in the names of parallel sources.

    Raises:
        InputError: It is no regular expression.
    """
    try:
        pattern = re.compile(differ)
    except re.error as error:
        raise InputError(
            f"{differ!r} is no regular expression ({error}); expected what parallel names differ in"
        ) from None
    return lambda name: pattern.sub("*", name, count=1)


def too_few_sources(
    sources: Mapping[str, Sequence[str]], parallel: Callable[[str], str] | None = None
) -> dict[str, int]:
    """Domains with fewer than `LEAST_SOURCES` sources, parallel ones being one, and how many they have.

    Args:
        sources: Of each row of each domain.
        parallel: See `parallel_key`; if not given, none are parallel.
    """
    sizes = {name: len(set(units(of, [name] * len(of), parallel))) for name, of in sources.items()}
    return {name: n for name, n in sizes.items() if n < LEAST_SOURCES}


def balanced_halves(blocks: Mapping[str, Mapping[str, str]], seed: int = 0) -> dict[str, dict[str, int]]:
    """Deal blocks into two halves, 0 and 1, so that each domain's sources are in both evenly; a half for each source.

    Blocks come in random order, those of several domains first; each goes to the half where its domains have fewer
    sources so far.

    Args:
        blocks: Of each domain's sources; see `parallel_blocks`.
        seed: Of the random division.
    """
    counts: dict[str, dict[str, int]] = {}
    for domain, of in blocks.items():
        for block in of.values():
            counts.setdefault(block, {}).setdefault(domain, 0)
            counts[block][domain] += 1
    order = sorted(counts)
    shuffled = random.Random(seed)
    shuffled.shuffle(order)
    order.sort(key=lambda block: -len(counts[block]))
    surplus = dict.fromkeys(blocks, 0)
    half: dict[str, int] = {}
    for block in order:
        lean = sum(surplus[domain] * n for domain, n in counts[block].items())
        half[block] = int(lean > 0) if lean else shuffled.randrange(2)
        for domain, n in counts[block].items():
            surplus[domain] += n if half[block] == 0 else -n
    return {domain: {name: half[block] for name, block in of.items()} for domain, of in blocks.items()}


def resampled_blocks(
    blocks: Mapping[str, Mapping[str, str]], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Float[Tensor, "resample source"]]:
    """How often each source is drawn, blocks being drawn with replacement: parallel sources are drawn together.

    Domains that share blocks are one stratum; each stratum draws as many blocks as it has. A domain of it then has a
    few sources more or fewer than it had, so that statistics must be ratios of sums.

    Args:
        blocks: Of each domain's sources, in the order of the sums that they will weigh.
        resamples: How many times.
        seed: Of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    times: dict[str, Tensor] = {}
    for domains in _strata(blocks):
        names = sorted({block for domain in domains for block in blocks[domain].values()})
        of_block = times_drawn(len(names), resamples, generator)
        place = {name: i for i, name in enumerate(names)}
        for domain in domains:
            times[domain] = of_block[:, [place[block] for block in blocks[domain].values()]]
    return times


def blocks_left_out(
    blocks: Mapping[str, Mapping[str, str]],
) -> tuple[dict[str, Float[Tensor, "block source"]], Int[Tensor, " block"]]:
    """How often each source counts where one block is left out, for the jackknife: parallel sources go together.

    Args:
        blocks: Of each domain's sources, in the order of the sums that they will weigh.

    Returns:
        By domain: 0 or 1 for each block of any domain and each of the domain's sources; and the stratum of each block:
        domains that share blocks are one.
    """
    found: list[tuple[int, str, list[str]]] = []
    for stratum, domains in enumerate(_strata(blocks)):
        names = sorted({block for domain in domains for block in blocks[domain].values()})
        found += [(stratum, name, domains) for name in names]
    times = {
        domain: torch.tensor(
            [[float(domain not in domains or block != name) for block in of.values()] for _, name, domains in found],
            dtype=torch.float64,
        )
        for domain, of in blocks.items()
    }
    return times, torch.tensor([stratum for stratum, _, _ in found])


def _strata(blocks: Mapping[str, Mapping[str, str]]) -> list[list[str]]:
    """Domains that are linked by blocks of both, directly or through others."""
    groups: list[tuple[list[str], set[str]]] = []
    for domain, of in blocks.items():
        linked = [group for group in groups if group[1] & set(of.values())]
        groups = [group for group in groups if group not in linked]
        groups.append(([d for g in linked for d in g[0]] + [domain], set(of.values()).union(*(g[1] for g in linked))))
    return [domains for domains, _ in groups]
