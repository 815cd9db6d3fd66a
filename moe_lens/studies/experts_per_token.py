"""The study `experts_per_token`: what any number of experts costs, the same for all tokens or as the router says.

Numbers that differ between tokens are held against two things of the same compute: the same numbers shuffled over
the tokens of each window, and a number that is the same for all, for which the two whole numbers next to it are run
when it is known. Budgets of experts are from Alloc-MoE (arXiv
2604.08133).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor

from moe_lens import names
from moe_lens.checked import Natural, Seed
from moe_lens.data import TokenBatch
from moe_lens.errors import InputError
from moe_lens.model.families.expert_groups import Groups
from moe_lens.stats import LossResult, LossStats, Result, bootstrap_all
from moe_lens.studies.experts_used import Used, UsedStats, label, parts
from moe_lens.studies.forward_passes import Hooks, drawn_by_place, losses, predicted
from moe_lens.studies.frames import by_domain
from moe_lens.studies.study import Earlier, Gathered, Study
from moe_lens.studies.variant_losses import WHOLE, Variant, VariantLosses, VariantStats

_FIXED = "fixed{}"
"""The loss of as many experts for all tokens as a variant has on average, by the variant's place."""
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
    passes: ClassVar[tuple[str, ...]] = ("experts", "fixed")

    def chosen_passes(self) -> tuple[str, ...]:
        """The second one where there is a rule to hold something against."""
        return self.passes if self.rules() else self.passes[:1]

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

    def begin(self, model: Any, name: str) -> Gathered:
        """Nothing yet."""
        variants = self.variants(model)
        if name == "fixed":
            return {_FIXED.format(at): LossStats() for at, variant in enumerate(variants) if parts(variant)[0] != "k"}
        return {"losses": VariantStats(variants), "experts": UsedStats(variants, model.moe_layers)}

    def prepare(self, model: Any, name: str, domain: str, earlier: Earlier) -> list[float] | None:  # noqa: ARG002
        """The mean number of experts of every variant, where numbers that are the same for all are held against it."""
        return earlier[domain]["experts"]["experts"].result().mean().mean(-1).tolist() if name == "fixed" else None

    def step(self, model: Any, name: str, batch: TokenBatch, into: Gathered, prepared: Any) -> None:
        """Run every variant, or the whole numbers that their means are between."""
        if name == "fixed":
            means = {each: prepared[at] for at in range(len(prepared)) if (each := _FIXED.format(at)) in into}
            ends = {end for mean in means.values() for end in (math.floor(mean), math.ceil(mean))}
            nats = {k: losses(model, batch, model.use_experts(k).fwd_hooks) for k in sorted(ends)}
            for each, mean in means.items():
                between = torch.lerp(nats[math.floor(mean)].double(), nats[math.ceil(mean)].double(), mean % 1)
                into[each].update(between, predicted(batch), batch.sources)
            return
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
        """Losses and numbers of experts; and for each rule the loss at its mean number, the same for all."""
        found: dict[str, Result] = {name: earlier["experts"][name].result() for name in ("losses", "experts")}
        fixed = earlier.get("fixed", {})
        return found | {name: each.result() for name, each in fixed.items() if isinstance(each, LossStats)}

    def tables(
        self,
        model: Mapping[str, Any],  # noqa: ARG002
        results: Mapping[str, Mapping[str, Result]],
    ) -> dict[str, pd.DataFrame]:
        """`numbers` (a row for each number or rule) and `layers` (mean number of experts in each layer)."""
        losses: Any = {domain: of["losses"] for domain, of in results.items()}
        used: Any = {domain: of["experts"] for domain, of in results.items()}
        return {
            "numbers": by_domain({domain: table(losses[domain], used[domain], of) for domain, of in results.items()}),
            "layers": by_domain({domain: each.to_frame() for domain, each in used.items()}),
        }


def _most(model: Any) -> int:
    """Among how many experts a token may choose."""
    groups = Groups.of_model(model)
    return model.n_experts if groups is None else groups.within(model.n_experts)


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


def table(nats: VariantLosses, used: Used, fixed: Mapping[str, Result]) -> pd.DataFrame:
    """A row for each number or rule.

    Columns: rule (k, mass, threshold, entropy), value, shuffled (whether the numbers were shuffled over tokens), own
    (the model's own number), experts (mean of a token and layer: compute), those of VariantLosses.to_frame (loss,
    perplexity, ratio to the model's own number, paired by source, …), and, of rules, gain: nats a token that it saves
    against a number that is the same for all, at the same mean number of experts, between the two whole numbers next to
    it; paired by source, with a 95 % interval (gain_low, gain_high).
    """
    frame = nats.to_frame().drop(columns=["treatment", "layer", "k"])
    rows = pd.DataFrame([parts(variant) for variant in nats.variants], columns=["rule", "value", "shuffled"])
    rows["own"] = [variant[0] == WHOLE for variant in nats.variants]
    rows["experts"] = used.mean().mean(-1).numpy()
    gain = torch.full((3, len(nats.variants)), torch.nan, dtype=torch.float64)
    tokens = nats.tokens.double()
    for at in range(len(nats.variants)):
        if not isinstance(same := fixed.get(_FIXED.format(at)), LossResult):
            continue
        assert same.sources == nats.sources and torch.equal(same.tokens, nats.tokens)
        saved = same.nats - nats.nats[:, at]
        gain[0, at] = saved.sum() / tokens.sum()
        ends = bootstrap_all(lambda times, saved=saved: (times @ saved) / (times @ tokens), tokens)
        if ends is not None:
            gain[1:, at] = ends
    for name, values in zip(("gain", "gain_low", "gain_high"), gain, strict=True):
        rows[name] = values.numpy()
    return pd.concat([rows, frame], axis=1)
