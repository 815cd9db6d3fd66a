"""Everything that the page shows, measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moe_lens.data import Domains, Tokens, in_memory, tokenize
from moe_lens.studies import (
    LensExample,
    SingleExpert,
    Specialisation,
    lens_table,
    single_expert,
    specialisation,
)
from moe_lens.studies.report_single_expert import passes
from moe_lens.studies.report_specialisation import PASSES


@dataclass(frozen=True)
class ReportSettings:
    """What was asked for."""

    model: str
    tokens: int
    """Of text, per domain; at least so many are read if there are."""
    seed: int
    dtype: str
    device: str
    context: int = 256
    """The greatest length of a window of text, BOS included; a shorter context of the model counts."""


@dataclass(frozen=True, eq=False)
class Report:
    """The results, and what is needed to read them."""

    settings: ReportSettings
    model: dict[str, Any]
    domains: tuple[Tokens, ...]
    specialisation: Specialisation
    single_expert: SingleExpert
    lens: tuple[LensExample, ...]

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every number of the page, in long form, by the name of its parquet file."""
        lens = [example.result.top_frame().assign(domain=example.domain) for example in self.lens]
        return {
            "specialisation": self.specialisation.to_frame(),
            "most_specialised": self.specialisation.most_specialised(),
            "experts_for_half": self.specialisation.coverage(),
            "similarity": self.single_expert.similarity_frame(),
            "perplexity": self.single_expert.perplexity_frame(),
            "lens": pd.concat(lens, ignore_index=True),
        }


def report_batches(model: Any, domains: Domains, settings: ReportSettings) -> tuple[Tokens, ...]:
    """The token batches of every domain."""
    context = min(settings.context, int(model.cfg.n_ctx))
    return tuple(
        tokenize(domain, model, n_tokens=settings.tokens, context=context, seed=settings.seed)
        for domain in in_memory(domains)
    )


def n_steps(model: Any, batches: Sequence[Tokens]) -> int:
    """How many times `on_batch` will be called."""
    return sum(len(tokens) for tokens in batches) * (PASSES + passes(model.top_k))


def run(
    model: Any, domains: Domains, batches: Sequence[Tokens], settings: ReportSettings, on_batch: Callable[[], None]
) -> Report:
    """Run the studies.

    Args:
        model: A `HookedMoE`.
        domains: The texts.
        batches: What `report_batches` made of them.
        settings: For the record.
        on_batch: Called after every batch of every pass, `n_steps` times.
    """
    facts = {
        "name": settings.model,
        "type": model.original_model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.original_model.parameters()),
        "layers": int(model.cfg.n_layers),
        "moe_layers": list(model.moe_layers),
        "experts": int(model.n_experts),
        "top_k": int(model.top_k),
        "shared_experts": int(model.n_shared_experts),
        "d_model": int(model.cfg.d_model),
        "vocabulary": int(model.cfg.d_vocab),
    }
    special = specialisation(model, batches, on_batch=on_batch)
    single = single_expert(model, batches, on_batch=on_batch)
    return Report(settings, facts, tuple(batches), special, single, tuple(lens_table(model, domains)))
