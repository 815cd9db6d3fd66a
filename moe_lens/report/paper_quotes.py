"""Where the paper says each claim, in its own words, what its authors measured of it, and where this page answers it.

Quotations are of the abstract of arXiv 2603.05806. The authors' numbers are those of `published_numbers`, which are
of DeepSeekMoE 16B and their texts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moe_lens.report.published_numbers import MODEL, PUBLISHED
from moe_lens.report.rendering import ranged


@dataclass(frozen=True)
class Quoted:
    """A claim as the paper makes it."""

    quote: str
    place: str
    authors: str
    """What the released data say of it."""
    section: str
    """The anchor of the section that shows what was measured."""


_ALL = PUBLISHED.values()
_FEW = "very few experts handle over 50% of routing decisions across different specialized domains"
_HALF = ranged([of.half for of in _ALL], ".0f")
_RISES = {k: ranged([100 * (of.ratio(k) - 1) for of in _ALL], "+.0f", " %") for k in (1, 3)}

QUOTED: Mapping[str, Quoted] = {
    "1a": Quoted(
        _FEW,
        "abstract; Figure 1",
        f"{ranged([100 * of.most_specialised for of in _ALL], '.0f', ' %')} of a domain's tokens choose its busiest "
        "expert",
        "routing",
    ),
    "1b": Quoted(
        _FEW,
        "abstract; Figure 1",
        f"{_HALF} of {MODEL['experts']} experts take half, mean over layers",
        "routing",
    ),
    "2": Quoted(
        "the top-weighted expert's output closely approximating the full ensemble prediction",
        "abstract; Figure 2",
        "tables of single positions, no number",
        "lens",
    ),
    "3": Quoted(
        "Hidden state similarity between single and ensemble experts for every layer is extremely high, with some "
        "layers having cosine similarity as high as 0.95",
        "abstract; Figure 3, right",
        f"{ranged([of.cosine for of in _ALL], '.3f')}, mean over layers; smallest layer "
        f"{ranged([of.smallest_cosine for of in _ALL], '.3f')}",
        "ensemble",
    ),
    "4": Quoted(
        "perplexity increasing by only 5% when using a single expert across all three domains",
        "abstract; Figure 3, left",
        f"{_RISES[1]} with one expert; {_RISES[3]} with three",
        "perplexity",
    ),
    "5": Quoted(
        "inference optimization through targeted expert pruning while maintaining model performance",
        "abstract, last sentence",
        "no number",
        "pruning",
    ),
    "6": Quoted(
        "localization of learned knowledge in these models",
        "abstract, last sentence",
        "no number",
        "localisation",
    ),
}
"""By the key of the verdict."""
