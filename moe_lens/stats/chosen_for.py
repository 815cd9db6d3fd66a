"""What an expert is chosen for, in a few words: picked on half of the sources, scored on the other half."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.checked import Seed
from moe_lens.resampling import bootstrap_all, units
from moe_lens.stats.explained_choices import TOKEN, octave, token_features
from moe_lens.stats.held_out import Categories, Feature, Numbers
from moe_lens.stats.parallel_sources import balanced_halves
from moe_lens.stats.token_sample import NOTHING, TokenSampleResult

AT_LEAST, LIFT, PARTS, CANDIDATES = 5, 2.0, 5, 24
"""Tokens of which something is said; how much more often than all tokens they choose the expert, at least; how many
such things an expert is said to be chosen for at most; and how many are looked at."""


@dataclass(frozen=True, eq=False)
class _Levels:
    """Everything that can be said of a token: of each row of `member`, which tokens it holds for."""

    says: list[str]
    codes: list[Tensor]
    """Of each feature the code of every token, counted on from the features before; −1: nothing is said."""

    @property
    def n(self) -> int:
        return len(self.says)

    def counts(self, rows: Tensor, values: Float[Tensor, "row column"]) -> Float[Tensor, "level column"]:
        found = torch.zeros(self.n, values.shape[1])
        for codes in self.codes:
            said = codes[rows] >= 0
            found.index_add_(0, codes[rows][said], values[said])
        return found

    def member(self, level: Tensor, rows: Tensor) -> Bool[Tensor, "level row"]:
        """Which rows some levels hold for."""
        return torch.stack([codes[rows] == level[:, None] for codes in self.codes]).any(0)


def chosen_for(
    samples: Mapping[str, TokenSampleResult],
    text_of: Callable[[int], str],
    more: Mapping[str, Feature] | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
    *,
    seed: Seed = 0,
    parallel: Callable[[str], str] | None = None,
) -> pd.DataFrame:
    """For each expert up to five properties of the tokens that choose it, and how well they predict its choices.

    Of tokens, tokens before, places, domains and what else is known, those are picked that add most to the expert's
    divergence from its share, n ln(lift), one after another, among tokens that none of those before holds for; on half
    of each domain's sources. A token is predicted to choose the expert if any holds for it; scored on the other half.

    Args:
        samples: Of each domain.
        text_of: The text of a token.
        more: Further features, as in `explain_choices`; of numbers, whether they are above 0.
        names: Of each of them, what its categories, or its columns of numbers, are called.
        seed: Of the halves.
        parallel: As in `explain_choices`: parallel sources are in one half, and resampled together.

    Returns:
        A row per layer and expert: sentence ("" if nothing stands out), precision (share of the tokens that it holds
        for which choose the expert) with its 95 % interval over sources, recall (share of the tokens that choose the
        expert that it holds for), share (of all tokens that choose it), and held (tokens that it holds for).
    """
    levels = _levels(samples, text_of, more or {}, names or {})
    first = next(iter(samples.values()))
    same = parallel or str
    halves = balanced_halves(
        {domain: {source: same(source) for source in of.source} for domain, of in samples.items()}, seed
    )
    side = torch.tensor([halves[domain][source] for domain, of in samples.items() for source in of.source])
    pick, score = ((side == half).nonzero()[:, 0] for half in (0, 1))
    domains = [domain for domain, of in samples.items() for _ in of.source]
    keys = units([source for of in samples.values() for source in of.source], domains, parallel)
    place = {key: number for number, key in enumerate(sorted({keys[row] for row in score.tolist()}))}
    source = torch.tensor([place[keys[row]] for row in score.tolist()], dtype=torch.long)
    rows, held = [], []
    for number, layer in enumerate(first.layers):
        chosen = torch.cat([of.hot(slice(number, number + 1)) for of in samples.values()])
        for expert, some in enumerate(_pick(levels, pick, chosen[pick])):
            said = levels.member(some, score).any(0) if len(some) else torch.zeros(len(score), dtype=torch.bool)
            both = torch.stack([said.double(), said.double() * chosen[score, expert].double()], 1)
            held.append(torch.zeros(len(place), 2, dtype=torch.float64).index_add_(0, source, both))
            chose = float(chosen[score, expert].sum())
            sentence = "chosen for " + ", ".join(levels.says[one] for one in some.tolist()) if len(some) else ""
            rows.append(
                {
                    "layer": layer,
                    "expert": expert,
                    "sentence": sentence,
                    "recall": float(held[-1][:, 1].sum()) / max(1, chose),
                    "share": chose / max(1, len(score)),
                    "held": int(held[-1][:, 0].sum()),
                }
            )
    frame = pd.DataFrame(rows)
    sums = torch.stack(held, 1)
    precision = sums[..., 1].sum(0) / sums[..., 0].sum(0)
    ends = bootstrap_all(lambda times: (times @ sums[..., 1]) / (times @ sums[..., 0]), sums[..., 0], resamples=1000)
    low, high = torch.full((2, len(frame)), torch.nan) if ends is None else ends
    for at, (name, value) in enumerate((("precision", precision), ("low", low), ("high", high)), start=3):
        frame.insert(at, name, value.numpy())
    return frame


def _levels(
    samples: Mapping[str, TokenSampleResult],
    text_of: Callable[[int], str],
    more: Mapping[str, Feature],
    names: Mapping[str, Sequence[str]],
) -> _Levels:
    says: list[str] = []
    codes: list[Tensor] = []

    def add(code: Tensor, called: Sequence[str]) -> None:
        codes.append(torch.where(code >= 0, code + len(says), -1))
        says.extend(called)

    columns = {name: torch.cat([of.column(name) for of in samples.values()]) for name in ("token", "previous", "place")}
    for name, before in ((TOKEN, ""), ("previous", "after ")):
        kinds, code = columns[name].unique(return_inverse=True)
        called = ["the beginning" if one == NOTHING else repr(text_of(one)) for one in kinds.tolist()]
        add(code, [before + text for text in called])
    places = octave(columns["place"])
    ranges = ["0", "1", *(f"{2 ** (n - 1)}–{2**n - 1}" for n in range(2, int(places.max()) + 1))]
    add(places, [f"position {of}" for of in ranges])
    if "domain" in (every := token_features(samples)):
        add(every["domain"].values(), [f"{name} texts" for name in samples])
    for name, feature in more.items():
        if isinstance(feature, Categories):
            called = names.get(name, [str(code) for code in range(feature.n)])
            add(feature.codes, [f"{name} {one}" for one in called])
        elif isinstance(feature, Numbers):
            for column, called in zip(feature.columns.T, names.get(name, ()), strict=False):
                add(torch.where(column > 0, 0, -1), [f"{called} > 0"])
    return _Levels(says, codes)


def _pick(
    levels: _Levels, rows: Int[Tensor, " row"], chosen: Float[Tensor, "row n_experts"]
) -> list[Int[Tensor, " some"]]:
    """Levels of each expert."""
    together = levels.counts(rows, chosen)
    n = levels.counts(rows, torch.ones(len(rows), 1))
    share = chosen.mean(0)
    found = []
    for expert in range(chosen.shape[1]):
        gain = _gain(together[:, expert], n[:, 0], float(share[expert]))
        best = gain.topk(min(CANDIDATES, len(gain)))
        candidates = best.indices[best.values > 0]
        member = levels.member(candidates, rows).float()
        left, some = torch.ones(len(rows)), list[int]()
        while len(candidates) and len(some) < PARTS:
            both, each = member @ (left * chosen[:, expert]), member @ left
            gain = _gain(both, each, float(share[expert]))
            at = int(gain.argmax())
            if gain[at] <= 0:
                break
            some.append(int(candidates[at]))
            left = left * (1 - member[at])
        found.append(torch.tensor(some, dtype=torch.long))
    return found


def _gain(together: Tensor, n: Tensor, share: float) -> Tensor:
    """N ln(lift); 0 of what occurs too seldom, or chooses the expert too seldom."""
    lift = together / n / max(share, 1e-12)
    gain = (together * lift.log()).nan_to_num(0, 0, 0)
    return torch.where((n >= AT_LEAST) & (lift >= LIFT), gain, 0)
