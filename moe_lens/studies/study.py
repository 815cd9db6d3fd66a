"""What a study is: the passes that it makes over texts, what each fills, and the tables that come of them.

A study reads every domain one or more times; each time is a *pass*, which fills accumulators of its own and may use
those of the passes before it. `run_study` reads.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import pandas as pd

from moe_lens.checked import Positive
from moe_lens.data import Reading, TokenBatch
from moe_lens.stats import Accumulator, Result
from moe_lens.studies.forecast import Load

Gathered = Mapping[str, Accumulator[Any]]
"""Accumulators by name."""

Earlier = Mapping[str, Mapping[str, Gathered]]
"""Accumulators of the passes that are complete, by domain and pass."""


TEXTS = "texts"
"""Of what was read of a domain (`Texts`), which `run` counts in the first pass of every study."""


class Study(ABC):
    """What a study does with a batch. Instances hold its settings and nothing that changes."""

    name: ClassVar[str]
    passes: ClassVar[tuple[str, ...]]
    """Names of the times that the domains are read."""
    keeps: ClassVar[bool] = True
    """Whether activations of all layers, or logits, are there at once of everything that is in a batch."""

    def chosen_passes(self) -> tuple[str, ...]:
        """Those of `passes` that the settings ask for; the first one always."""
        return self.passes

    def settings(self) -> dict[str, Any]:
        """What was asked for, as plain values."""
        return dict(vars(self))

    @abstractmethod
    def check(self, model: Any) -> None:
        """Refuse what cannot be done with this model; raises `InputError`."""

    def read_as(self, reading: Reading) -> Reading:
        """How texts are read where this was asked for: windows that are no longer than the study can take."""
        return reading

    def load(self, model: Any, name: str, reading: Reading, domains: Positive) -> Load | None:  # noqa: ARG002
        """What a pass over one of the domains asks of a model; None if that is not known before it is made.

        Args:
            model: A `HookedMoE`.
            name: Of the pass.
            reading: With a number of tokens.
            domains: How many there are.
        """
        return None

    @abstractmethod
    def begin(self, model: Any, name: str) -> Gathered:
        """Empty accumulators of a pass."""

    def prepare(self, model: Any, name: str, domain: str, earlier: Earlier) -> Any:  # noqa: ARG002
        """What a pass over a domain needs of the passes before it, which are complete in all domains; made once."""
        return None

    @abstractmethod
    def step(self, model: Any, name: str, batch: TokenBatch, into: Gathered, prepared: Any) -> None:
        """Count a batch in a pass.

        Args:
            model: A `HookedMoE`.
            name: Of the pass.
            batch: What to read.
            into: The accumulators of the pass.
            prepared: By `prepare`.
        """

    @abstractmethod
    def results(self, earlier: Mapping[str, Gathered]) -> dict[str, Result]:
        """What is known of a domain when all its passes are done."""

    @abstractmethod
    def tables(self, model: Mapping[str, Any], results: Mapping[str, Mapping[str, Result]]) -> dict[str, pd.DataFrame]:
        """Tables of all domains.

        Args:
            model: Facts of the model, from the manifest.
            results: By domain.
        """

    def kept(self, results: Mapping[str, Result]) -> dict[str, Result]:
        """What of a domain's results stays in the result of the study beside the tables: all, in most studies."""
        return dict(results)

    def read_off(
        self,
        model: Any,  # noqa: ARG002
        results: Mapping[str, Mapping[str, Result]],  # noqa: ARG002
        tables: Mapping[str, pd.DataFrame],  # noqa: ARG002
    ) -> dict[str, pd.DataFrame]:
        """Further tables, which ask the model itself once everything is read; most studies have none.

        Args:
            model: A `HookedMoE`.
            results: By domain.
            tables: Those that took no model.
        """
        return {}
