"""What the paper's authors measured, to set ours beside.

From the data released with "MoE Lens – An Expert Is All You Need" (arXiv 2603.05806), of DeepSeekMoE 16B base.
Perplexities are geometric means over samples; cosines are of the last token of 50 prompts, the mean and the smallest
over layers; `half` is how many experts take half of the assignments, mean over layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Published:
    """The authors' numbers for one domain."""

    name: str
    samples: int
    perplexity: tuple[float, float, float, float, float, float]
    """For k = 1 … 6."""
    cosine: float
    smallest_cosine: float
    most_specialised: float
    """Share of tokens that have the most specialised expert among their active ones."""
    where: tuple[int, int]
    """Layer and number of that expert."""
    half: int

    def ratio(self, k: int) -> float:
        """Perplexity with k experts divided by that with six."""
        return self.perplexity[k - 1] / self.perplexity[5]


PUBLISHED = {
    "english": Published("English", 97, (4.58, 3.62, 3.43, 3.36, 3.33, 3.32), 0.985, 0.715, 0.429, (26, 14), 20),
    "french": Published("French QA", 350, (12.61, 6.81, 6.13, 5.94, 5.86, 5.83), 0.992, 0.956, 0.658, (25, 4), 23),
    "gsm8k": Published("GSM8K", 533, (7.09, 5.62, 5.27, 5.17, 5.10, 5.06), 0.993, 0.965, 0.728, (13, 33), 15),
    "github": Published("GitHub", 48, (6.98, 5.77, 5.46, 5.35, 5.32, 5.29), 0.983, 0.899, 0.313, (9, 16), 27),
    "chinese": Published("Chinese", 110, (14.56, 10.03, 9.11, 8.80, 8.67, 8.63), 0.976, 0.665, 0.215, (27, 12), 28),
    "arxiv": Published("arXiv", 500, (20.08, 14.25, 12.96, 12.61, 12.47, 12.41), 0.995, 0.977, 0.667, (22, 57), 20),
    "aime": Published("AIME", 935, (7.90, 5.53, 5.03, 4.91, 4.85, 4.83), 0.986, 0.793, 0.681, (21, 37), 18),
}
"""By the last part of the preset's name."""

NEAREST = {"math": "gsm8k", "code": "github"}
"""Embedded domains that go by another name; there is nothing for German."""

MODEL = {"type": "deepseek", "layers": 28, "experts": 64, "top_k": 6, "shared_experts": 2, "d_model": 2048}
"""What tells the authors' model, DeepSeekMoE 16B, from others."""


def published(domain: str) -> Published | None:
    """The authors' numbers for a domain, by its name, or that of its preset."""
    name = domain.removeprefix("paper/")
    return PUBLISHED.get(NEAREST.get(name, name))


def same_model(facts: Mapping[str, Any]) -> bool:
    """Whether a model, as a study's manifest describes it, has the shape of the authors'."""
    return all(facts.get(key) == value for key, value in MODEL.items())


def published_table() -> pd.DataFrame:
    """All of it: a row per domain."""
    rows = []
    for name, of in PUBLISHED.items():
        perplexities = {f"perplexity_{k}": value for k, value in enumerate(of.perplexity, start=1)}
        cosines = {"cosine": of.cosine, "smallest_cosine": of.smallest_cosine}
        routing = {
            "most_specialised": of.most_specialised,
            "layer": of.where[0],
            "expert": of.where[1],
            "half": of.half,
        }
        rows.append({"domain": name, "samples": of.samples, **perplexities, **cosines, **routing})
    return pd.DataFrame(rows)
