"""How much a study asks of a model, said before it begins, and how long it takes, estimated from what has been done."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from moe_lens.checked import Natural, Positive
from moe_lens.data import Reading
from moe_lens.model.loading.device_map import gibibytes
from moe_lens.model.loading.dispatch import places
from moe_lens.model.loading.quantising import packed_in

READ_AS_TOKENS = 133
"""How many tokens are computed while a GB of weights is read, for a model with a billion active parameters: where a
disk reads 1.5 GB/s, and a processor computes 4 · 10¹¹ operations/s. Only how passes compare with one another depends on
it; what they take is measured."""
SAID_EVERY, SURE, LONG = 300.0, 10.0, 60.0
"""Seconds between two estimates that are said, before the first, and that are worth saying."""


@dataclass(frozen=True)
class Load:
    """What one pass over a domain asks of a model."""

    tokens: Natural
    """Of all forward passes together."""
    passes: Natural = 1
    """Forward passes: so often is what is on disk read."""
    logits: Natural = 0
    """Rows of logits."""

    @classmethod
    def stacked(cls, tokens: Natural, at_once: Positive, *, logits: Natural | None = None) -> "Load":
        """Of forward passes of at most so many tokens."""
        return cls(tokens, max(1, math.ceil(tokens / at_once)), tokens if logits is None else logits)

    def __add__(self, other: "Load") -> "Load":
        return Load(self.tokens + other.tokens, self.passes + other.passes, self.logits + other.logits)


NOTHING = Load(0, 0)


@runtime_checkable
class Forecasting(Protocol):
    """What is asked of a study."""

    def chosen_passes(self) -> tuple[str, ...]:
        """Names of the times that the domains are read."""
        ...

    def load(self, model: Any, name: str, reading: Reading, domains: Positive) -> Load | None:
        """What a pass over one of the domains asks of the model; None if that is not known before."""
        ...


class Forecast:
    """Of one study or several, over the same domains.

    Args:
        model: A `HookedMoE`.
        studies: Each with the folder that it is in, if there are several, and how it reads.
        domains: Their names.
        say: Takes lines for whoever waits.
    """

    def __init__(
        self,
        model: Any,
        studies: Sequence[tuple[str, Forecasting, Reading]],
        domains: Sequence[str],
        say: Callable[[str], None],
    ):
        self._say, self._begun, self._said = say, 0.0, -math.inf
        self._on_disk, active = places(model.original_model).get("disk", 0), _active(model)
        row = model.cfg.d_model * model.cfg.d_vocab / active
        read = READ_AS_TOKENS * self._on_disk / active
        self._tokens: dict[tuple[str, str, str], int] = {}
        self.cost: dict[tuple[str, str, str], float] = {}
        self.whole = NOTHING
        for folder, study, reading in studies:
            for name in study.chosen_passes():
                for domain in domains if reading.tokens is not None else ():
                    load = study.load(model, name, reading, len(domains))
                    if load is None:
                        continue
                    self.whole += load
                    self._tokens[folder, name, domain] = reading.tokens or 1
                    each = load.tokens / max(1, load.passes)
                    self.cost[folder, name, domain] = load.passes * max(read, each) + load.logits * row
        self._left = dict(self.cost)
        self._done = 0.0

    def __str__(self) -> str:
        whole = self.whole
        passes = f"{whole.tokens:,} tokens through the model in {whole.passes:,} passes"
        each = f", each of which reads {gibibytes(self._on_disk)} from disk" if self._on_disk else ""
        return f"about {passes}{each}; {whole.logits:,} rows of logits"

    def begin(self) -> None:
        """Say what there is to do; time counts from here. Called again, nothing."""
        if not self._begun:
            self._begun = time.monotonic()
            if self.whole.passes:
                self._say(str(self))

    def seen(self, folder: str, name: str, domain: str, tokens: int) -> str:
        """Note that a pass has read so many tokens more; what is left, in words, for the line that shows progress."""
        key = (folder, name, domain)
        if key not in self.cost:
            return ""
        for earlier in self._left:  # they are done, or were when this process began
            if earlier == key:
                break
            self._left[earlier] = 0
        part = min(self._left[key], self.cost[key] * tokens / self._tokens[key])
        self._left[key] -= part
        self._done += part
        left = self.seconds_left()
        if left is None:
            return ""
        words = f"about {_duration(left)} left"
        now = time.monotonic()
        if left >= LONG and now - self._begun >= SURE and now - self._said >= SAID_EVERY:
            self._said = now
            self._say(f"{words}, after {_duration(now - self._begun)}")
        return f" · {words}"

    def seconds_left(self) -> float | None:
        """As long as what is left takes at the rate so far; None before anything is done."""
        if not self._done:
            return None
        return sum(self._left.values()) * (time.monotonic() - self._begun) / self._done


def _active(model: Any) -> float:
    """Parameters that a token uses, about."""
    hf, share = model.original_model, model.top_k / max(1, model.n_experts)
    parts = [*hf.named_parameters(), *packed_in(hf)]
    return max(1.0, sum(part.numel() * (share if ".experts" in name else 1.0) for name, part in parts))


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
