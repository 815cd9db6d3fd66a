"""What explains which experts a token chooses: predictions on sources that were held out (after RouterInterp, 2026)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.checked import Natural, Positive, Seed
from moe_lens.errors import InputError
from moe_lens.resampling import bootstrap_all, folds, units
from moe_lens.stats.accumulator import Result
from moe_lens.stats.held_out import Categories, Feature, Held, placements
from moe_lens.stats.parallel_sources import too_few_sources
from moe_lens.stats.token_sample import TokenSampleResult

TOKEN, ALL, SHUFFLED = "token", "all", " shuffled"
MEASURES = ("chosen", "predicted", "hits", "error", "base_error", "above", "below")
"""Sums over a source's tokens, of each expert: times chosen, predicted, both; squared errors of the prediction and of
the expert's share; and placements (see `held_out.placements`) of tokens that chose it and of those that did not, NaN
where the source's fold has tokens of one of the two kinds only."""
RESAMPLES = 1000
CHUNK = 2**22
"""Numbers of a chunk of layers."""


@dataclass(frozen=True, eq=False)
class ChoiceExplanation(Result):
    """Sums over tokens of sources that were held out."""

    layers: tuple[Natural, ...]
    top_k: Positive
    features: tuple[str, ...]
    """The first is the token."""
    subsets: tuple[str, ...]
    """What predictions are from: a feature alone, the token with another, all, and those shuffled."""
    sources: tuple[str, ...]
    """Of all domains; parallel ones are one."""
    tokens: Int[Tensor, " source"]
    sums: Float[Tensor, "subset source measure layer n_experts"]
    """Columns `MEASURES`."""

    def _of(self, subset: str, measure: str) -> Float[Tensor, "source layer n_experts"]:
        return self.sums[self.subsets.index(subset), :, MEASURES.index(measure)]

    def _ratio(self, above: Tensor, below: Tensor) -> list[Tensor]:
        """Of sums by source, with the ends of its 95 % interval over sources."""
        value = above.sum(0) / below.sum(0)

        def ratio(times: Tensor) -> Tensor:
            return torch.tensordot(times, above, 1) / torch.tensordot(times, below, 1)

        # of all experts of a layer together, every token counts alike
        return [value, *self._ends(ratio, value, below if below.ndim == 3 else self.tokens)]

    def _ends(self, statistic: Callable[[Tensor], Tensor], value: Tensor, *sizes: Tensor) -> list[Tensor]:
        ends = bootstrap_all(statistic, *sizes, resamples=RESAMPLES)
        return [torch.full_like(value, torch.nan)] * 2 if ends is None else list(ends)

    def _explained(self, subset: str, less: str | None, experts: bool) -> list[Tensor]:
        """Share of squared error that a prediction saves, against the experts' shares or another one."""
        base = self._of(subset, "base_error")
        saved = (base if less is None else self._of(less, "error")) - self._of(subset, "error")
        return self._ratio(saved, base) if experts else self._ratio(saved.sum(-1), base.sum(-1))

    def _auc(self, subset: str) -> list[Tensor]:
        chosen, above, below = (self._of(subset, measure) for measure in ("chosen", "above", "below"))
        others = self.tokens.double()[:, None, None] - chosen
        # Folds in which all tokens chose the expert, or none did, have no area.
        chosen, others, above, below = (
            torch.where(above.isfinite(), each, 0) for each in (chosen, others, above, below)
        )
        value = above.sum(0) / chosen.sum(0)
        # It differs from `value` by how folds are weighted.
        others_mean = below.sum(0) / others.sum(0)

        def linear(times: Tensor) -> Tensor:
            parts = [
                torch.tensordot(times, up, 1) / torch.tensordot(times, n, 1)
                for up, n in ((above, chosen), (below, others))
            ]
            return parts[0] + parts[1] - others_mean

        # linear in sums, it could leave what an area can be
        return [value, *(end.clamp(0, 1) for end in self._ends(linear, value, chosen, others))]

    def to_frame(self) -> pd.DataFrame:
        """A row per layer, expert and feature ("all": every feature together), on sources held out.

        Columns: share (of tokens that choose the expert); from the feature alone (or all): recall (share of those that
        are predicted; a token is predicted the top_k experts of the greatest scores), precision, auc, explained (share
        of the squared error of `share` that the prediction saves: 1 perfect, 0 none); gain (the same, of the token with
        the feature minus the token alone) and gain_shuffled (with the feature shuffled over tokens). auc, explained and
        gain have the ends of their 95 % interval over sources, missing below ten.
        """
        return self._frame(experts=True)

    def per_layer(self) -> pd.DataFrame:
        """A row per layer and feature: recall, explained, gain (see `to_frame`), with their 95 % intervals.

        Of all experts of a layer together as many are predicted as chosen, so that precision is recall; recall_gain is
        that of the token with the feature minus that of the token alone.
        """
        return self._frame(experts=False)

    def _frame(self, experts: bool) -> pd.DataFrame:
        frames = []
        for name in (*self.features, ALL):
            token = name == TOKEN
            both = name if token or name == ALL else f"{TOKEN} + {name}"
            columns: dict[str, Tensor | list[Tensor]] = {}
            chosen, hits = self._of(name, "chosen"), self._of(name, "hits")
            if experts:
                columns["share"] = chosen.sum(0) / self.tokens.sum()
                columns["recall"] = hits.sum(0) / chosen.sum(0)
                columns["precision"] = hits.sum(0) / self._of(name, "predicted").sum(0)
                columns["auc"] = self._auc(name)
            else:
                columns["recall"] = self._ratio(hits.sum(-1), chosen.sum(-1))
                if not token:
                    more = (self._of(both, "hits") - self._of(TOKEN, "hits")).sum(-1)
                    columns["recall_gain"] = self._ratio(more, chosen.sum(-1))
            columns["explained"] = self._explained(name, None, experts)
            if not token:
                columns["gain"] = self._explained(both, TOKEN, experts)
                columns["gain_shuffled"] = self._explained(both + SHUFFLED, TOKEN, experts)[0]
            flat: dict[str, Tensor] = {}
            for column, value in columns.items():
                if isinstance(value, Tensor):
                    flat[column] = value
                else:
                    flat |= dict(zip((column, f"{column}_low", f"{column}_high"), value, strict=True))
            names = [self.layers, range(self.sums.shape[-1])] if experts else [self.layers]
            index = pd.MultiIndex.from_product(names, names=["layer", "expert"][: len(names)])
            frame = pd.DataFrame({column: value.flatten().numpy() for column, value in flat.items()}, index=index)
            frames.append(frame.reset_index().assign(feature=name))
        frame = pd.concat(frames, ignore_index=True)
        first = ["layer", *(["expert"] if experts else []), "feature"]
        order = {name: place for place, name in enumerate((*self.features, ALL))}
        frame = frame.sort_values(first, key=lambda of: of.map(order) if of.name == "feature" else of, kind="stable")
        return frame.reindex(columns=[*first, *(c for c in frame.columns if c not in first)]).reset_index(drop=True)


def token_features(samples: Mapping[str, TokenSampleResult]) -> dict[str, Feature]:
    """What is known of every token: itself, the one before it, its place, and its domain if there are several.

    Places are 0, 1, 2–3, 4–7, …. The one before it is two features: itself, and the pair.
    """
    columns = {name: torch.cat([of.column(name) for of in samples.values()]) for name in ("token", "previous", "place")}
    pair = torch.stack([columns["previous"], columns["token"]], 1).unique(dim=0, return_inverse=True)[1]
    found: dict[str, Feature] = {
        TOKEN: Categories.of(columns["token"]),
        "previous": Categories.of(columns["previous"]),
        PAIR: Categories.of(pair),
        "position": Categories.of(octave(columns["place"])),
    }
    if len(samples) > 1:
        sizes = torch.tensor([len(of.about) for of in samples.values()])
        found["domain"] = Categories(torch.arange(len(samples)).repeat_interleave(sizes), len(samples))
    return found


PAIR = "token pair"


def octave(place: Int[Tensor, " token"]) -> Int[Tensor, " token"]:
    """0, 1, 2, … of the places 0, 1, 2–3, 4–7, …."""
    return torch.where(place > 0, place.clamp(min=1).double().log2().floor().long() + 1, 0)


def explain_choices(
    samples: Mapping[str, TokenSampleResult],
    more: Mapping[str, Feature] | None = None,
    *,
    n_folds: Positive = 5,
    seed: Seed = 0,
    parallel: Callable[[str], str] | None = None,
) -> ChoiceExplanation:
    """Predict which experts tokens choose, from what is known of them, on sources that were held out.

    Each expert's choice is predicted by ridge regression (see `held_out`) from the token, the one before it (by itself
    and with the token), its position and its domain; each alone, each with the token, and all; and with the others
    shuffled over tokens, which should add nothing.

    Args:
        samples: Of each domain, taken with the same model.
        more: Further features of the tokens of all samples, one sample after another.
        n_folds: How many folds of sources; fewer where a domain has fewer sources.
        seed: Of the folds, and of what is shuffled.
        parallel: From the name of a source to what it has in common with those of other domains that are the same
            document, as `parallel_key` gives it: they are held out together, and resampled together.

    Raises:
        InputError: Samples of different models, features of other tokens or by a name that is taken, or a domain of
            fewer than three sources.
    """
    first = next(iter(samples.values()))
    if len({(of.layers, of.n_experts, of.chosen.shape[-1]) for of in samples.values()}) > 1:
        raise InputError("the samples differ in layers, experts or top_k; expected those of one model")
    if few := too_few_sources({name: of.source for name, of in samples.items()}, parallel):
        raise InputError(f"domains with too few sources (three are needed to keep them apart): {few}")
    features = token_features(samples)
    own, n = [name for name in features if name != PAIR], sum(len(of.about) for of in samples.values())
    for name, feature in (more or {}).items():
        if name in {*features, ALL} or "+" in name or len(feature.values()) != n:
            raise InputError(
                f"got the feature {name!r} of {len(feature.values())} tokens; expected one of all {n} tokens, and a "
                f"name other than {[*features, ALL]} without +"
            )
        features[name] = feature
        own.append(name)
    domains = [domain for domain, of in samples.items() for _ in of.source]
    unit = units([source for of in samples.values() for source in of.source], domains, parallel)
    fold = folds(unit, domains, n_folds, seed)
    places = {name: place for place, name in enumerate(sorted(set(unit)))}
    source = torch.tensor([places[name] for name in unit])
    alone = [(domain, source) for domain, of in samples.items() for source in of.source]
    numbers = {name: number for number, name in enumerate(sorted(set(alone)))}
    each = torch.tensor([numbers[name] for name in alone])
    for number, name in enumerate([*own[1:], PAIR]):
        features[name + SHUFFLED] = features[name].shuffled(each, seed + number)
    subsets = _subsets(own)
    parts = [Held(features, fold, held) for held in range(int(fold.max()) + 1)]
    top_k = first.chosen.shape[-1]
    step = max(1, CHUNK // (n * first.n_experts))
    sums = []
    for start in range(0, len(first.layers), step):
        target = torch.cat([of.hot(slice(start, start + step)) for of in samples.values()])
        sums.append(_sums(parts, target, subsets, source, len(places), first.n_experts, top_k))
    return ChoiceExplanation(
        layers=first.layers,
        top_k=top_k,
        features=tuple(own),
        subsets=tuple(subsets),
        sources=tuple("/".join(name) for name in places),
        tokens=torch.bincount(source, minlength=len(places)),
        sums=torch.cat(sums, 3),
    )


def _subsets(own: list[str]) -> dict[str, tuple[str, ...]]:
    """Which features each prediction is from, by what it is called."""

    def parts(name: str, ending: str = "") -> tuple[str, ...]:
        return (f"previous{ending}", PAIR + ending) if name == "previous" else (name + ending,)

    found = {name: parts(name) if name != "previous" else ("previous",) for name in own}
    for name in own[1:]:
        found[f"{TOKEN} + {name}"] = (TOKEN, *parts(name))
        found[f"{TOKEN} + {name}{SHUFFLED}"] = (TOKEN, *parts(name, SHUFFLED))
    found[ALL] = (TOKEN, *(part for name in own[1:] for part in parts(name)))
    found[ALL + SHUFFLED] = (TOKEN, *(part for name in own[1:] for part in parts(name, SHUFFLED)))
    return found


def _sums(
    parts: list[Held],
    target: Float[Tensor, "row column"],
    subsets: dict[str, tuple[str, ...]],
    source: Int[Tensor, " row"],
    n_sources: int,
    n_experts: int,
    top_k: int,
) -> Float[Tensor, "subset source measure layer n_experts"]:
    found = torch.zeros(len(subsets), n_sources, len(MEASURES), target.shape[1], dtype=torch.float64)
    for part in parts:
        chosen, (here, own) = target[part.rows], source[part.rows].unique(return_inverse=True)
        of = torch.nn.functional.one_hot(own).float().mT  # a source is in one fold with all of its tokens
        base, predictions = part.predictions(target, list(subsets.values()))
        same = of @ chosen, of @ (chosen - base).square()
        for place, (name, scores) in enumerate(zip(subsets, predictions, strict=True)):
            best = scores.unflatten(1, (-1, n_experts)).topk(top_k, dim=-1).indices
            predicted = torch.zeros_like(scores).unflatten(1, (-1, n_experts)).scatter_(-1, best, 1.0).flatten(1)
            values = {"predicted": predicted, "hits": predicted * chosen, "error": (chosen - scores).square()}
            if "+" not in name and SHUFFLED not in name:
                placed = placements(scores, chosen)
                values |= {"above": placed * chosen, "below": placed * (1 - chosen)}
            sums = dict(zip(("chosen", "base_error"), same, strict=True))
            sums |= {measure: of @ value for measure, value in values.items()}
            for measure, value in sums.items():
                found[place, here, MEASURES.index(measure)] = value.double()
    return found.unflatten(-1, (-1, n_experts))
