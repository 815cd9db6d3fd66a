"""How many experts tokens used, by source, where numbers differ between variants of a run, or between tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import pandas as pd
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.errors import InputError
from moe_lens.stats import Accumulator, Result
from moe_lens.stats.sums import BySource
from moe_lens.studies.variant_losses import WHOLE, Variant


def label(rule: str, value: float, shuffled: bool) -> str:
    """The name of a variant."""
    return f"{rule} {repr(float(value)).removesuffix('.0')}{' shuffled' if shuffled else ''}"


def parts(variant: Variant) -> tuple[str, float, bool]:
    """The rule, its value, and whether the numbers were shuffled over tokens."""
    rule, _, k = variant
    if rule in (WHOLE, "k"):
        return "k", float(k), False
    rule, value, *shuffled = rule.split()
    return rule, float(value), bool(shuffled)


@dataclass(frozen=True, eq=False)
class Used(Result):
    """How many experts tokens used."""

    variants: tuple[Variant, ...]
    layers: tuple[int, ...]
    sources: tuple[str, ...]
    experts: Int[Tensor, "source variant layer"]
    """Summed over tokens."""
    tokens: Int[Tensor, " source"]

    def mean(self) -> Float[Tensor, "variant layer"]:
        """Experts of a token."""
        return self.experts.sum(0).double() / self.tokens.sum()

    def to_frame(self) -> pd.DataFrame:
        """A row per rule, value and layer: rule, value, shuffled, layer, experts (mean of a token)."""
        index = pd.MultiIndex.from_product([self.variants, self.layers], names=["variant", "layer"])
        frame = pd.DataFrame({"experts": self.mean().flatten().numpy()}, index=index).reset_index()
        rows = pd.DataFrame([parts(variant) for variant in frame.pop("variant")], columns=["rule", "value", "shuffled"])
        return pd.concat([rows, frame], axis=1)


class UsedStats(Accumulator[Used]):
    """Sums numbers of experts, by source."""

    def __init__(self, variants: Sequence[Variant], layers: Sequence[int]):
        self.variants, self.layers = tuple(variants), tuple(layers)
        self._experts, self._tokens = BySource(), BySource()
        about = {"variants": self.variants, "layers": self.layers}
        super().__init__(about, {"experts": self._experts, "tokens": self._tokens})

    def update(
        self,
        experts: Int[Tensor, "variant batch pos layer"],
        counted: Bool[Tensor, "batch pos"],
        sources: Sequence[str],
    ) -> Self:
        """Count a batch."""
        self._experts.add((experts * counted[..., None]).sum(2).movedim(0, 1), sources)
        self._tokens.add(counted.sum(-1), sources)
        return self

    def result(self) -> Used:
        """The sums so far."""
        if not self._tokens.sources:
            raise InputError("no tokens were counted; is there any text?")
        tokens = self._tokens.stacked()
        return Used(self.variants, self.layers, self._tokens.sources, self._experts.stacked(), tokens)
