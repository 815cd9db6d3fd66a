"""The study `facts`: which experts bring an answer back? Picked on half of the prompts, confirmed on the others.

Causal tracing over a set of prompts (arXiv 2202.05262, 2606.03780): noise on the subject, then experts restored at its
last token. Experts that bring most of the answer back on one half of the prompts are restored together on the other,
and the other way round; held against as many experts at random, and against all of them.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Self

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.checked import AnyModel, Natural, Positive, Seed
from moe_lens.data import Domain, Passage, Reading, TokenBatch
from moe_lens.data.files import read_objects
from moe_lens.errors import InputError, UnfitError
from moe_lens.interventions.embedding_noise import embedding_deviation
from moe_lens.interventions.trace_prompt import whole_prompt
from moe_lens.interventions.traced_fact import Fact, TracedFact, facts_of
from moe_lens.stats import Accumulator, Result, bootstrap_all
from moe_lens.stats.parallel_sources import balanced_halves
from moe_lens.stats.sums import BySource
from moe_lens.studies.frames import by_domain
from moe_lens.studies.localisation_scores import ScoreResult, ScoreStats
from moe_lens.studies.matched_coalitions import pick
from moe_lens.studies.run_study import run
from moe_lens.studies.study import Earlier, Gathered, Study
from moe_lens.studies.study_result import StudyResult

SMALL_FACTS = "small"
"""The facts that ship with the package: what a very small model knows."""
RUNS = ("clean", "corrupted", "all", "picked")
"""Runs of every prompt, before those with random experts: clean; corrupted; and corrupted with all experts restored,
which is the most that any of them can do, or with the picked."""


@dataclass(frozen=True, eq=False)
class FactResult(Result):
    """Sums over prompts of answer − foil (logits) and of the answer's rank, in each run."""

    runs: tuple[str, ...]
    sources: tuple[str, ...]
    prompts: Int[Tensor, " source"]
    sums: Float[Tensor, "source run 2"]

    def to_frame(self) -> pd.DataFrame:
        """A row for each run, the random ones together: difference and rank, means over prompts with 95 % intervals.

        Columns: run; difference (answer − foil, logits) and rank (of the answer: how many tokens are above it), each
        with _low and _high, over sources (missing below ten); prompts, sources.
        """
        rows = []
        for name in dict.fromkeys(self.runs):
            row: dict[str, Any] = {"run": name}
            for column, at in (("difference", 0), ("rank", 1)):
                low, high = self._ends(self._of(name)[:, at])
                row |= {column: self._mean(self._of(name)[:, at]), f"{column}_low": low, f"{column}_high": high}
            rows.append({**row, "prompts": int(self.prompts.sum()), "sources": len(self.sources)})
        return pd.DataFrame(rows)

    def contrast(self) -> pd.DataFrame:
        """What the picked bring back beyond what as many at random do: a row for answer − foil, and one for the rank.

        Columns: measure; estimate, low, high: the picked minus the mean of the random ones (a lower rank is better);
        beaten, the share of random coalitions that the picked do better than; picked, random and all, what each brings
        back (restored less corrupted); prompts, sources.
        """
        rows = []
        for measure, at, sign in (("difference", 0, 1), ("rank", 1, -1)):
            back = {name: self._of(name)[:, at] - self._of("corrupted")[:, at] for name in ("picked", "random", "all")}
            extra = back["picked"] - back["random"]
            low, high = self._ends(extra)
            each = self.sums[:, [run == "random" for run in self.runs], at].sum(0)
            beaten = (sign * (self._of("picked")[:, at].sum() - each) > 0).double().mean()
            rows.append(
                {"measure": measure, "estimate": self._mean(extra), "low": low, "high": high, "beaten": float(beaten),
                 **{name: self._mean(value) for name, value in back.items()},
                 "prompts": int(self.prompts.sum()), "sources": len(self.sources)}
            )  # fmt: skip
        return pd.DataFrame(rows)

    def _of(self, run: str) -> Float[Tensor, "source 2"]:
        return self.sums[:, [name == run for name in self.runs]].mean(1)

    def _mean(self, sums: Float[Tensor, " source"]) -> float:
        return float(sums.sum() / self.prompts.sum())

    def _ends(self, sums: Float[Tensor, " source"]) -> tuple[float, float]:
        ends = bootstrap_all(lambda times: (times @ sums) / (times @ self.prompts.double()), self.prompts)
        return (float("nan"), float("nan")) if ends is None else (float(ends[0]), float(ends[1]))


class FactStats(Accumulator[FactResult]):
    """Sums scores of runs over prompts, by source."""

    def __init__(self, n_random: int):
        self.runs = (*RUNS, *["random"] * n_random)
        self._sums, self._prompts = BySource(), BySource()
        super().__init__({"runs": self.runs}, {"sums": self._sums, "prompts": self._prompts})

    def update(self, scores: Float[Tensor, "run 2"], source: str) -> Self:
        """Count a prompt: answer − foil and rank in each run."""
        self._sums.add(scores[None].double(), [source])
        self._prompts.add(torch.ones(1, dtype=torch.long), [source])
        return self

    def result(self) -> FactResult:
        """The sums so far."""
        return FactResult(self.runs, self._sums.sources, self._prompts.stacked(), self._sums.stacked())


@dataclass(frozen=True)
class FactStudy(Study):
    """Causal tracing over facts, by kind: do experts picked on some prompts restore the answers of others?"""

    facts: tuple[Fact, ...]
    experts: Positive | None = None
    """How many of each layer are picked; half as many as a token has active if not given."""
    random: Natural = 20
    """Coalitions of as many experts, drawn among those that the clean run uses at the subject's last token."""
    noise: float = 3.0
    """Standard deviation of the noise, as a multiple of that of all embeddings."""
    draws: Positive = 4
    """How many times noise is drawn for each prompt."""
    seed: Seed = 0
    """Of halves, noise and draws."""

    name: ClassVar[str] = "facts"
    passes: ClassVar[tuple[str, ...]] = ("tracing", "confirming")

    def settings(self) -> dict[str, Any]:
        """What was asked for; the facts by their digest."""
        content = json.dumps([asdict(fact) for fact in self.facts]).encode()
        return {**vars(self), "facts": hashlib.sha256(content).hexdigest()[:16]}

    def check(self, model: Any) -> None:
        """Refuse numbers that make no sense, and prompts that the model cannot read at once."""
        if self.random < 1 or self.draws < 1 or self.noise <= 0 or (self.experts is not None and self.experts < 1):
            raise InputError(
                f"got experts={self.experts}, random={self.random}, draws={self.draws}, noise={self.noise}; "
                "expected at least 1 of each, and noise above 0"
            )
        for fact in self.facts:
            whole_prompt(model, fact.prompt)

    def domains(self) -> list[Domain]:
        """The prompts of each kind as a domain: what the study reads."""
        kinds: dict[str, list[Passage]] = {}
        for number, fact in enumerate(self.facts, 1):
            kinds.setdefault(fact.kind, []).append(Passage(fact.prompt, _source(fact), f"facts:{number}"))
        return [Domain(kind, tuple(passages)) for kind, passages in kinds.items()]

    def begin(self, model: Any, name: str) -> Gathered:
        """Empty sums."""
        if name == "tracing":
            return {"effects": ScoreStats(model.moe_layers, model.n_experts)}
        return {"scores": FactStats(self.random)}

    def prepare(self, model: Any, name: str, domain: str, earlier: Earlier) -> Any:
        """The facts of the kind, the noise, which experts were picked on either half, and the half of each source."""
        facts = [fact for fact in self.facts if fact.kind == domain]
        noise_std = self.noise * embedding_deviation(model)
        if name == "tracing":
            return facts, noise_std, None, {}
        effects = earlier[domain]["tracing"]["effects"].result()
        assert isinstance(effects, ScoreResult)
        return facts, noise_std, self._picked(effects, model.top_k), self._halves(effects)

    def step(self, model: Any, name: str, batch: TokenBatch, into: Gathered, prepared: Any) -> None:
        """Trace every prompt, or restore coalitions in it."""
        facts, noise_std, picked, halves = prepared
        for window in batch.windows:
            fact = facts[window.document]
            traced = TracedFact.of(model, fact, noise_std=noise_std, draws=self.draws, seed=self.seed)
            if name == "tracing":
                into["effects"].update(traced.effects()[None], torch.ones(1, dtype=torch.long), [_source(fact)])
                continue
            own = picked[1 - halves[_source(fact)]]
            coalitions = torch.stack([torch.ones_like(own), own, *self._random(traced, own, fact)])
            into["scores"].update(torch.cat([traced.ends, traced.restored(coalitions)]), _source(fact))

    def _random(self, traced: TracedFact, own: Tensor, fact: Fact) -> list[Tensor]:
        """Coalitions as large in every layer, of experts that the clean run uses there, as far as there are so many."""
        key = hashlib.sha256(f"{self.seed} {fact.prompt}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        found = []
        for _ in range(self.random):
            worth = torch.rand(own.shape, generator=generator) + traced.active
            members = torch.zeros_like(own)
            for row, n in enumerate(own.sum(1).tolist()):
                members[row, worth[row].topk(n).indices] = True
            found.append(members)
        return found

    def _halves(self, effects: ScoreResult) -> dict[str, int]:
        return balanced_halves({"": {source: source for source in effects.sources}}, self.seed)[""]

    def _picked(self, effects: ScoreResult, top_k: int) -> list[Tensor]:
        """Those with the greatest mean effect on either half."""
        halves = self._halves(effects)
        if len(set(halves.values())) < 2:
            raise UnfitError(
                "a kind of facts has a single source: experts are picked on one half of the sources and confirmed on "
                "the other; give facts of two sources or more"
            )
        n = self.experts or max(1, top_k // 2)
        kept = [[halves[source] == half for source in effects.sources] for half in (0, 1)]
        return [pick(effects.per_token(of), n) for of in kept]

    def results(self, earlier: Mapping[str, Gathered]) -> dict[str, Result]:
        """Effects of single experts, and scores of the runs."""
        return {"effects": earlier["tracing"]["effects"].result(), "scores": earlier["confirming"]["scores"].result()}

    def tables(self, model: Mapping[str, Any], results: Mapping[str, Mapping[str, Result]]) -> dict[str, pd.DataFrame]:
        """`contrast`, `runs`, and `experts` (who was picked on each half), by kind of fact."""
        contrasts, runs, picked = {}, {}, []
        for kind, of in results.items():
            scores, effects = of["scores"], of["effects"]
            assert isinstance(scores, FactResult) and isinstance(effects, ScoreResult)
            contrasts[kind], runs[kind] = scores.contrast(), scores.to_frame()
            for half, members in enumerate(self._picked(effects, int(model["top_k"]))):
                picked += [
                    {"domain": kind, "picked_on": half, "layer": effects.layers[row], "expert": expert}
                    for row, expert in members.nonzero().tolist()
                ]
        columns = ["domain", "picked_on", "layer", "expert"]
        return {
            "contrast": by_domain(contrasts), "runs": by_domain(runs), "experts": pd.DataFrame(picked, columns=columns)
        }  # fmt: skip


def _source(fact: Fact) -> str:
    return fact.source or fact.prompt


def read_facts(path: str | Path) -> tuple[Fact, ...]:
    """Facts from a JSON Lines file, or the embedded ones (`"small"`).

    Each line is an object with prompt, subject (a part of the prompt), answer and foil (a token each), and perhaps kind
    and source (what facts that are not independent share, such as their template).

    Raises:
        InputError: It cannot be read; the message names the line.
    """
    if str(path) == SMALL_FACTS:
        path = Path(str(resources.files("moe_lens") / "assets" / "facts" / "small.jsonl"))
    return facts_of(read_objects(path, "an object with prompt, subject, answer and foil"), str(path))


def localise_facts(
    model: AnyModel,
    facts: Sequence[Fact],
    *,
    experts: Positive | None = None,
    out: str | Path | None = None,
    name: str | None = None,
    seed: Seed = 0,
    watch: Callable[[str, int], None] = lambda what, tokens: None,  # noqa: ARG005
) -> StudyResult:
    """Run the study of some facts; see `FactStudy` and `run`."""
    study = FactStudy(tuple(facts), experts=experts, seed=seed)
    reading = Reading(tokens=None, context=int(model.cfg.n_ctx), shard_tokens=16)  # prompts are short, runs many
    return run(study, model, study.domains(), reading=reading, out=out, name=name, watch=watch)
