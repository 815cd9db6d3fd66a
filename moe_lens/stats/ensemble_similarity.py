"""How much one expert resembles the ensemble, beside what any vector would show (arXiv 2603.05806, Figure 3 right).

u is the residual stream between attention and experts, a_r = g_r E_r(x) the weighted contribution of rank r (0 the
largest weight), S = Σ a_r. The paper reports cos(u + a_0, u + S). As u dominates both sides, that is near 1 for almost
any a_0; so it is only given together with its controls.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from moe_lens.checked import Natural
from moe_lens.errors import InputError, several
from moe_lens.resampling import bootstrap
from moe_lens.stats.accumulator import Accumulator, Result
from moe_lens.stats.activation_means import Means
from moe_lens.stats.sums import BySource, Total

MEASURES = {
    "top": "cos(u + a₀, u + S): the paper's measure",
    "none": "cos(u, u + S): no expert at all",
    "random": "cos(u + a_r, u + S), mean over the active ranks r: an active expert drawn at random",
    "last": "cos(u + a_last, u + S): the active expert of least weight",
    "independent": "√((‖u‖² + ‖a₀‖²) / (‖u‖² + Σ‖a_r‖²)): 'top' if all directions were independent",
    "sum_top": "cos(a₀, S): without the residual; part against whole",
    "sum_random": "cos(a_r, S), mean over the active ranks r",
    "sum_last": "cos(a_last, S)",
    "sum_independent": "‖a₀‖ / √Σ‖a_r‖²: 'sum_top' if all directions were independent",
    "rest_top": "cos(a₀, S − a₀): the top expert against the others; 0 if independent",
    "rest_random": "cos(a_r, S − a_r), mean over the active ranks r",
    "rest_last": "cos(a_last, S − a_last)",
    "centred_top": "cos(u + a₀ − mean, u + S − mean)",
    "centred_none": "cos(u − mean, u + S − mean)",
    "centred_sum_top": "cos(a₀ − mean, S − mean)",
    "size": "‖S‖ / ‖u‖: how large the experts' sum is beside the residual",
    "error_top": "‖S − a₀‖ / ‖u + S‖: relative error of u + a₀ as u + S",
    "error_none": "‖S‖ / ‖u + S‖: of u, no expert at all",
    "error_random": "‖S − a_r‖ / ‖u + S‖, mean over the active ranks r",
    "error_last": "‖S − a_last‖ / ‖u + S‖",
    "error_independent": "√(Σ_{r>0}‖a_r‖² / (‖u‖² + Σ‖a_r‖²)): 'error_top' if all directions were independent",
}
"""Measures of one token and layer, and what each is. Cosines lie in [−1, 1], errors from 0; means are over tokens.

Those against the others (`rest_`) are missing where a token has one active expert."""

_OF_OTHERS = torch.tensor([name.startswith("rest_") for name in MEASURES])


def measure(
    resid: Float[Tensor, "tokens d_model"],
    parts: Float[Tensor, "tokens top_k d_model"],
    mean_resid: Float[Tensor, " d_model"] | Float[Tensor, "tokens d_model"],
    mean_parts: Float[Tensor, "top_k d_model"] | Float[Tensor, "tokens top_k d_model"],
) -> Float[Tensor, "tokens measure"]:
    """All of `MEASURES`, in their order.

    Args:
        resid: u.
        parts: a_r by rank.
        mean_resid: What u is centred with.
        mean_parts: What a_r is centred with.
    """
    total = parts.sum(-2)
    full = (resid + total)[:, None]
    with_resid = cosine_similarity(resid[:, None] + parts, full, dim=-1)
    alone = cosine_similarity(parts, total[:, None], dim=-1)
    rest = cosine_similarity(parts, total[:, None] - parts, dim=-1)
    if parts.shape[-2] == 1:
        rest = torch.full_like(rest, torch.nan)  # there are no others
    sizes, size = parts.square().sum(-1), resid.square().sum(-1)
    whole = full.square().sum((1, 2))
    errors = _root_ratio((total[:, None] - parts).square().sum(-1), whole[:, None].expand(sizes.shape))
    u, a = resid - mean_resid, parts - mean_parts
    s = a.sum(-2)
    columns = {
        "top": with_resid[:, 0],
        "none": cosine_similarity(resid, full[:, 0], dim=-1),
        "random": with_resid.mean(-1),
        "last": with_resid[:, -1],
        "independent": _root_ratio(size + sizes[:, 0], size + sizes.sum(-1)),
        "sum_top": alone[:, 0],
        "sum_random": alone.mean(-1),
        "sum_last": alone[:, -1],
        "sum_independent": _root_ratio(sizes[:, 0], sizes.sum(-1)),
        "rest_top": rest[:, 0],
        "rest_random": rest.mean(-1),
        "rest_last": rest[:, -1],
        "centred_top": cosine_similarity(u + a[:, 0], u + s, dim=-1),
        "centred_none": cosine_similarity(u, u + s, dim=-1),
        "centred_sum_top": cosine_similarity(a[:, 0], s, dim=-1),
        "size": _root_ratio(total.square().sum(-1), size),
        "error_top": errors[:, 0],
        "error_none": _root_ratio(total.square().sum(-1), whole),
        "error_random": errors.mean(-1),
        "error_last": errors[:, -1],
        "error_independent": _root_ratio(sizes[:, 1:].sum(-1), size + sizes.sum(-1)),
    }
    assert columns.keys() == MEASURES.keys()
    return torch.stack([columns[name] for name in MEASURES], -1)


def _root_ratio(above: Float[Tensor, "*tokens"], below: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    return (above / below.clamp(min=torch.finfo(below.dtype).tiny)).sqrt()


@dataclass(frozen=True, eq=False)
class SimilarityResult(Result):
    """Means over tokens of the measures, and the share of variance that the top expert leaves unexplained."""

    layers: tuple[Natural, ...]
    sources: tuple[str, ...]
    tokens: Int[Tensor, "source layer"]
    sums: Float[Tensor, "source layer measure"]
    unexplained: Float[Tensor, " layer"]
    """Var(S − a₀) / Var(S), Var the variance over tokens, summed over dimensions; 0 if S is a₀ plus a constant."""

    def mean(self, name: str) -> Float[Tensor, " layer"]:
        """Mean over tokens of one of `MEASURES`, per layer."""
        return (self.sums.sum(0) / self.tokens.sum(0)[:, None])[:, list(MEASURES).index(name)]

    def to_frame(self) -> pd.DataFrame:
        """One row per layer and measure: mean over tokens, its 95 % interval over sources, tokens, sources."""
        rows = []
        for i, layer in enumerate(self.layers):
            tokens = self.tokens[:, i].double()
            about = {"layer": layer, "tokens": int(tokens.sum()), "sources": len(self.sources)}
            for j, name in enumerate(MEASURES):
                sums = self.sums[:, i, j]
                interval = bootstrap(lambda times, s=sums, n=tokens: (times @ s) / (times @ n), tokens)
                low, high = (interval.low, interval.high) if interval else (None, None)
                rows.append(
                    {**about, "measure": name, "mean": float(sums.sum() / tokens.sum()), "low": low, "high": high}
                )
            unexplained = float(self.unexplained[i])
            rows.append({**about, "measure": "unexplained", "mean": unexplained, "low": None, "high": None})
        return pd.DataFrame(rows)


class SimilarityStats(Accumulator[SimilarityResult]):
    """Sums the measures over tokens, by source and layer."""

    def __init__(self, layers: Sequence[int]):
        self.layers = tuple(layers)
        self._sums = [BySource() for _ in self.layers]
        self._tokens = [BySource() for _ in self.layers]
        # Of S and S − a₀: sums over tokens, and sums of squares.
        self._vectors = [Total() for _ in self.layers]
        self._squares = [Total() for _ in self.layers]
        parts = {"sums": self._sums, "tokens": self._tokens, "vectors": self._vectors, "squares": self._squares}
        super().__init__(
            {"layers": self.layers, "measures": list(MEASURES)},
            {
                f"{name}.{layer}": part
                for name, of in parts.items()
                for layer, part in zip(self.layers, of, strict=True)
            },
        )

    def update(
        self,
        layer: Natural,
        resid: Float[Tensor, "batch pos d_model"],
        parts: Float[Tensor, "batch pos top_k d_model"],
        counted: Bool[Tensor, "batch pos"],
        sources: Sequence[str],
        centres: Sequence[Means],
    ) -> Self:
        """Count one layer of a batch.

        Args:
            layer: Which layer.
            resid: u.
            parts: a_r by rank.
            counted: The tokens to count.
            sources: Of each row.
            centres: Of each row: the means that its vectors are centred with, best taken from other sources.
        """
        i = self.layers.index(layer)
        u, a = resid.float().cpu(), parts.float().cpu()
        counted = counted.cpu()
        for row, (source, centre) in enumerate(zip(several(sources, "sources"), centres, strict=True)):
            kept = counted[row]
            at = centre.layers.index(layer)
            values = measure(u[row, kept], a[row, kept], centre.resid[at], centre.weighted[at])
            if not (values.isfinite() | (_OF_OTHERS & (a.shape[-2] == 1))).all():
                raise InputError(f"layer {layer}: activations are not finite")
            self._sums[i].add(values.double().sum(0)[None], [source])
        self._tokens[i].add(counted.sum(-1), sources)
        chosen = a[counted].double()
        total = chosen.sum(-2)
        pair = torch.stack([total, total - chosen[:, 0]])
        self._vectors[i].add(pair.sum(1))
        self._squares[i].add(pair.square().sum((1, 2)))
        return self

    def result(self) -> SimilarityResult:
        """The sums so far."""
        if not all(by_source.sources for by_source in self._tokens):
            raise InputError("no tokens were counted; update every layer with a batch that holds text first")
        tokens = torch.stack([by_source.stacked() for by_source in self._tokens], 1)
        unexplained = []
        for vectors, squares, n in zip(self._vectors, self._squares, tokens.sum(0), strict=True):
            variances = squares.value / n - (vectors.value / n).square().sum(-1)
            unexplained.append(variances[1] / variances[0])
        sums = torch.stack([by_source.stacked() for by_source in self._sums], 1)
        return SimilarityResult(self.layers, self._tokens[0].sources, tokens, sums, torch.stack(unexplained))
