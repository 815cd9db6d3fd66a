"""`TrainingSummary`: how a TunedLens was trained, and what it came to."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from moe_lens.checked import Natural, Positive, Seed
from moe_lens.errors import InputError


@dataclass(frozen=True)
class TrainingSummary:
    """Settings of a training, and KL(final ‖ lens) on held-out tokens before and after it, in nats a token.

    Before it, the lens is the LogitLens.
    """

    steps: Positive
    tokens: Positive
    """Tokens that were trained on, counted again when they came again."""
    batch: Positive
    context: Positive
    lr: float
    seed: Seed
    held_out_tokens: Natural
    post_before: tuple[float, ...]
    """At `resid_post` of each layer. The last is zero, here and after: the model itself reads it."""
    post_after: tuple[float, ...]
    mid_before: tuple[float, ...] | None = None
    """At `resid_mid` of each layer, if a lens for it was trained."""
    mid_after: tuple[float, ...] | None = None

    def to_frame(self) -> pd.DataFrame:
        """One row per layer and site: logit_lens and tuned_lens, held-out nats a token."""
        sites = {"post": (self.post_before, self.post_after), "mid": (self.mid_before or (), self.mid_after or ())}
        rows = [
            (layer, site, before, after)
            for site, (start, end) in sites.items()
            for layer, (before, after) in enumerate(zip(start, end, strict=True))
        ]
        return pd.DataFrame(rows, columns=["layer", "site", "logit_lens", "tuned_lens"])

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainingSummary":
        """From what `dataclasses.asdict` and JSON make of it.

        Raises:
            InputError: Not every layer has its two numbers.
        """
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        made = cls(**plain)
        of_layers = (made.post_before, made.post_after, made.mid_before, made.mid_after)
        if len({len(of) for of in of_layers if of is not None}) > 1 or (made.mid_before is None) != (
            made.mid_after is None
        ):
            raise InputError("the numbers before and after the training are not of the same layers")
        return made
