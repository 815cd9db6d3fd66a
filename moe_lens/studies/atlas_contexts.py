"""Pieces of text in which an expert is chosen: beside the strongest, which mislead alone, random ones."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch

from moe_lens.data import TokenBatch
from moe_lens.stats import Result, RoutedBatch, TopExamples, TopExamplesResult
from moe_lens.studies.forward_passes import drawn_by_place

STRONGEST, RANDOM, NEARLY = "strongest", "random", "nearly"
KINDS: dict[str, str] = {
    STRONGEST: "of greatest routing weight",
    RANDOM: "drawn at random from all tokens that chose the expert",
    NEARLY: "did not choose it, and came nearest to it: its router logit minus that of the last expert chosen",
}
"""Contexts of an expert, and what each is."""
KEPT: dict[str, int] = {STRONGEST: 6, RANDOM: 6, NEARLY: 3}
BEFORE, AFTER = 12, 5
TEXTS = "sample"
"""The windows of a domain that are shown token by token."""
TEXTS_KEPT, TEXT_TOKENS = 2, 96


def context_stats(n_targets: int) -> dict[str, TopExamples]:
    """Empty ones, for all experts of all layers; and for the texts that are shown."""
    kept = {kind: TopExamples(n_targets, n, before=BEFORE, after=AFTER, shows=True) for kind, n in KEPT.items()}
    return kept | {TEXTS: TopExamples(1, TEXTS_KEPT, before=0, after=TEXT_TOKENS - 1)}


def count_contexts(into: Mapping[str, Any], routed: RoutedBatch, batch: TokenBatch, seed: int) -> None:
    """Look at a batch; what is drawn at random depends on the seed and the text alone."""
    routing = routed.routing
    at = routing.indices.cpu()
    logits = routing.logits
    assert logits is not None, "observe notes logits"
    logits = logits.cpu().float()
    none = torch.full(logits.shape, -torch.inf)
    weights = none.scatter(-1, at, routing.weights.cpu().float())
    drawn = none.scatter(-1, at, drawn_by_place(batch, f"{seed} contexts", len(at), at.shape[-1]))
    missed = (logits - logits.gather(-1, at).amin(-1, keepdim=True)).scatter(-1, at, -torch.inf)
    shown = _by_target(weights.masked_fill(weights == -torch.inf, 0))
    for kind, scores in ((STRONGEST, weights), (RANDOM, drawn), (NEARLY, missed)):
        into[kind].update(_by_target(scores), batch.tokens, batch.counted, batch.sources, mask=batch.mask, shown=shown)
    first = batch.counted & (batch.counted.cumsum(-1) == 1)
    order = drawn_by_place(batch, f"{seed} texts")[0].masked_fill(~first[..., None], -torch.inf)
    into[TEXTS].update(order, batch.tokens, batch.counted, batch.sources, mask=batch.mask)


def _by_target(values: torch.Tensor) -> torch.Tensor:
    """From [layer, batch, pos, expert] to [batch, pos, layer · expert]."""
    return values.permute(1, 2, 0, 3).flatten(2)


def contexts_table(
    results: Mapping[str, Mapping[str, Result]], layers: tuple[int, ...], n_experts: int
) -> pd.DataFrame:
    """A row per context of all domains together.

    Columns: domain, kind, layer, expert, place, score (weight; margin below 0 for those that nearly did; of random ones
    the number that was drawn), source, position, at (which of the tokens it is), tokens, weights (the expert's at each
    of the tokens).
    """
    frames = []
    for kind, n in KEPT.items():
        parts = []
        for domain, of in results.items():
            found = of[kind]
            assert isinstance(found, TopExamplesResult) and found.shown is not None
            inside = found.tokens >= 0
            rows = zip(found.tokens, found.shown, inside, strict=True)
            pieces = [(tokens[real].tolist(), weights[real].tolist()) for tokens, weights, real in rows]
            columns = {
                "target": found.target.numpy(),
                "score": found.score.numpy(),
                "source": list(found.source),
                "position": found.position.numpy(),
                "at": inside[:, : found.before].sum(1).numpy(),
                "tokens": [piece[0] for piece in pieces],
                "weights": [piece[1] for piece in pieces],
            }
            parts.append(pd.DataFrame(columns).assign(domain=domain, kind=kind))
        whole = pd.concat(parts, ignore_index=True)
        whole = whole.sort_values(["target", "score"], ascending=[True, False], kind="stable")
        whole["place"] = whole.groupby("target").cumcount()
        frames.append(whole[whole["place"] < n])
    table: Any = pd.concat(frames, ignore_index=True)
    table["layer"] = [layers[target // n_experts] for target in table["target"]]
    table["expert"] = table["target"] % n_experts
    first = ["domain", "kind", "layer", "expert", "place"]
    return table[[*first, "score", "source", "position", "at", "tokens", "weights"]]
