"""The study `localisation`: does knowledge of a domain sit in experts of its own?

The abstract of "MoE Lens" (arXiv 2603.05806) ends with localisation of knowledge. Experts are picked for a domain on
one half of its sources and taken out of the model on the other, and the other way round. What that costs the domain's
own texts, beyond what it costs others', is held against coalitions that carry as much of the domain's routing weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.checked import Positive, Seed
from moe_lens.data import Reading, TokenBatch
from moe_lens.errors import InputError, UnfitError
from moe_lens.interventions.coalitions import Removal
from moe_lens.model.loading.batch_sizes import BATCH_TOKENS
from moe_lens.stats import Result, RoutingResult, RoutingStats, observe
from moe_lens.stats.parallel_sources import LANGUAGE, balanced_halves, parallel_blocks
from moe_lens.studies import matched_coalitions as chosen
from moe_lens.studies.forecast import Load
from moe_lens.studies.frames import by_domain
from moe_lens.studies.localisation_contrast import Contrasts, table
from moe_lens.studies.localisation_effects import CoalitionEffects, CoalitionStats, load_without, read_without
from moe_lens.studies.localisation_scores import ScoreResult, ScoreStats, scores_of
from moe_lens.studies.study import Earlier, Gathered, Study
from moe_lens.studies.study_result import StudyResult

By = Literal["routing", "attribution", "knockout"]
Controlled = Literal["each", "primary"]

REMOVALS: tuple[Removal, ...] = ("reroute", "zero")


@dataclass(frozen=True)
class Localisation(Study):
    """Loss on every domain without the experts that one domain prefers, on sources that they were not picked on."""

    by: By = "routing"
    """What experts are picked by: how much more of the domain's tokens choose them than of others', as
    `compare_domains` has it; or what they are worth to the domain's loss beyond others', estimated by gradient ×
    activation, or measured by taking out each of them."""
    experts: Positive | None = None
    """How many of each layer are picked for a domain; half as many as a token has active if not given."""
    how: tuple[Removal, ...] = ("reroute", "zero")
    """How they are taken out; the first is the primary one."""
    matched: Positive = 40
    """Coalitions matched on routing weight."""
    controls: Controlled = "each"
    """Whether random and matched coalitions are taken out in each way, or in the primary one alone."""
    parallel: str = LANGUAGE
    """What may differ in the names of sources that are one document in several domains: they stay together."""
    seed: Seed = 0
    """Of halves and draws."""

    name: ClassVar[str] = "localisation"
    passes: ClassVar[tuple[str, ...]] = ("routing", "scores", "effects")

    def chosen_passes(self) -> tuple[str, ...]:
        """Routing and effects; between them scores, if experts are picked by them."""
        return tuple(name for name in self.passes if name != "scores" or self.by != "routing")

    def check(self, model: Any) -> None:
        """Refuse other ways and those that are named twice, and numbers that make no coalition."""
        wrong = [how for how in self.how if how not in REMOVALS]
        if wrong or not self.how or len(set(self.how)) < len(self.how):
            raise InputError(f"how is {self.how!r}; expected one or both of {', '.join(REMOVALS)}")
        room = _most(model.n_experts, model.top_k)
        if room < 1:
            raise UnfitError(
                f"this model chooses {model.top_k} of {model.n_experts} experts: with any of them taken out there are "
                "none left to hold them against"
            )
        if self.experts is not None and self.experts > room:
            raise InputError(
                f"experts is {self.experts}; at most {room} of a layer's {model.n_experts} can be picked, so that as "
                "many are left to hold them against"
            )

    def load(self, model: Any, name: str, reading: Reading, domains: Positive) -> Load | None:
        """Routing; or a clean run and one more without each coalition. What scores take is not known before."""
        if name == "routing":
            return Load.stacked(reading.tokens or 0, BATCH_TOKENS, logits=0)
        if name == "scores":
            return None
        kinds = [kind for kind, _ in chosen.variants(self.matched)]
        every = sum(kind in (chosen.PICKED, chosen.BUSIEST) for kind in kinds)  # of every domain
        drawn = (len(kinds) - every) * min(domains, 2)  # of the own one, and in turns of the others
        ways = len(self.how) if self.controls == "each" else 1
        return load_without(model, reading, len(self.how) * every * domains + ways * drawn)

    def begin(self, model: Any, name: str) -> Gathered:
        """Empty counts and sums."""
        if name == "routing":
            return {"routing": RoutingStats(model.moe_layers, model.n_experts, model.top_k)}
        if name == "scores":
            return {"scores": ScoreStats(model.moe_layers, model.n_experts)}
        return {"effects": CoalitionStats(self.how, [kind for kind, _ in chosen.variants(self.matched)])}

    def prepare(self, model: Any, name: str, domain: str, earlier: Earlier) -> Any:  # noqa: ARG002
        """The coalitions of all domains, and the halves of the sources of the one that is read."""
        if name != "effects":
            return None
        results = {d: {k: a.result() for of in passes.values() for k, a in of.items()} for d, passes in earlier.items()}
        found = self.coalitions(results)
        members = torch.stack([torch.stack([of[half].members for of in found.values()]) for half in (0, 1)])
        return domain, list(found), members, self._halves(results)[domain]

    def step(self, model: Any, name: str, batch: TokenBatch, into: Gathered, prepared: Any) -> None:
        """Count routing, score experts, or read a batch without every coalition."""
        if name == "routing":
            into["routing"].update(observe(model, batch))
        elif name == "scores":
            into["scores"].update(*scores_of(model, batch, self.by), batch.sources)
        else:
            into["effects"].update(*self._effects(model, batch, *prepared), batch.sources)

    def _effects(
        self, model: Any, batch: TokenBatch, domain: str, domains: list[str], members: Tensor, half: Mapping[str, int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Nats and predicted tokens of each text, nats added without each coalition, and which of those were run."""
        read = self._read(batch, domains.index(domain), len(domains))
        halves = torch.tensor([half[source] for source in batch.sources])
        read &= members.any((-2, -1))[halves][:, None]  # [batch, 1, domain, variant]
        return *read_without(model, batch, members, half, read, self.how), read

    def _read(self, batch: TokenBatch, own: int, n_domains: int) -> Tensor:
        """Which texts are read without which coalitions.

        Random and matched coalitions of other domains take turns over the texts, so that all of them together read as
        much of other domains as of their own, whatever the number of domains.
        """
        kinds = chosen.variants(self.matched)
        turns = max(1, n_domains - 1)
        turn = torch.tensor([(window.document + window.start) % turns for window in batch.windows])
        whole = torch.tensor([kind in (chosen.PICKED, chosen.BUSIEST) for kind, _ in kinds])
        number = torch.tensor([number % turns for _, number in kinds])
        read = (whole | (number == turn[:, None]))[:, None, None].repeat(1, len(self.how), n_domains, 1)
        read[:, :, own] = True
        if self.controls == "primary":
            read[:, 1:] &= whole
        return read

    def results(self, earlier: Mapping[str, Gathered]) -> dict[str, Result]:
        """Routing and effects, and scores if there are any."""
        return {name: into[name].result() for into in earlier.values() for name in into if name != "texts"}

    def _blocks(self, results: Mapping[str, Mapping[str, Result]]) -> dict[str, dict[str, str]]:
        return parallel_blocks({domain: _routing(of).sources for domain, of in results.items()}, self.parallel)

    def _halves(self, results: Mapping[str, Mapping[str, Result]]) -> dict[str, dict[str, int]]:
        return balanced_halves(self._blocks(results), self.seed)

    def coalitions(
        self, results: Mapping[str, Mapping[str, Result]]
    ) -> dict[str, tuple[chosen.Coalitions, chosen.Coalitions]]:
        """The coalitions of each domain: those taken out of half 0 of the sources, and out of half 1.

        Raises:
            UnfitError: Fewer than two domains, or a domain of a single source.
        """
        if len(results) < 2:
            raise UnfitError(
                f"got the domain {next(iter(results))!r} alone; expected at least two: what is picked for one "
                "is held against the others"
            )
        halves = self._halves(results)
        alone = [domain for domain, of in halves.items() if len(set(of.values())) < 2]
        if alone:
            raise UnfitError(
                f"domain {alone[0]!r} has too few sources to pick experts on one half of them and take them out on "
                "the other; give texts of two sources or more"
            )
        routing = {domain: _routing(of) for domain, of in results.items()}
        first = next(iter(routing.values()))
        n = self.experts or max(1, min(first.top_k // 2, _most(first.n_experts, first.top_k)))
        busy = torch.stack([of.specialisation for of in routing.values()]).mean(0)
        out: dict[str, list[chosen.Coalitions]] = {domain: [] for domain in results}
        for half in (0, 1):
            picked_on, out_of = (
                {d: chosen.of_sources(of, [halves[d][s] == h for s in of.sources]) for d, of in routing.items()}
                for h in (1 - half, half)
            )
            if self.by == "routing":
                worth = {domain: of.specialisation for domain, of in picked_on.items()}
            else:
                worth = self._worth(results, halves, 1 - half)
            scores = chosen.differences(worth)
            for domain in results:
                picked = chosen.pick(scores[domain], n)
                mass = out_of[domain].weights.sum(0)
                key = (self.seed, domain, half)
                out[domain].append(chosen.coalitions(picked, mass, busy, first.top_k, self.matched, key))
        return {domain: (of[0], of[1]) for domain, of in out.items()}

    def _worth(
        self, results: Mapping[str, Mapping[str, Result]], halves: Mapping[str, Mapping[str, int]], half: int
    ) -> dict[str, Float[Tensor, "layer n_experts"]]:
        worth = {}
        for domain, of in results.items():
            scores = of["scores"]
            assert isinstance(scores, ScoreResult)
            worth[domain] = scores.per_token([halves[domain][source] == half for source in scores.sources])
        return worth

    def contrasts(self, results: Mapping[str, Mapping[str, Result]]) -> Contrasts:
        """What is said of the coalitions."""
        effects = {}
        for domain, of in results.items():
            found = of["effects"]
            assert isinstance(found, CoalitionEffects)
            effects[domain] = found
        return Contrasts(effects, self.coalitions(results), self._blocks(results))

    def tables(
        self,
        model: Mapping[str, Any],  # noqa: ARG002
        results: Mapping[str, Mapping[str, Result]],
    ) -> dict[str, pd.DataFrame]:
        """`contrast`, `effects`, `coalitions` and `halves` (which half each source is in)."""
        contrasts = self.contrasts(results)
        halves = {
            domain: pd.DataFrame({"source": list(of), "half": list(of.values())})
            for domain, of in self._halves(results).items()
        }
        layers = _routing(next(iter(results.values()))).layers
        return {
            "contrast": contrasts.contrast(),
            "effects": contrasts.by_domain_read(),
            "coalitions": table(contrasts.coalitions, layers, chosen.variants(self.matched)),
            "halves": by_domain(halves),
        }


def contrast(result: StudyResult, level: float = 0.95) -> pd.DataFrame:
    """The primary contrast of a saved or new localisation study, and the secondary ones; see `Contrasts.contrast`.

    Args:
        result: Of the study `localisation`.
        level: Of the intervals; simultaneous over D domains by Bonferroni: 1 − 0.05 / D.

    Raises:
        InputError: It is the result of another study.
    """
    if result.study != Localisation.name:
        raise InputError(f"this is the result of the study {result.study!r}; expected {Localisation.name!r}")
    settings = dict(result.manifest["plan"]["settings"])
    return Localisation(**{**settings, "how": tuple(settings["how"])}).contrasts(result.results).contrast(level)


def _most(n_experts: int, top_k: int) -> int:
    """Experts of a layer that may be picked, so that as many can be taken out in their place."""
    return (n_experts - top_k) // 2


def _routing(of: Mapping[str, Result]) -> RoutingResult:
    result = of["routing"]
    assert isinstance(result, RoutingResult)
    return result
