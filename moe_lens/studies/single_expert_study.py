"""The study `single_expert`: one expert against all active ones, at any number of tokens (arXiv 2603.05806, Figure 3).

Every text is tokenised once to see which sources there are, and read once for the means, once for the cosines, and once
for each variant of the model. Means, which centre the cosines and stand in for experts that are replaced, come from the
other half of the domain's sources.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens import names
from moe_lens.checked import Natural, Positive, Seed
from moe_lens.data import Reading, TokenBatch
from moe_lens.errors import InputError
from moe_lens.model.loading.batch_sizes import BATCH_TOKENS, batch_tokens, tokens_at_once, wants_few_passes
from moe_lens.protocols import require_stream_width
from moe_lens.routing import output_factors
from moe_lens.stats import ActivationMeans, Means, Result, SimilarityResult, SimilarityStats, halves
from moe_lens.studies.forecast import NOTHING, Load
from moe_lens.studies.forward_passes import (
    COMPUTED,
    Hooks,
    drawn_by_place,
    each_layer,
    forward,
    input_device,
    predicted,
)
from moe_lens.studies.frames import by_domain
from moe_lens.studies.shared_passes import versions_losses
from moe_lens.studies.study import TEXTS, Earlier, Gathered, Study
from moe_lens.studies.variant_losses import WHOLE, Variant, VariantLosses, VariantStats

Where = Literal["together", "each", "both"]

TREATMENTS: dict[str, str] = {
    "dropped": "the k experts of largest weight are kept, the others dropped",
    "renormalised": "so, and the kept weights rescaled to the sum that all had",
    "random": "k of the active experts drawn at random for each token and layer are kept, the others dropped",
    "replaced": "the k experts of largest weight are kept, the others' outputs replaced by the experts' means",
}
"""What is done to the experts that are not kept."""


@dataclass(frozen=True)
class SingleExpertStudy(Study):
    """Cosines with their controls, and perplexity by number of active experts."""

    treatments: tuple[str, ...] = ("dropped", "renormalised", "random", "replaced")
    layers: Where = "together"
    """Whether experts are left out in all MoE layers at once, in one layer at a time, or both."""
    k: tuple[Natural, ...] | None = None
    """How many experts are kept; 0 … top_k − 1 if not given. All of them are always the reference."""
    seed: Seed = 0
    """Of the random experts, and of the halves of the sources."""

    name: ClassVar[str] = "single_expert"
    passes: ClassVar[tuple[str, ...]] = ("sources", "means", "experts")
    keeps: ClassVar[bool] = False

    def check(self, model: Any) -> None:
        """Refuse unknown treatments, numbers of experts that the model cannot keep, and outputs that have no mean."""
        require_stream_width(model, "means of their outputs")
        for value in self.treatments:
            if value not in TREATMENTS:
                raise InputError(f"treatment {value!r}; expected some of {', '.join(TREATMENTS)}")
        wrong = [k for k in self.k or () if not 0 <= k < model.top_k]
        if wrong:
            raise InputError(f"k is {wrong[0]}; the model has {model.top_k} active experts: 0 to {model.top_k - 1}")

    def variants(self, model: Any) -> list[Variant]:
        """Everything that is run besides the whole model, those that are replaced by means last."""
        places: list[int | None] = [None] if self.layers != "each" else []
        places += list(model.moe_layers) if self.layers != "together" else []
        numbers = range(model.top_k) if self.k is None else self.k
        return [
            (treatment, layer, k)
            for treatment in sorted(set(self.treatments), key=list(TREATMENTS).index)
            for layer in places
            for k in numbers
            if k > 0 or treatment in ("dropped", "replaced")  # nothing is left to rescale, or to draw
        ]

    def load(self, model: Any, name: str, reading: Reading, domains: Positive) -> Load:  # noqa: ARG002
        """Nothing, a forward pass, or one of every variant: together where parameters are read in every pass."""
        tokens = reading.tokens or 0
        if name == "sources":
            return NOTHING
        if name == "means":
            return Load.stacked(tokens, batch_tokens(model, kept=self.keeps), logits=0)
        every = tokens * (1 + len(self.variants(model)))
        together = wants_few_passes(model)
        at_once = tokens_at_once(model, input_device(model)) if together else min(tokens, BATCH_TOKENS)
        return Load.stacked(every, at_once)

    def begin(self, model: Any, name: str) -> Gathered:
        """Nothing, means of either half, or cosines and losses."""
        if name == "sources":
            return {}
        if name == "means":
            size = model.moe_layers, model.n_experts, model.top_k, model.cfg.d_model
            return {f"half{half}": ActivationMeans(*size) for half in (0, 1)}
        variants = [(WHOLE, None, int(model.top_k)), *self.variants(model)]
        return {"similarity": SimilarityStats(model.moe_layers), "losses": VariantStats(variants)}

    def prepare(self, model: Any, name: str, domain: str, earlier: Earlier) -> "_Halves | None":  # noqa: ARG002
        """The half of each source, and the means that either half is given: those of the other, if it has any."""
        if name == "sources":
            return None
        of = halves(earlier[domain]["sources"][TEXTS].result().sources, self.seed)
        if name == "means":
            return _Halves(of)
        sums = [earlier[domain]["means"][f"half{half}"] for half in (0, 1)]
        found = [each.result() if isinstance(each, ActivationMeans) and each.seen else None for each in sums]
        means = tuple(mean for here, there in zip(found, found[::-1], strict=True) if (mean := there or here))
        if not means:
            raise InputError("no tokens were counted; is there any text?")
        return _Halves(of, means)

    def step(self, model: Any, name: str, batch: TokenBatch, into: Gathered, prepared: Any) -> None:
        """Sum up activations, or run every variant; of the texts alone, sources are noted by whoever reads them."""
        if name == "means":
            self._means(model, batch, into, prepared.of_rows(batch))
        elif name == "experts":
            self._losses(model, batch, into, prepared.of_rows(batch), prepared.means)

    def _means(self, model: Any, batch: TokenBatch, into: Gathered, halves: Int[Tensor, " batch"]) -> None:
        wanted = [names.RESID_MID, COMPUTED, names.ROUTING_WEIGHTS, names.EXPERT_OUT]
        member = halves[:, None]

        def update(layer: int, of: dict[str, Tensor]) -> None:
            resid, indices, weights, outputs = (batch.unpack(of[name]).cpu() for name in wanted)
            weights = output_factors(weights, model.family)
            for half in (0, 1):
                into[f"half{half}"].update(layer, resid, outputs, weights, indices, batch.counted & (member == half))

        forward(model, batch, each_layer(model, wanted, update), blocks_only=True)

    def _losses(
        self, model: Any, batch: TokenBatch, into: Gathered, halves: Int[Tensor, " batch"], means: Sequence[Means]
    ) -> None:
        centres = [means[half] for half in halves.tolist()]

        def compare(layer: int, of: dict[str, Tensor]) -> None:
            resid, parts = (batch.unpack(of[name]) for name in (names.RESID_MID, names.EXPERT_WEIGHTED))
            into["similarity"].update(layer, resid, parts, batch.counted, batch.sources, centres)

        wanted = [names.RESID_MID, names.EXPERT_WEIGHTED]
        whole = each_layer(model, wanted, compare)
        places = random_places(model, batch, self.seed) if "random" in self.treatments else {}
        half = batch.pack(halves[:, None].expand(batch.tokens.shape))

        def version(treatment: str, layer: int | None, k: int, rows: slice) -> Hooks:
            layers = model.moe_layers if layer is None else (layer,)
            if treatment == "replaced":
                return [replace(model, at, k, half, means, rows) for at in layers]
            if treatment == "random":
                return [hook for at in layers for hook in keep(at, places[at] < k)]
            return [hook for at in layers for hook in keep(at, torch.arange(model.top_k) < k, treatment)]

        versions = [partial(version, *variant) for variant in self.variants(model)]
        found = versions_losses(model, batch, [lambda rows: whole, *versions])  # noqa: ARG005
        into["losses"].update(torch.stack(found), predicted(batch), batch.sources)

    def results(self, earlier: Mapping[str, Gathered]) -> dict[str, Result]:
        """Cosines and losses."""
        return {name: earlier["experts"][name].result() for name in ("similarity", "losses")}

    def tables(
        self,
        model: Mapping[str, Any],  # noqa: ARG002
        results: Mapping[str, Mapping[str, Result]],
    ) -> dict[str, pd.DataFrame]:
        """`similarity` and `perplexity`."""
        return {
            "similarity": by_domain({name: _similarity(of["similarity"]).to_frame() for name, of in results.items()}),
            "perplexity": by_domain({name: _losses(of["losses"]).to_frame() for name, of in results.items()}),
        }


@dataclass(frozen=True)
class _Halves:
    """Half of each source of a domain."""

    of: Mapping[str, Natural]
    means: tuple[Means, ...] = ()
    """That the sources of either half are given."""

    def of_rows(self, batch: TokenBatch) -> Int[Tensor, " batch"]:
        """The half of each row."""
        return torch.tensor([self.of[source] for source in batch.sources])


def random_places(model: Any, batch: TokenBatch, seed: int) -> dict[int, Int[Tensor, "rows columns top_k"]]:
    """A random order of the active experts of every token, by layer: places from 0.

    It depends on the seed and on where the token stands in its text, not on what else is read at the same time.
    """
    drawn = drawn_by_place(batch, seed, len(model.moe_layers), model.top_k)
    places = drawn.argsort(-1)
    return {layer: batch.pack(places[at]) for at, layer in enumerate(model.moe_layers)}


def keep(layer: int, kept: Bool[Tensor, "... top_k"], treatment: str = "dropped") -> Hooks:
    """Hooks that leave a layer some of its active experts: the others have no weight, and are not computed.

    Args:
        layer: Which.
        kept: In which slots, by rank, of all tokens or of each.
        treatment: "renormalised" gives the kept weights the sum that all had.
    """

    def weigh(weights: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        rest = weights.masked_fill(~kept.to(weights.device), 0)
        if treatment != "renormalised":
            return rest
        total = rest.sum(-1, keepdim=True)
        return rest * (weights.sum(-1, keepdim=True) / total.masked_fill(total == 0, 1))

    def compute(computed: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return computed & kept.to(computed.device)

    return [(names.mlp(names.ROUTING_WEIGHTS, layer), weigh), (names.mlp(names.EXPERT_KEPT, layer), compute)]


def replace(
    model: Any, layer: int, k: int, half: Int[Tensor, "rows columns"], means: Sequence[Means], rows: slice
) -> tuple[str, Callable[..., Tensor | None]]:
    """A hook that puts means in the place of all outputs but those of the first k; each half has its own.

    Args:
        model: A `HookedMoE`.
        layer: In which layer.
        k: How many are kept.
        half: Of each token.
        means: Of either half.
        rows: Those of the pass that are meant.
    """
    table = torch.stack([of.experts[of.layers.index(layer)] for of in means])

    def replaced(outputs: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        others = model.experts_in_slots(layer)[rows][..., k:]
        instead = table.to(outputs)[half.to(others.device)[..., None], others]
        return torch.cat([outputs[..., :k, :], instead], -2)

    return names.mlp(names.EXPERT_OUT, layer), replaced


def _similarity(result: Result) -> SimilarityResult:
    assert isinstance(result, SimilarityResult)
    return result


def _losses(result: Result) -> VariantLosses:
    assert isinstance(result, VariantLosses)
    return result
