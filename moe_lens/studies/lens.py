"""The study `lens`: what partial sums of experts predict, over a corpus (arXiv 2603.05806, section 3)."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens import names
from moe_lens.checked import Positive, Seed
from moe_lens.data import Reading, TokenBatch
from moe_lens.errors import InputError
from moe_lens.lenses import Lens, LensResult, LogitLens, TunedLens
from moe_lens.model.cache.unselected import unselected_experts, unselected_term
from moe_lens.model.loading.batch_sizes import batch_tokens
from moe_lens.partial_sum import PartialSum
from moe_lens.stats import Accumulator, Result, bootstrap_all
from moe_lens.stats.sums import BySource
from moe_lens.studies.forecast import Load
from moe_lens.studies.forward_passes import Hooks, drawn_by_place, each_layer, input_device
from moe_lens.studies.frames import by_domain
from moe_lens.studies.lens_examples import EXAMPLE_TOKENS, ExampleStats, LensExample
from moe_lens.studies.study import Gathered, Study

QUANTITIES = {
    "cross_entropy": "−log p of the token that follows, nats",
    "entropy": "of the lens's distribution, nats",
    "kl_final": "KL(final ‖ lens): what the lens lacks of the model's own prediction, nats",
    "kl_ensemble": "KL(all routed experts + residual ‖ lens): what the lens lacks of what they read, nats",
    "agrees_final": "share of tokens at which the lens's best token is the model's",
    "agrees_ensemble": "share of tokens at which it is that of all routed experts + residual",
    "agrees_where_it_matters": "the same, of the tokens at which the residual alone has another best token than those",
    "agrees_layer": "share of tokens at which it is that of the whole layer",
}
"""Quantities of a `LensResult`, or made of them, whose means over tokens are taken."""

NONE = PartialSum(ranks=[])
"""The residual alone: where it reads what all experts together read, any expert agrees with them."""


@dataclass(frozen=True, eq=False)
class LensTotals(Result):
    """Sums over tokens of what a lens reads, by source."""

    layers: tuple[int, ...]
    sums: tuple[str, ...]
    """Labels of the partial sums."""
    sources: tuple[str, ...]
    totals: Float[Tensor, "source layer sum quantity"]
    """In the order of `QUANTITIES`."""
    tokens: Int[Tensor, "source layer sum quantity"]
    """How many tokens each is a sum over: not every token has a next one, nor every dense layer ranks."""

    def mean(self, times: Float[Tensor, "resample source"]) -> Float[Tensor, "resample layer sum quantity"]:
        """Means over tokens, with each source counted so many times; NaN where nothing could be read."""
        flat = [value.double().flatten(1) for value in (self.totals, self.tokens)]
        return ((times @ flat[0]) / (times @ flat[1])).unflatten(1, self.totals.shape[1:])

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, sum and quantity: mean over tokens, its 95 % interval over sources, tokens, sources."""
        value = self.mean(torch.ones(1, len(self.sources), dtype=torch.float64))[0]
        ends = bootstrap_all(self.mean, self.tokens)
        low, high = (torch.full_like(value, torch.nan),) * 2 if ends is None else ends
        axes = [self.layers, self.sums, QUANTITIES]
        index = pd.MultiIndex.from_product(axes, names=["layer", "sum", "quantity"])
        columns = {"mean": value, "low": low, "high": high, "tokens": self.tokens.sum(0)}
        frame = pd.DataFrame({name: table.flatten().numpy() for name, table in columns.items()}, index=index)
        return frame.reset_index().query("tokens > 0").assign(sources=len(self.sources)).reset_index(drop=True)


class LensStats(Accumulator[LensTotals]):
    """Sums what a lens reads; memory grows with the number of sources only."""

    def __init__(self, layers: Sequence[int], sums: Sequence[PartialSum]):
        self.layers, self.sums = tuple(layers), tuple(which.label for which in sums)
        self._totals, self._tokens = BySource(), BySource()
        super().__init__({"layers": self.layers, "sums": self.sums}, {"totals": self._totals, "tokens": self._tokens})

    def update(self, read: LensResult, counted: Bool[Tensor, "batch pos"], sources: Sequence[str]) -> Self:
        """Count a batch.

        Args:
            read: Of all its positions.
            counted: The tokens to count.
            sources: Of each row.
        """
        of = {name: getattr(read, name) for name in QUANTITIES if name != "agrees_where_it_matters"}
        alone = of["agrees_ensemble"][:, [read.sums.index(NONE)]]
        of["agrees_where_it_matters"] = torch.where(alone == 0, of["agrees_ensemble"], torch.nan)
        values = torch.stack([of[name] for name in QUANTITIES], -1).double()  # layer sum batch pos quantity
        known = values.isfinite() & counted[:, :, None]
        rows = counted.any(-1)
        kept = [source for source, row in zip(sources, rows.tolist(), strict=True) if row]
        self._totals.add(values.masked_fill(~known, 0).sum(3).movedim(2, 0)[rows], kept)
        self._tokens.add(known.sum(3).movedim(2, 0)[rows], kept)
        return self

    def result(self) -> LensTotals:
        """The sums so far."""
        if not self._totals.sources:
            raise InputError("no tokens were counted; update with a batch that holds text first")
        return LensTotals(self.layers, self.sums, self._totals.sources, self._totals.stacked(), self._tokens.stacked())


@dataclass(frozen=True)
class LensStudy(Study):
    """Figure 2 of the paper over a corpus: layer output, all experts, each expert alone, beside controls."""

    lens: str = "logit"
    """`logit`, or the folder (or name) of a `TunedLens`."""
    seed: Seed = 0
    """Of the controls that are drawn at random."""

    name: ClassVar[str] = "lens"
    passes: ClassVar[tuple[str, ...]] = ("lens",)

    def settings(self) -> dict[str, Any]:
        """What was asked for; a tuned lens also by its digest, as another one may be put into its folder."""
        return vars(self) if self.lens == "logit" else {**vars(self), "digest": TunedLens.digest_of(self.lens)}

    def check(self, model: Any) -> None:
        """Refuse a lens that is not there, or is of another model."""
        self._lens(model)

    def _lens(self, model: Any) -> Lens:
        return LogitLens(model) if self.lens == "logit" else TunedLens.from_pretrained(self.lens, model)

    def sums(self, model: Any) -> tuple[PartialSum, ...]:
        """The columns of Figure 2, and what any one expert is to be compared with."""
        every = (*PartialSum.figure2(model.top_k), *PartialSum.controls(model.top_k, seed=self.seed))
        return tuple(dict.fromkeys(every))

    def load(self, model: Any, name: str, reading: Reading, domains: Positive) -> Load:  # noqa: ARG002
        """A forward pass, logits of every sum in every layer, and a pass for the example."""
        tokens = reading.tokens or 0
        rows = tokens * (1 + model.cfg.n_layers * len(self.sums(model)))
        return Load.stacked(tokens, batch_tokens(model, kept=self.keeps), logits=rows) + Load(EXAMPLE_TOKENS)

    def begin(self, model: Any, name: str) -> Gathered:  # noqa: ARG002
        """Empty sums, and no example."""
        return {"lens": LensStats(range(model.cfg.n_layers), self.sums(model)), "example": ExampleStats()}

    def prepare(self, model: Any, name: str, domain: str, earlier: Any) -> Lens:  # noqa: ARG002
        """The lens."""
        return self._lens(model)

    @torch.no_grad()
    def step(self, model: Any, name: str, batch: TokenBatch, into: Gathered, prepared: Lens) -> None:  # noqa: ARG002
        """One forward pass, and the unembedding of every sum; another pass for a prompt that is an earlier example."""
        sums, device, terms = self.sums(model), input_device(model), {}
        draws = drawn_by_place(batch, f"{self.seed} controls", model.cfg.n_layers)[..., 0]
        with model.hooks(fwd_hooks=unselected_hooks(model, sums, terms, draws)):
            _, cache = model.run_with_cache(
                batch.tokens.to(device),
                names_filter=prepared.hooks(sums=sums),
                attention_mask=batch.mask.long().to(device),
            )
        cache.unselected, cache.draws = terms, draws
        into["lens"].update(prepared.decode(cache, sums, top=1), batch.counted, batch.sources)
        into["example"].update(prepared, batch)

    def results(self, earlier: Mapping[str, Gathered]) -> dict[str, Result]:
        """The sums by source, and the example."""
        return {name: earlier["lens"][name].result() for name in ("lens", "example")}

    def tables(
        self,
        model: Mapping[str, Any],  # noqa: ARG002
        results: Mapping[str, Mapping[str, Result]],
    ) -> dict[str, pd.DataFrame]:
        """`lens`: means of `QUANTITIES` by domain, layer and partial sum. `examples`: the best tokens of one prompt."""
        return {
            "lens": by_domain({name: of["lens"].to_frame() for name, of in results.items()}),
            "examples": by_domain({name: _example(of["example"]).top_frame() for name, of in results.items()}),
        }


def unselected_hooks(
    model: Any,
    sums: Sequence[PartialSum],
    into: dict[tuple[int, PartialSum], Tensor],
    draws: Float[Tensor, "layer batch pos"] | None = None,
) -> Hooks:
    """Hooks that compute the terms of unselected experts while a layer's weights are there.

    After the pass they would have to be read, or unpacked, once more for every chunk of tokens that the lens decodes.

    Args:
        model: A `HookedMoE`.
        sums: Those that a lens will read.
        into: Takes the terms [batch, pos, d_model], by layer and sum.
        draws: Uniform random numbers in [0, 1) that decide which experts they are, as `SumCache.draws`.
    """
    wanted = [which for which in sums if which.drawn == "unselected"]

    def keep(layer: int, of: dict[str, Tensor]) -> None:
        x, indices, weights, logits = (of[name] for name in read)
        drawn = None if draws is None else draws[layer]
        for which in wanted:
            with suppress(InputError):  # there is none to draw, as the lens will say
                expert = unselected_experts(indices, layer, which.seed, model.n_experts, drawn, logits)
                into[layer, which] = unselected_term(model, layer, which, x, expert, weights)

    read = (names.MLP_IN, names.EXPERT_INDICES, names.ROUTING_WEIGHTS, names.ROUTER_LOGITS)
    return each_layer(model, [*read, names.ROUTED_OUT], keep) if wanted else []


def _example(result: Result) -> LensExample:
    assert isinstance(result, LensExample)
    return result
