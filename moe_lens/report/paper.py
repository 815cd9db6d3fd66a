"""What the paper's authors measured, to set ours beside.

From the data released with "MoE Lens – An Expert Is All You Need" (arXiv 2603.05806), DeepSeekMoE 16B: perplexities
are geometric means over samples; cosines are of the last token of 50 prompts, the mean and the smallest over layers;
`half` is how many experts take half of the assignments, mean over layers.
"""

from dataclasses import dataclass


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
    half: int

    def ratio(self, k: int) -> float:
        """Perplexity with k experts divided by that with six."""
        return self.perplexity[k - 1] / self.perplexity[5]


PUBLISHED = {
    "english": Published("English", 97, (4.58, 3.62, 3.43, 3.36, 3.33, 3.32), 0.985, 0.715, 0.429, 20),
    "french": Published("French QA", 350, (12.61, 6.81, 6.13, 5.94, 5.86, 5.83), 0.992, 0.956, 0.658, 23),
    "math": Published("GSM8K", 533, (7.09, 5.62, 5.27, 5.17, 5.10, 5.06), 0.993, 0.965, 0.728, 15),
    "code": Published("GitHub", 48, (6.98, 5.77, 5.46, 5.35, 5.32, 5.29), 0.983, 0.899, 0.313, 27),
}
"""By the embedded domain that comes nearest; there is none for German."""
