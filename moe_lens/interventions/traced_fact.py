"""A fact, its subject corrupted, and coalitions of experts restored in it: what brings the answer back?

Causal tracing (Meng et al. 2022, arXiv 2202.05262) with coalitions of any layers at once. Restored is what the experts
of a coalition add at the subject's last token: what each adds in the corrupted run is taken away, and what it adds in
the clean run is put there. The coalition of all experts so restores the whole `routed_out` of every layer.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moe_lens import names
from moe_lens.errors import InputError
from moe_lens.interventions.clean_run import CleanRun, Hooks
from moe_lens.interventions.embedding_noise import EMBEDDING, noisy
from moe_lens.interventions.trace_prompt import single_token, subject_positions, whole_prompt
from moe_lens.model.loading.batch_sizes import tokens_at_once


@dataclass(frozen=True)
class Fact:
    """Something that a model may know."""

    prompt: str
    subject: str
    """The part of the prompt that is corrupted, wherever it occurs."""
    answer: str
    """What should come next: one token."""
    foil: str
    """What should not: one token."""
    kind: str = "facts"
    """Facts of a kind are looked at together."""
    source: str = ""
    """What facts that are not independent share, such as their template; the prompt if not given."""


@dataclass(frozen=True, eq=False)
class TracedFact:
    """A fact in a model: its clean run, and runs with noise on the subject."""

    model: Any
    clean: CleanRun
    corrupted: CleanRun
    """One item for each draw of noise."""
    at: int
    """The subject's last token: where experts are restored."""
    answer: int
    foil: int

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, fact: Fact, *, noise_std: float, draws: int = 4, seed: int = 0) -> "TracedFact":
        """Run a fact.

        Args:
            model: A `HookedMoE`.
            fact: What it may know.
            noise_std: Standard deviation, in units of the embeddings; see `embedding_deviation`.
            draws: How many times noise is drawn.
            seed: Of the noise.

        Raises:
            InputError: The subject is not in the prompt, or answer or foil are not one token or the same.
        """
        tokens = whole_prompt(model, fact.prompt)
        subject = subject_positions(model, fact.prompt, tokens[0], fact.subject)
        answer, foil = single_token(model, "answer", fact.answer), single_token(model, "foil", fact.foil)
        if answer == foil:
            raise InputError(f"answer and foil of {fact.prompt!r} are the same token, {fact.answer!r}")
        keep = [names.mlp(names.EXPERT_WEIGHTED, layer) for layer in model.moe_layers]
        hook = EMBEDDING, noisy(subject, noise_std, seed)
        copies = tokens.expand(draws, -1).contiguous()
        clean = CleanRun.of(model, tokens, keep=keep)
        return cls(model, clean, CleanRun.of(model, copies, fwd_hooks=[hook]), subject[-1], answer, foil)

    @cached_property
    def active(self) -> Bool[Tensor, "layer n_experts"]:
        """The experts of the clean run at the subject's last token."""
        chosen = torch.zeros(len(self.model.moe_layers), self.model.n_experts, dtype=torch.bool)
        for row, layer in enumerate(self.model.moe_layers):
            chosen[row, self.clean.indices(layer)[0, self.at].cpu()] = True
        return chosen

    def scores(self, logits: Float[Tensor, "rows d_vocab"]) -> Float[Tensor, "rows 2"]:
        """Logit of the answer − that of the foil, and the answer's rank: how many tokens have a greater logit."""
        wide = logits.double()
        own = wide[:, self.answer]
        return torch.stack([own - wide[:, self.foil], (wide > own[:, None]).sum(-1).double()], -1).cpu()

    @property
    def ends(self) -> Float[Tensor, "2 2"]:
        """Scores of the clean run, and the mean ones of the corrupted runs."""
        return torch.stack([self.scores(run.logits[:, -1]).mean(0) for run in (self.clean, self.corrupted)])

    @torch.no_grad()
    def restored(self, coalitions: Bool[Tensor, "coalition layer n_experts"]) -> Float[Tensor, "coalition 2"]:
        """Mean scores over the corrupted runs in which each coalition is restored."""
        draws, found = self.corrupted.batch, []
        device = self.corrupted.logits.device
        size = max(1, tokens_at_once(self.model, device) // (self.corrupted.pos * draws))
        for some in coalitions.split(size):
            members = some.repeat_interleave(draws, 0)
            items = torch.arange(draws, device=device).repeat(len(some))
            found.append(self.scores(self._run(members, items)).view(len(some), draws, 2).mean(1))
        return torch.cat(found) if found else torch.zeros(0, 2, dtype=torch.float64)

    def effects(self) -> Float[Tensor, "layer n_experts"]:
        """By how much restoring one expert raises answer − foil; 0 where the clean run does not use it there."""
        places = self.active.nonzero()
        alone = torch.zeros(len(places), *self.active.shape, dtype=torch.bool)
        alone[torch.arange(len(places)), places[:, 0], places[:, 1]] = True
        values = torch.zeros(self.active.shape, dtype=torch.float64)
        values[self.active] = self.restored(alone)[:, 0] - self.ends[1, 0]
        return values

    def _run(self, members: Bool[Tensor, "rows layer n_experts"], items: Tensor) -> Float[Tensor, "rows d_vocab"]:
        """Logits at the end of corrupted runs with each row's experts restored."""
        used = members.any((0, 2)).nonzero()[:, 0].tolist()
        if not used:
            return self.corrupted.logits[items, -1]
        start = self.model.moe_layers[used[0]]
        hooks = [hook for row in used for hook in self._restore(self.model.moe_layers[row], members[:, row])]
        resid = self.corrupted.stream(start, items)
        with self.model.hooks(hooks):
            for layer in range(start, self.model.cfg.n_layers):
                resid = self.corrupted.replay.block(layer, resid, items)
        return self.corrupted.replay.logits(resid[:, -1])

    def _restore(self, layer: int, members: Bool[Tensor, "rows n_experts"]) -> Hooks:
        chosen = self.clean.indices(layer)[0, self.at].cpu()
        parts = self.clean.cache[names.mlp(names.EXPERT_WEIGHTED, layer)][0, self.at]
        added = members[:, chosen].to(parts.device, parts.dtype) @ parts

        def take_away(weighted: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            experts = self.model.experts_in_slots(layer)[:, self.at]
            out = members.to(experts.device).gather(-1, experts.clamp(min=0))
            weighted = weighted.clone()
            weighted[:, self.at] = weighted[:, self.at].masked_fill(out[..., None], 0)
            return weighted

        def put(routed: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            routed = routed.clone()
            routed[:, self.at] += added.to(routed)
            return routed

        return [(names.mlp(names.EXPERT_WEIGHTED, layer), take_away), (names.mlp(names.ROUTED_OUT, layer), put)]


def facts_of(rows: Iterable[tuple[str, dict[str, Any]]], file: str) -> tuple[Fact, ...]:
    """Facts from plain values, each with where it stands.

    Raises:
        InputError: One lacks a text, or has a word that is not known; the message names its line.
    """
    needed = ("prompt", "subject", "answer", "foil")
    allowed = (*needed, "kind", "source")
    found = []
    for where, row in rows:
        missing = [name for name in needed if not isinstance(row.get(name), str) or not row[name]]
        unknown = sorted(row.keys() - set(allowed))
        wrong = [name for name in ("kind", "source") if name in row and not (isinstance(row[name], str) and row[name])]
        if missing or unknown or wrong:
            told = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown or wrong)}"
            raise InputError(f"{where}: a fact {told}; expected texts {', '.join(needed)}, and perhaps kind, source")
        found.append(Fact(**row))
    if not found:
        raise InputError(f"{file}: holds no fact")
    return tuple(found)
