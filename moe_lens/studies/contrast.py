"""The study `contrast`: which experts do two kinds of prompts differ in, and does the answer hang on them?

Pairs of prompts A and B (two languages, a request that is refused and one that is not, a true and a false statement).
Routing is compared within units, a unit being all pairs of one template (SAFEx, arXiv 2506.17368; SteerMoE, arXiv
2509.09660). Then the experts of A, picked on half of the units, are forbidden in the A prompts of the other half, and
pushed in its B prompts; held against coalitions of the same routing weight, and against the opposite sign.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.checked import AnyModel, Natural, Positive, Seed
from moe_lens.data import Corpus, Domain, Passage, Reading, TokenBatch
from moe_lens.errors import InputError, UnfitError
from moe_lens.stats import Result
from moe_lens.stats.parallel_sources import balanced_halves
from moe_lens.stats.sign_flip_test import beyond_rounding
from moe_lens.studies.contrast_results import (
    MATCHED,
    OPPOSITE,
    PICKED,
    ContrastResult,
    ContrastStats,
    SteerResult,
    SteerStats,
    mean_and_ends,
)
from moe_lens.studies.forward_passes import input_device, losses, predicted
from moe_lens.studies.frames import by_domain
from moe_lens.studies.matched_coalitions import matched, pick
from moe_lens.studies.prompt_pairs import Encoded, Pair, encode, outcome_tokens, shared_weights
from moe_lens.studies.run_study import run
from moe_lens.studies.study import Earlier, Gathered, Study
from moe_lens.studies.study_result import StudyResult
from moe_lens.studies.variant_losses import WHOLE, VariantLosses, VariantStats

PAIRS = "pairs"
"""The domain of the pairs; all others are neutral texts."""
WAYS = ("forbid", "push")
"""Forbid the experts in A's prompts, or add to their router logits in B's; the opposite sign: B's experts are
forbidden in A's prompts, and the logits of A's are lowered in B's."""


@dataclass(frozen=True)
class ContrastStudy(Study):
    """Experts that two kinds of prompts use differently, and whether the answer depends on them."""

    pairs: tuple[Pair, ...]
    experts: Natural | None = None
    """How many of each layer are picked at most; half as many as a token has active if not given."""
    push: float = 2.0
    """Added to router logits."""
    matched: Natural = 20
    """Coalitions matched on routing weight."""
    neutral_matched: Natural = 4
    """How many of them are run on neutral texts, too."""
    draws: Positive = 1000
    """Random signs of the test."""
    seed: Seed = 0
    """Of halves and draws."""

    name: ClassVar[str] = "contrast"
    passes: ClassVar[tuple[str, ...]] = ("routing", "steering")

    def chosen_passes(self) -> tuple[str, ...]:
        """Steering only where pairs have answers."""
        return self.passes if self.pairs[0].answer is not None else self.passes[:1]

    def settings(self) -> dict[str, Any]:
        """What was asked for; the pairs by their digest."""
        content = json.dumps([asdict(pair) for pair in self.pairs]).encode()
        return {**vars(self), "pairs": hashlib.sha256(content).hexdigest()[:16]}

    def check(self, model: Any) -> None:
        """Refuse numbers that make no sense, and answers of several tokens."""
        if min(self.matched, self.draws) < 1 or self.push <= 0 or (self.experts is not None and self.experts < 1):
            raise InputError(
                f"got experts={self.experts}, matched={self.matched}, draws={self.draws}, push={self.push}; "
                "expected at least 1 of each, and a push above 0"
            )
        room = (model.n_experts - model.top_k) // 2
        if room < 1 or (self.experts or 1) > room:
            raise InputError(
                f"experts is {self.experts}; this model chooses {model.top_k} of {model.n_experts}: at most {room} of "
                "a layer can be picked, so that as many are left to hold them against"
            )
        if self.pairs[0].answer is not None:
            outcome_tokens(model, self.pairs)

    def domain(self) -> Domain:
        """The pairs as what the study reads: passages that stand for them."""
        rows = enumerate(self.pairs, 1)
        passages = tuple(Passage(f"{pair.a}\n{pair.b}", pair.unit, f"{PAIRS}:{number}") for number, pair in rows)
        return Domain(PAIRS, passages)

    def variants(self) -> list[str]:
        """What is run of every way: the picked, the opposite sign, and matched coalitions."""
        return [PICKED, OPPOSITE, *[MATCHED] * self.matched]

    def begin(self, model: Any, name: str) -> Gathered:
        """Empty sums."""
        if name == "routing":
            return {"differences": ContrastStats(model.moe_layers, model.n_experts)}
        neutral = [(WHOLE, None, 0)]
        kinds = [PICKED, OPPOSITE, *[MATCHED] * self.neutral_matched]
        neutral += [(f"{way} {kind}", None, at) for way in WAYS for at, kind in enumerate(kinds)]
        return {"outcomes": SteerStats(WAYS, self.variants()), "neutral": VariantStats(neutral)}

    def prepare(self, model: Any, name: str, domain: str, earlier: Earlier) -> Any:
        """The interventions of either half of the units, and the half of each unit."""
        if name == "routing":
            return domain, None, {}
        found = earlier[PAIRS]["routing"]["differences"].result()
        assert isinstance(found, ContrastResult)
        halves = self._halves(found)
        interventions = [self._interventions(model, found, halves, half) for half in (0, 1)]
        return domain, interventions, halves

    def step(self, model: Any, name: str, batch: TokenBatch, into: Gathered, prepared: Any) -> None:
        """Compare the routing of pairs, or steer them, or read neutral texts while steering."""
        domain, interventions, halves = prepared
        if domain == PAIRS:
            some = self._some(batch)
            if name == "routing":
                self._differences(model, some, into)
            else:
                for half in (0, 1):
                    of_half = [pair for pair in some if halves[pair.unit] == half]
                    if of_half:
                        into["outcomes"].update(*self._outcomes(model, of_half, interventions[half]))
        elif name == "steering":
            clean = losses(model, batch, [])
            both = []
            for way in self._on_neutral(interventions):
                found = [losses(model, batch, hooks) for runs in way for hooks in runs[: 2 + self.neutral_matched]]
                both.append(torch.stack([clean, *found]))
            into["neutral"].update(torch.stack(both).mean(0), predicted(batch), batch.sources)

    def _on_neutral(self, interventions: list[list[Any]]) -> list[list[Any]]:
        """Of either half and way: picked, opposite, and matched coalitions that both halves have, as many as asked for.

        Where they are fewer they come again; where there are none the model is left alone, and `tables` says nothing.
        """
        found: list[list[Any]] = [[], []]
        for way in range(len(WAYS)):
            runs = [half[way] for half in interventions]
            common = [at for at in range(2, len(runs[0])) if all(each[at] is not None for each in runs)]
            for half, each in zip(found, runs, strict=True):
                matched_ = islice(cycle([each[at] for at in common] or [[]]), self.neutral_matched)
                half.append([*each[:2], *matched_])
        return found

    def _some(self, batch: TokenBatch) -> list[Pair]:
        """The pairs that a batch stands for."""
        for window in batch.windows:
            if window.start > 0 and not window.written:  # the first one of a text that spells its opening out is
                raise InputError(f"a pair is longer than the window: {self.pairs[window.document].a[:60]!r}…")
        return [self.pairs[window.document] for window in batch.windows]

    def _differences(self, model: Any, pairs: Sequence[Pair], into: Gathered) -> None:
        a = encode(model, [pair.a for pair in pairs], [pair.span_a for pair in pairs])
        b = encode(model, [pair.b for pair in pairs], [pair.span_b for pair in pairs])
        chosen, mass = [], []
        for side in (a, b):
            routing = model.routing(side.tokens.to(input_device(model)), attention_mask=side.mask.long())
            dense = torch.zeros(*routing.indices.shape[:-1], model.n_experts, dtype=torch.float64)
            chosen.append(dense.scatter(-1, routing.indices.cpu(), 1.0))
            mass.append(routing.dense_weights().double().cpu())
        differences, same, shared = [], [], []
        for row in range(len(pairs)):
            one, other = (side.looked_at[row] for side in (a, b))
            here, there = chosen[0][:, row, : len(one)][:, one], chosen[1][:, row, : len(other)][:, other]
            differences.append(here.mean(1) - there.mean(1))
            *weights, any_shared = shared_weights(a.tokens[row][one], b.tokens[row][other])
            same.append(torch.einsum("n,lne->le", weights[0], here) - torch.einsum("n,lne->le", weights[1], there))
            shared.append(any_shared)
        sides = zip(mass, (a, b), strict=True)
        read = [(weight * side.mask[None, ..., None]).sum(2).movedim(0, 1) for weight, side in sides]
        units = [pair.unit for pair in pairs]
        into["differences"].update(
            torch.stack(differences), torch.stack(same), torch.tensor(shared), torch.stack(read, 1), units
        )

    def _outcomes(
        self, model: Any, pairs: Sequence[Pair], interventions: list[list[Any]]
    ) -> tuple[Float[Tensor, "pair way run"], list[str]]:
        """Answer − foil in nats: of A's prompts clean and forbidden, of B's clean and pushed."""
        answer, foil = outcome_tokens(model, pairs)
        found = []
        for side, hooked in zip(("a", "b"), interventions, strict=True):
            prompts = encode(model, [getattr(pair, side) for pair in pairs], [None] * len(pairs))
            runs = [[], *hooked]
            found.append(torch.stack([_log_odds(model, prompts, hooks, answer, foil) for hooks in runs], -1))
        return torch.stack(found, 1), [pair.unit for pair in pairs]

    def _halves(self, found: ContrastResult) -> dict[str, int]:
        halves = balanced_halves({PAIRS: {unit: unit for unit in found.sources}}, self.seed)[PAIRS]
        if len(set(halves.values())) < 2:
            raise UnfitError(
                "there is a single unit: experts are picked on one half of the units and steered on the other; give "
                "pairs of two templates or more"
            )
        return halves

    def coalitions(
        self, found: ContrastResult, top_k: Positive, halves: Mapping[str, Natural], half: Natural
    ) -> dict[str, list[Tensor]]:
        """Experts [layer, n_experts] that are steered in one half of the units: of A, of B, and matched with either."""
        n = self.experts or max(1, min(top_k // 2, (found.differences.shape[-1] - top_k) // 2))
        other = torch.tensor([halves[unit] != half for unit in found.sources])
        pairs = found.pairs[other].sum()
        scores = (beyond_rounding(found.differences[other].sum(0), pairs) / pairs).float()
        of_a, of_b = pick(scores, n), pick(-scores, n)
        key = hashlib.sha256(f"{self.seed} {half}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        coalitions = {"a": [of_a], "b": [of_b]}
        for side, way in enumerate(WAYS):
            mass = found.mass[~other, side].sum(0)
            draw = partial(matched, of_a, mass / mass.sum(), top_k, generator)
            coalitions[way] = [draw() for _ in range(self.matched)]
        return coalitions

    def _interventions(
        self, model: Any, found: ContrastResult, halves: Mapping[str, Natural], half: Natural
    ) -> list[list[Any]]:
        """Hooks of the variants of either way; None where no coalition could be matched."""
        of = self.coalitions(found, model.top_k, halves, half)
        (of_a,), (of_b,) = of["a"], of["b"]
        if not (of_a.any() and of_b.any()):
            raise UnfitError("no expert is chosen more often in one kind of prompts than in the other: none to steer")

        def forbid(members: Tensor) -> Any:
            return model.ablate(_listed(model, members), how="reroute").fwd_hooks if members.any() else None

        def push(members: Tensor, amount: float) -> Any:
            steering = {at: dict.fromkeys(experts, amount) for at, experts in _listed(model, members).items()}
            return model.steer_experts(steering).fwd_hooks if members.any() else None

        return [
            [forbid(of_a), forbid(of_b), *map(forbid, of["forbid"])],
            [push(of_a, self.push), push(of_a, -self.push), *(push(each, self.push) for each in of["push"])],
        ]

    def results(self, earlier: Mapping[str, Gathered]) -> dict[str, Result]:
        """Of the pairs, differences and outcomes; of neutral texts, losses."""
        found: dict[str, Result] = {}
        for name, of in (("differences", "routing"), ("outcomes", "steering"), ("neutral", "steering")):
            accumulator = earlier.get(of, {}).get(name)
            if isinstance(accumulator, ContrastStats | SteerStats | VariantStats) and accumulator.seen:
                found[name] = accumulator.result()
        return found

    def tables(
        self,
        model: Mapping[str, Any],  # noqa: ARG002
        results: Mapping[str, Mapping[str, Result]],
    ) -> dict[str, pd.DataFrame]:
        """`experts`, `test`, and with answers `steering` and `neutral`."""
        found = results[PAIRS]["differences"]
        assert isinstance(found, ContrastResult)
        tables = {"experts": found.experts(self.draws, self.seed), "test": found.test(self.draws, self.seed)}
        outcomes = results[PAIRS].get("outcomes")
        if isinstance(outcomes, SteerResult):
            tables["steering"] = outcomes.to_frame()
        neutral = {domain: of["neutral"] for domain, of in results.items() if "neutral" in of}
        bare = [way for way in WAYS if isinstance(outcomes, SteerResult) and not outcomes.n_matched(way)]
        frames = {domain: _neutral(of, bare) for domain, of in neutral.items() if isinstance(of, VariantLosses)}
        return {**tables, "neutral": by_domain(frames)} if frames else tables


def _neutral(losses: VariantLosses, bare: Sequence[str]) -> pd.DataFrame:
    """A row for each way and kind: nats a token that steering adds to neutral texts, with a 95 % interval.

    Ways in `bare` have no matched coalitions.
    """
    nats, tokens, rows = losses.log_ratios()[0], losses.tokens, []
    kinds = dict.fromkeys(treatment for treatment, _, _ in losses.variants[1:])
    for treatment in kinds:
        at = [number for number, variant in enumerate(losses.variants) if variant[0] == treatment]
        added = mean_and_ends(nats[:, at].mean(1), tokens)
        way, kind = treatment.split()
        if kind == MATCHED and way in bare:
            continue
        row = dict(zip(("added", "low", "high"), added, strict=True))
        rows.append({"way": way, "kind": kind, **row, "tokens": int(tokens.sum()), "sources": len(losses.sources)})
    return pd.DataFrame(rows)


def _listed(model: Any, members: Tensor) -> dict[int, list[int]]:
    rows = {layer: members[row].nonzero()[:, 0].tolist() for row, layer in enumerate(model.moe_layers)}
    return {layer: experts for layer, experts in rows.items() if experts}


@torch.no_grad()
def _log_odds(model: Any, prompts: Encoded, hooks: Any, answer: Tensor, foil: Tensor) -> Float[Tensor, " pair"]:
    """Logit of the answer minus that of the foil after the last token, in nats; NaN without hooks to run."""
    if hooks is None:
        return torch.full((len(answer),), torch.nan, dtype=torch.float64)
    device = input_device(model)
    logits = model.run_with_hooks(
        prompts.tokens.to(device), fwd_hooks=hooks, attention_mask=prompts.mask.long().to(device)
    )
    rows = torch.arange(len(answer))
    last = logits[rows.to(logits.device), prompts.last.to(logits.device)].double().cpu()
    return last[rows, answer] - last[rows, foil]


def contrast_prompts(
    model: AnyModel,
    pairs: Sequence[Pair],
    neutral: Sequence[Domain | Corpus] = (),
    *,
    reading: Reading | None = None,
    out: str | Path | None = None,
    name: str | None = None,
    batch_tokens: Positive | None = None,
    watch: Callable[[str, int], None] = lambda what, tokens: None,  # noqa: ARG005
    say: Callable[[str], None] = lambda line: None,  # noqa: ARG005
    **settings: Any,
) -> StudyResult:
    """Run the study of some pairs.

    Args:
        model: A `HookedMoE`.
        pairs: What `read_pairs` returns.
        neutral: Texts on which the cost of steering is measured.
        reading: How much of them is read.
        out: See `run`.
        name: See `run`.
        batch_tokens: See `run`.
        watch: See `run`.
        say: See `run`.
        settings: Of `ContrastStudy`.

    Raises:
        InputError: See `ContrastStudy` and `run`.
    """
    study, reading = ContrastStudy(tuple(pairs), **settings), reading or Reading()
    domains = [study.domain(), *neutral]
    lengths = [len(model.to_tokens(passage.text, truncate=False)[0]) for passage in study.domain().passages]
    if reading.tokens is not None and reading.tokens < sum(lengths):
        raise InputError(f"tokens is {reading.tokens}; the pairs have {sum(lengths)}: give as many or more")
    if (room := min(reading.context, int(model.cfg.n_ctx))) < max(lengths):
        raise InputError(
            f"windows have {room} tokens; the longest pair has {max(lengths)}: give longer ones, up to the model's "
            f"context of {model.cfg.n_ctx}"
        )
    if any(domain.name == PAIRS for domain in neutral):
        raise InputError(f"a neutral domain is named {PAIRS!r}; give it another name")
    how = {"reading": reading, "out": out, "name": name, "batch_tokens": batch_tokens, "watch": watch}
    return run(study, model, domains, say=say, **how)
