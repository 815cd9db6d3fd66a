"""The study `explain`: what a token's choice of experts can be predicted from, on sources that were held out.

The question, and the unigram as what to beat, are RouterInterp's (Superposed Specialisation in MoE Routing, 2026).
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd

from moe_lens.checked import Positive, Seed
from moe_lens.data import TokenBatch
from moe_lens.errors import InputError
from moe_lens.stats import Result, TokenSample, TokenSampleResult, chosen_for, explain_choices, observe
from moe_lens.stats.parallel_sources import LANGUAGE, parallel_key
from moe_lens.studies.atlas_choice import of_kind
from moe_lens.studies.forward_passes import token_places
from moe_lens.studies.study import TEXTS, Gathered, Study
from moe_lens.studies.token_features import UserFeatures, check_features, user_features

SAMPLE = "sample"


@dataclass(frozen=True)
class Explain(Study):
    """Choices of experts, predicted from the token, the one before it, position, domain and features of your own."""

    features: pd.DataFrame | None = None
    """A row per token: see `moe_lens.studies.token_features.user_features`."""
    sample: Positive = 2**13
    """Tokens of a domain that are kept at most, drawn at random."""
    parallel: str = LANGUAGE
    """What may differ in the names of sources that are one document in several domains: they are held out together."""
    seed: Seed = 0
    """Of folds, halves and what is shuffled."""

    name: ClassVar[str] = "explain"
    passes: ClassVar[tuple[str, ...]] = ("choices",)

    def settings(self) -> dict[str, Any]:
        """What was asked for; features by their digest."""
        digest = None
        if self.features is not None:
            whole = json.dumps(self.features.to_dict("list"), default=str)
            digest = hashlib.sha256(whole.encode()).hexdigest()[:16]
        return {**vars(self), "features": digest}

    def check(self, model: Any) -> None:  # noqa: ARG002
        """Refuse a table that does not say which token a row is of, what is no regular expression, a sample of none."""
        parallel_key(self.parallel)
        if self.features is not None:
            check_features(self.features)
        if self.sample < 1:
            raise InputError(f"sample is {self.sample}; expected at least 1 token")

    def begin(self, model: Any, name: str) -> Gathered:  # noqa: ARG002
        """No token yet."""
        return {SAMPLE: TokenSample(model.moe_layers, model.n_experts, model.top_k, n=self.sample)}

    def step(self, model: Any, name: str, batch: TokenBatch, into: Gathered, prepared: Any) -> None:  # noqa: ARG002
        """Look at a batch."""
        into[SAMPLE].update(observe(model, batch), **token_places(batch))

    def results(self, earlier: Mapping[str, Gathered]) -> dict[str, Result]:
        """The sample."""
        return {name: of.result() for name, of in earlier["choices"].items() if name != TEXTS}

    def tables(
        self,
        model: Mapping[str, Any],  # noqa: ARG002
        results: Mapping[str, Mapping[str, Result]],
    ) -> dict[str, pd.DataFrame]:
        """`experts` and `layers`: see `ChoiceExplanation`."""
        samples = of_kind(results, SAMPLE, TokenSampleResult)
        found = explain_choices(samples, self._own(samples).features, **self._held())
        return {"experts": found.to_frame(), "layers": found.per_layer()}

    def read_off(
        self,
        model: Any,
        results: Mapping[str, Mapping[str, Result]],
        tables: Mapping[str, pd.DataFrame],  # noqa: ARG002
    ) -> dict[str, pd.DataFrame]:
        """`chosen_for`: a sentence for each expert, and its score."""
        samples = of_kind(results, SAMPLE, TokenSampleResult)
        own = self._own(samples)
        return {"chosen_for": chosen_for(samples, text_of(model), own.features, own.names, **self._held())}

    def _held(self) -> dict[str, Any]:
        return {"seed": self.seed, "parallel": parallel_key(self.parallel)}

    def _own(self, samples: Mapping[str, TokenSampleResult]) -> UserFeatures:
        return UserFeatures({}, {}) if self.features is None else user_features(self.features, samples)


def text_of(model: Any) -> Callable[[int], str]:
    """From the id of a token to its text; to its number where the model has no tokenizer."""
    return (lambda token: f"<{token}>") if model.tokenizer is None else lambda token: model.tokenizer.decode([token])
