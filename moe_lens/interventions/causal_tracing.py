"""Causal tracing: corrupt what the model reads about a subject, restore one activation, see the answer come back."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.checked import AnyModel, Natural, Positive, Seed
from moe_lens.errors import InputError, a_kind
from moe_lens.interventions.batched_variants import RoutingMode
from moe_lens.interventions.clean_run import CleanRun, Variant
from moe_lens.interventions.embedding_noise import EMBEDDING, embedding_deviation, noisy
from moe_lens.interventions.metrics import LogitDifference, LogProb, TokenMetric
from moe_lens.interventions.patch_sites import SITES, Parts, differing, stream_variant
from moe_lens.interventions.sweep import token_sweep
from moe_lens.interventions.trace_prompt import single_token, subject_positions, whole_prompt
from moe_lens.interventions.trace_result import SiteEffects, TraceResult

STREAMS = {"resid": "resid_post", "attn": "attn_out", "mlp": "mlp_out"}


class Probability(LogProb):
    """Probability of a token, in [0, 1], mean over the positions; arguments as for `Logit`."""

    def values(
        self, logits: Float[Tensor, "rows d_vocab"], batch: Int[Tensor, " rows"], pos: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """The probability in each row."""
        return super().values(logits, batch, pos).exp()


@torch.no_grad()
def trace(
    model: AnyModel,
    prompt: str,
    subject: str | int | Sequence[int],
    answer: str | Natural,
    *,
    foil: str | Natural | None = None,
    noise: float = 3.0,
    draws: Positive = 10,
    seed: Seed = 0,
    at: int | Sequence[int] | None = None,
    routing: RoutingMode = "free",
    level: float = 0.95,
    batch_size: Positive | None = None,
) -> TraceResult:
    """Causal tracing (Meng et al. 2022, arXiv 2202.05262), down to experts and coalitions (as arXiv 2606.03780).

    The embeddings of the subject get Gaussian noise, several times over; each of these corrupted runs is repeated with
    one activation of the clean run restored. The effect of a site is the answer's score in the restored run minus that
    in the corrupted one of the same draw, and is given as a mean over draws with an interval.

    Restored are, at each layer and position, the residual stream leaving the block ("resid"), attention's output
    ("attn") and the MLP's ("mlp"); at each layer with experts, at the positions `at` together, each expert's
    contribution g E ("expert": the same expert is the one with the same id, as in `patch`), and coalitions
    ("coalition"): the j experts that have the greatest weight in the clean run, together, j = 1 … top_k.

    Args:
        model: A `HookedMoE`.
        prompt: What the model reads; BOS is put in front where the tokenizer does.
        subject: The part of the prompt that is corrupted, wherever it occurs, or its position or positions.
        answer: What should come next: one token as text (mind the space in front) or its id.
        foil: Another token. Without it the score is the answer's probability, as in Meng et al.; with it, the logit of
            the answer minus that of the foil, as in arXiv 2606.03780.
        noise: Standard deviation of the noise, as a multiple of that of all numbers that `hook_embed` holds of the
            whole vocabulary: of the embedding matrix, times what the family multiplies it by.
        draws: How many times noise is drawn; they are run as one batch.
        seed: Of the noise.
        at: Positions at which experts and coalitions are restored, together; the subject's last token if not given.
        routing: "free": layers behind the restored site choose experts again. "frozen": they keep those of their own
            corrupted run.
        level: Of the intervals, in (0, 1).
        batch_size: Items to run at a time; found automatically if not given.

    Raises:
        InputError: the subject is not in the prompt, answer or foil are not one token, positions out of range, or
            numbers that make no sense.
    """
    if not isinstance(prompt, str):
        raise InputError(f"the prompt is {a_kind(prompt)}; expected one text")
    if noise <= 0 or not 0 < level < 1:
        raise InputError(f"got noise={noise}, level={level}; expected > 0, and between 0 and 1")
    tokens = whole_prompt(model, prompt)
    corrupted = subject_positions(model, prompt, tokens[0], subject)
    score = _score(model, answer, foil)
    place = [corrupted[-1]] if at is None else subject_positions(model, prompt, tokens[0], at)
    sites = [SITES[name] for name in STREAMS.values()]
    keep = {name for site in sites for layer in site.layers(model) for name in site.names(layer)}
    keep |= {name for layer in model.moe_layers for name in SITES["expert_weighted"].names(layer)}
    copies = tokens.expand(draws, -1).contiguous()
    std = noise * embedding_deviation(model)
    source = CleanRun.of(model, copies, keep=sorted(keep))
    base = CleanRun.of(model, copies, keep=sorted(keep), fwd_hooks=[(EMBEDDING, noisy(corrupted, std, seed))])
    clean, floor = (_at_the_end(run, score) for run in (source, base))
    effects = {}
    for site, axes, made in _sites(model, base, source, place):
        found = token_sweep(
            model, base, [variant for _, variant in made], score, routing=routing, batch_size=batch_size
        )
        values = torch.zeros(draws, *(len(coordinates) for coordinates in axes.values()), dtype=torch.float64)
        for (cell, _), restored in zip(made, found, strict=True):
            values[(slice(None), *cell)] = restored - floor
        effects[site] = SiteEffects(values, axes, level)
    return TraceResult(
        sites=effects,
        clean=float(clean.mean()),
        corrupted=floor,
        score="probability" if foil is None else "logit difference",
        tokens=tuple(map(str, model.to_str_tokens(tokens[0]))),
        subject=tuple(corrupted),
        at=tuple(place),
        noise_std=std,
        seed=seed,
        routing=routing,
        level=level,
    )


def _score(model: Any, answer: str | Natural, foil: str | Natural | None) -> TokenMetric:
    wanted = single_token(model, "answer", answer)
    if foil is None:
        return Probability(wanted)
    other = single_token(model, "foil", foil)
    if other == wanted:
        raise InputError(f"answer and foil are one token, {answer!r}: their difference is always 0")
    return LogitDifference(wanted, other)


def _at_the_end(run: CleanRun, score: TokenMetric) -> Float[Tensor, " draw"]:
    """The score at the last position of every draw."""
    items = torch.arange(run.batch, device=run.logits.device)
    return score.values(run.logits[:, -1], items, torch.full_like(items, run.pos - 1)).double().cpu()


Made = list[tuple[tuple[int, ...], Variant]]


def _sites(
    model: Any, base: CleanRun, source: CleanRun, place: Sequence[int]
) -> Iterator[tuple[str, dict[str, tuple[int, ...]], Made]]:
    """For each site its axes, and a variant for every cell in which anything is restored."""
    positions = tuple(range(base.pos))
    nowhere = torch.zeros(base.batch, base.pos, dtype=torch.bool, device=base.logits.device)
    for name, site in STREAMS.items():
        made: Made = []
        if not (layers := SITES[site].layers(model)):
            continue
        for row, layer in enumerate(layers):
            different = differing(site, base, source, layer)
            for pos in positions:
                here = nowhere.clone()
                here[:, pos] = different[:, pos]
                if here.any():
                    made.append(((row, pos), stream_variant(site, base, source, layer, here)))
        yield name, {"layer": layers, "pos": positions}, made
    here = nowhere.clone()
    here[:, list(place)] = True
    parts = {layer: Parts.of("expert_weighted", base, source, layer, by_expert=True) for layer in model.moe_layers}
    made, joint = [], []
    for row, layer in enumerate(model.moe_layers):
        of_layer = parts[layer]
        chosen = of_layer.experts[here].unique()
        for expert in chosen[chosen >= 0].tolist():  # −1: slots that use_experts leaves empty
            slots = of_layer.chosen(lambda experts, _, expert=expert: experts == expert, here)
            made.append(((row, expert), of_layer.variant(base, layer, slots)))
        for size in range(1, model.top_k + 1):
            best = source.indices(layer)[..., :size]
            members = (of_layer.experts[..., None] == best[..., None, :]).any(-1)
            joint.append(((row, size - 1), of_layer.variant(base, layer, members & here[..., None])))
    yield "expert", {"layer": model.moe_layers, "expert": tuple(range(model.n_experts))}, made
    yield "coalition", {"layer": model.moe_layers, "size": tuple(range(1, model.top_k + 1))}, joint
