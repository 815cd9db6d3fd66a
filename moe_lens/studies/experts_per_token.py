"""The study `experts_per_token`: what any number of experts costs, the same for all tokens or as the router says.

Numbers that differ between tokens are held against two things of the same compute: the same numbers shuffled over
the tokens of each window, and a number that is the same for all. Budgets of experts are from Alloc-MoE (arXiv
2604.08133).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens import names
from moe_lens.checked import Natural, Seed
from moe_lens.data import TokenBatch
from moe_lens.errors import InputError
from moe_lens.model.families.expert_groups import Groups
from moe_lens.stats import Accumulator, Result, bootstrap_all
from moe_lens.stats.sums import BySource
from moe_lens.studies.forward_passes import Hooks, drawn_by_place, losses, predicted
from moe_lens.studies.frames import by_domain
from moe_lens.studies.study import Gathered, Study
from moe_lens.studies.variant_losses import WHOLE, Variant, VariantLosses, VariantStats

ADAPTIVE = ("mass", "threshold", "entropy")
"""Rules by which tokens have numbers of their own, as `use_experts` has them."""


@dataclass(frozen=True)
class ExpertsPerToken(Study):
    """Loss with other numbers of active experts: the same for all tokens, or chosen for each by a rule."""

    k: tuple[Natural, ...] | None = None
    """Numbers that are the same for all; 1, 2, 4, … and all, and half, one and a half times and twice the model's own,
    if not given. The model's own is always run. All are those of the groups that a router leaves to a token."""
    mass: tuple[float, ...] = (0.15, 0.3, 0.5)
    threshold: tuple[float, ...] = ()
    entropy: tuple[float, ...] = ()
    seed: Seed = 0
    """Of the numbers that are shuffled over the tokens of a window."""

    name: ClassVar[str] = "experts_per_token"
    passes: ClassVar[tuple[str, ...]] = ("experts",)

    def numbers(self, model: Any) -> list[int]:
        """The numbers that are the same for all, ascending; the model's own is not among them."""
        if self.k is not None:
            return sorted(set(self.k) - {model.top_k})
        most = _most(model)
        powers = {2**n for n in range(most.bit_length())}
        near = {max(1, model.top_k // 2), 3 * model.top_k // 2, 2 * model.top_k, most}
        return sorted({k for k in powers | near if k <= most} - {model.top_k})

    def rules(self) -> list[tuple[str, float]]:
        """The rules by which tokens have numbers of their own."""
        return [(rule, value) for rule in ADAPTIVE for value in dict.fromkeys(getattr(self, rule))]

    def check(self, model: Any) -> None:
        """Refuse numbers that the model cannot use; a family that cannot use others says so."""
        for k in (model.top_k, *self.numbers(model)):
            model.use_experts(k)
            if k > _most(model):
                raise InputError(f"k is {k}; the groups that the router leaves to a token hold {_most(model)} experts")
        for rule, value in self.rules():
            model.use_experts(**{rule: value})

    def variants(self, model: Any) -> list[Variant]:
        """Everything that is run, the model's own number first."""
        adaptive = [
            (label(rule, value, shuffled), None, 0) for rule, value in self.rules() for shuffled in (False, True)
        ]
        return [(WHOLE, None, model.top_k), *(("k", None, k) for k in self.numbers(model)), *adaptive]

    def begin(self, model: Any, name: str) -> Gathered:  # noqa: ARG002
        """Nothing yet."""
        variants = self.variants(model)
        return {"losses": VariantStats(variants), "experts": UsedStats(variants, model.moe_layers)}

    def step(self, model: Any, name: str, batch: TokenBatch, into: Gathered, prepared: Any) -> None:  # noqa: ARG002
        """Run every variant."""
        adaptive = [model.use_experts(**{rule: value}).fwd_hooks for rule, value in self.rules()]
        runs: list[Hooks] = [[], *(model.use_experts(k).fwd_hooks for k in self.numbers(model))]
        for hooks in adaptive:
            runs += [hooks, [*hooks, *shuffle_numbers(model, batch, self.seed)]]
        found, used = [], []
        for hooks in runs:
            seen: dict[int, Tensor] = {}
            found.append(losses(model, batch, [*hooks, *_watch(model, batch, seen)]))
            used.append(torch.stack([seen[layer] for layer in model.moe_layers], -1))
        into["losses"].update(torch.stack(found), predicted(batch), batch.sources)
        into["experts"].update(torch.stack(used), batch.counted, batch.sources)

    def results(self, earlier: Mapping[str, Gathered]) -> dict[str, Result]:
        """Losses and numbers of experts."""
        return {name: earlier["experts"][name].result() for name in ("losses", "experts")}

    def tables(
        self,
        model: Mapping[str, Any],  # noqa: ARG002
        results: Mapping[str, Mapping[str, Result]],
    ) -> dict[str, pd.DataFrame]:
        """`numbers` (a row for each number or rule) and `layers` (mean number of experts in each layer)."""
        both = {domain: (of["losses"], of["experts"]) for domain, of in results.items()}
        pairs = {d: (a, b) for d, (a, b) in both.items() if isinstance(a, VariantLosses) and isinstance(b, Used)}
        return {
            "numbers": by_domain({domain: table(*pair) for domain, pair in pairs.items()}),
            "layers": by_domain({domain: used.to_frame() for domain, (_, used) in pairs.items()}),
        }


def _most(model: Any) -> int:
    """Among how many experts a token may choose."""
    groups = Groups.of_model(model)
    return model.n_experts if groups is None else groups.within(model.n_experts)


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


def shuffle_numbers(model: Any, batch: TokenBatch, seed: int) -> Hooks:
    """Hooks that give the numbers of experts of a window's counted tokens to others of it, in each layer anew."""
    drawn = drawn_by_place(batch, f"{seed} numbers", len(model.moe_layers))[..., 0]
    read = batch.pack(batch.counted)[..., None]
    last = (~batch.counted).long()
    places = last.argsort(dim=-1, stable=True)  # the counted ones, in order, and then the others
    orders = [(each + last).argsort(dim=-1, stable=True) for each in drawn.masked_fill(~batch.counted, 0)]

    def shuffled(counts: Tensor, hook: Any, order: Tensor) -> Tensor:  # noqa: ARG001
        numbers = batch.unpack(counts)[..., 0]
        at, order = places.to(counts.device), order.to(counts.device)
        moved = batch.pack(numbers.scatter(-1, at, numbers.gather(-1, order))[..., None])
        return torch.where(read.to(counts.device), moved, counts)

    return [
        (names.mlp(names.N_ACTIVE, layer), lambda counts, hook, order=order: shuffled(counts, hook, order))
        for layer, order in zip(model.moe_layers, orders, strict=True)
    ]


def _watch(model: Any, batch: TokenBatch, seen: dict[int, Tensor]) -> Hooks:
    """Hooks that note how many experts each token has, by layer."""

    def note(counts: Tensor, hook: Any, layer: int) -> None:  # noqa: ARG001
        seen[layer] = batch.unpack(counts[..., 0].cpu())

    return [
        (names.mlp(names.N_ACTIVE, layer), lambda counts, hook, layer=layer: note(counts, hook, layer))
        for layer in model.moe_layers
    ]


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


def table(nats: VariantLosses, used: Used) -> pd.DataFrame:
    """A row for each number or rule.

    Columns: rule (k, mass, threshold, entropy), value, shuffled (whether the numbers were shuffled over tokens), own
    (the model's own number), experts (mean of a token and layer: compute), those of VariantLosses.to_frame (loss,
    perplexity, ratio to the model's own number, paired by source, …), and gain: nats a token that it saves against a
    number that is the same for all, at the same mean number of experts, between the two nearest that were run; paired
    by source, with a 95 % interval (gain_low, gain_high); missing where no smaller or no greater number was run.
    """
    frame = nats.to_frame().drop(columns=["treatment", "layer", "k"])
    mean = used.mean().mean(-1)
    rows = pd.DataFrame([parts(variant) for variant in nats.variants], columns=["rule", "value", "shuffled"])
    rows["own"] = [variant[0] == WHOLE for variant in nats.variants]
    rows["experts"] = mean.numpy()
    gain = torch.full((3, len(nats.variants)), torch.nan, dtype=torch.float64)
    static = [at for at, rule in enumerate(rows["rule"]) if rule == "k"]
    tokens = nats.tokens.double()
    for at, rule in enumerate(rows["rule"]):
        below = [one for one in static if mean[one] <= mean[at]]
        above = [one for one in static if mean[one] >= mean[at]]
        if rule == "k" or not below or not above:
            continue
        low, high = max(below, key=lambda one: float(mean[one])), min(above, key=lambda one: float(mean[one]))
        part = 0.0 if low == high else float((mean[at] - mean[low]) / (mean[high] - mean[low]))
        saved = (1 - part) * nats.nats[:, low] + part * nats.nats[:, high] - nats.nats[:, at]
        gain[0, at] = saved.sum() / tokens.sum()
        ends = bootstrap_all(lambda times, saved=saved: (times @ saved) / (times @ tokens), tokens)
        if ends is not None:
            gain[1:, at] = ends
    for name, values in zip(("gain", "gain_low", "gain_high"), gain, strict=True):
        rows[name] = values.numpy()
    return pd.concat([rows, frame], axis=1)
