"""Pruning from beginning to end: what `moe-lens prune` does."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lens.data import Domains, in_memory, tokenize
from moe_lens.errors import InputError
from moe_lens.model.families.expert_groups import Groups
from moe_lens.model.loading.dispatch import places
from moe_lens.model.loading.pretrained import load_pretrained, resolve_name
from moe_lens.pruning.export import disk_needed, export, expressible, folder_size
from moe_lens.pruning.frontier import ALL, Frontier, frontier, halved
from moe_lens.pruning.merging import merge
from moe_lens.pruning.plan_from_scores import Budget, plan
from moe_lens.pruning.plans import Plan
from moe_lens.pruning.scores import Method, Scores
from moe_lens.pruning.scoring import score
from moe_lens.pruning.speed import SPEED, memory, speed


@dataclass(frozen=True)
class PruneSettings:
    """What was asked for."""

    model: str
    keep: float
    method: Method
    merged: bool
    budget: Budget
    uniform: bool
    """Whether a global budget is spread evenly over layers in the end."""
    domain: str | None
    """The domain that a specialist is for."""
    top_k: int | None
    compare: tuple[Method, ...]
    """Methods on the frontier."""
    tokens: int
    """Of text, per domain."""
    seed: int
    context: int = 256


@dataclass(frozen=True, eq=False)
class Pruned:
    """A smaller model that was written, and what was measured."""

    settings: PruneSettings
    scores: Scores
    plan: Plan
    frontier: Frontier
    """Cross-fitted: plans made like the one that was written, but from half of the texts, and judged on the rest."""


def shares(keep: float) -> list[float]:
    """Where the frontier is measured: what was asked for, and places around it."""
    return sorted({share for share in (0.25, 0.5, 0.75, keep) if 0 < share < 1})


def prune(
    model: Any,
    domains: Domains,
    settings: PruneSettings,
    folder: Path,
    *,
    watch: Callable[[str], None] = lambda what: None,  # noqa: ARG005
) -> Pruned:
    """Score, plan, measure, and write.

    Args:
        model: A `HookedMoE`, loaded from `settings.model`, whose stored weights are what is written.
        domains: Texts.
        settings: What is asked for.
        folder: Where the smaller model goes; empty or not there.
        watch: Called with what is being done.

    Raises:
        InputError, UnsupportedModelError: see `score`, `plan` and `export`.
    """
    domains = in_memory(domains)
    context = min(settings.context, int(model.cfg.n_ctx))
    batches = [
        tokenize(domain, model, n_tokens=settings.tokens, context=context, seed=settings.seed) for domain in domains
    ]
    groups, config = Groups.of_model(model), model.original_model.config.to_dict()
    drawn = plan(score(model, batches, "random"), settings.keep, top_k=settings.top_k)  # as large as the one to come
    drawn = drawn.uniform(1 if groups is None else groups.number)
    if drawn.share_kept == 1 and drawn.top_k == model.top_k and settings.method != "selected":
        raise InputError(
            f"keep {settings.keep:g} keeps all {model.n_experts} experts of a layer, and each token its {model.top_k}: "
            "the model would be as it is. Keep fewer experts, or give fewer active ones"
        )
    expressible(config, drawn)  # before the long part
    needed = disk_needed(settings.model, drawn, folder)
    watch(f"scoring experts by {settings.method}; the smaller model will take {needed / 1e9:.2f} GB of disk")
    scores = score(model, batches, settings.method, seed=settings.seed if settings.method == "random" else None)
    made = plan(scores, settings.keep, budget=settings.budget, domain=settings.domain, top_k=settings.top_k)
    if settings.uniform or (groups is not None and made.even):
        made = made.uniform(1 if groups is None else groups.number)
    expressible(config, made)
    if settings.merged:
        watch("merging experts")
        made = merge(made, model, batches)
    watch("measuring the frontier")
    halves = halved(domains, model, n_tokens=settings.tokens, context=context, seed=settings.seed)
    methods: list[Method] = list(dict.fromkeys([settings.method, *settings.compare]))
    found = frontier(
        model,
        halves,
        methods,
        [share for share in shares(settings.keep) if _enough(round(share * model.n_experts), made.top_k, groups)],
        merged=[settings.method] if settings.merged else [],
        specialists=settings.method if settings.domain else None,
        top_k=[settings.top_k] if settings.top_k and settings.top_k < model.top_k else [],
        pruned_top_k=settings.top_k,
        seed=settings.seed,
    )
    watch("writing the smaller model")
    export(settings.model, made, folder, measurements={"Perplexity": _card_table(found, settings, len(made.kept[0]))})
    return Pruned(settings, scores, made, found)


def _enough(count: int, top_k: int, groups: Groups | None) -> bool:
    return count >= top_k and (groups is None or groups.fit(count, top_k))


def compare(original: str, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Size and speed of two checkpoints in plain transformers, both in the dtype that they are stored in.

    Args:
        original: Name or folder of the whole model. Both are loaded: no other should be in memory.
        folder: Of the smaller one.

    Returns:
        Parameters and bytes on disk and in memory of each; and what `speed` gives, without a row where one of the two
        does not fit into memory: its speed is the disk's, and 66 passes a round take hours.
    """
    models: dict[str, Any] = {"original": load_pretrained(original)[0], "pruned": load_pretrained(str(folder))[0]}
    disk = {"original": resolve_name(original), "pruned": str(folder)}
    rows = [
        {
            "model": name,
            "parameters": sum(parameter.numel() for parameter in one.parameters()),
            "disk_bytes": folder_size(disk[name]) if Path(disk[name]).is_dir() else memory(one),
            "memory_bytes": memory(one),
        }
        for name, one in models.items()
    ]
    fit = not any("disk" in places(one) for one in models.values())
    return pd.DataFrame(rows), speed(models) if fit else pd.DataFrame(columns=[*SPEED])


def _card_table(found: Frontier, settings: PruneSettings, kept: int) -> pd.DataFrame:
    """The whole model, and smaller ones made as the one that is written was."""
    frame: Any = found.to_frame()
    treatment = "merged" if settings.merged else "dropped"
    alike = (frame["method"] == settings.method) & (frame["calibrated"] == (settings.domain or ALL))
    alike &= (frame["treatment"] == treatment) & (frame["kept"] == kept)
    columns = ["method", "kept", "top_k", "domain", "perplexity", "low", "high", "ratio", "tokens", "sources"]
    return frame[(frame["method"] == found.points[0][0]) | alike][columns]
