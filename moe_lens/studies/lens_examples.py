"""Figure 2 of arXiv 2603.05806 for one prompt of each domain, chosen by a rule and not by how it looks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from moe_lens.checked import Natural
from moe_lens.data import TokenBatch, Window
from moe_lens.distributed import gather
from moe_lens.lenses import Lens, LensResult
from moe_lens.partial_sum import PartialSum
from moe_lens.stats import Accumulator, Result
from moe_lens.stats.sums import Aggregate, from_bytes, to_bytes
from moe_lens.studies.forward_passes import input_device

EXAMPLE_TOKENS = 24
"""Of a prompt."""
TOP = 5

Key = tuple[int, int, int]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LensExample(LensResult, Result):
    """What a lens reads at the last token of a prompt, of the sums of `PartialSum.figure2`."""

    prompt: tuple[Natural, ...]
    """Token ids, without what opens the text."""
    source: str
    """Of the text."""

    @property
    def target(self) -> int:
        """The token that follows the prompt in the text."""
        return int(self.targets[0, 0])

    @property
    def predicted(self) -> int:
        """The token that the model holds most likely."""
        return int(self.top_tokens[-1, self.sums.index(PartialSum(shared=True)), 0, 0, 0])

    @classmethod
    def of_parts(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Self:
        """The inverse of `parts`."""
        return super().of_parts(tensors, {**header, "prompt": tuple(header["prompt"])})


class ExampleStats(Accumulator[LensExample]):
    """Keeps one prompt: the beginning of the first window of more than `EXAMPLE_TOKENS` tokens, or of the longest."""

    def __init__(self) -> None:
        self._first = _Least()
        super().__init__({"tokens": EXAMPLE_TOKENS}, {"first": self._first})

    def update(self, lens: Lens, batch: TokenBatch) -> Self:
        """Read the batch's candidate, if it comes before the one that is kept."""
        window = min(batch.windows, key=_key)
        if self._first.before is None or _key(window) < self._first.before:
            self._first.put(_key(window), read_prompt(lens, window))
        return self

    def result(self) -> LensExample:
        """The one that is kept."""
        return LensExample.of_parts(*self._first.value)


def read_prompt(lens: Lens, window: Window) -> LensExample:
    """The first `EXAMPLE_TOKENS` tokens of a window, or all but its last."""
    model, sums = lens.model, PartialSum.figure2(lens.model.top_k)
    end = window.opening + min(EXAMPLE_TOKENS, len(window.ids) - window.opening - 1)
    prompt, target = window.ids[window.opening : end], window.ids[end]
    with torch.no_grad():
        tokens = torch.tensor([window.ids[:end]], device=input_device(model))
        _, cache = model.run_with_cache(tokens, names_filter=lens.hooks(sums=sums))
        top = min(TOP, model.cfg.d_vocab)
        read = lens.decode(cache, sums, positions=[end - 1], targets=torch.tensor([[target]]), top=top)
    shown = sorted({*prompt, target})
    texts = {**read.texts, **dict(zip(shown, model.tokenizer.batch_decode([[token] for token in shown]), strict=True))}
    return LensExample(**{**vars(read), "texts": texts}, prompt=prompt, source=window.source)


def _key(window: Window) -> Key:
    """What comes first: enough tokens, then the order of the file."""
    return -min(len(window.ids) - window.opening, EXAMPLE_TOKENS + 1), window.document, window.start


class _Least(Aggregate):
    """The reading of least key."""

    def __init__(self) -> None:
        self.before: Key | None = None
        """The key of what is kept."""
        self._kept: dict[str, Tensor] = {}

    def put(self, key: Key, read: LensExample) -> None:
        """Keep a reading in place of another."""
        tensors, header = read.parts()
        self.before, self._kept = key, {**tensors, "header": to_bytes(header)}

    @property
    def value(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `parts` gave of it."""
        assert self.before is not None, "asked for an example of no text"
        tensors = dict(self._kept)
        return tensors, from_bytes(tensors.pop("header"))

    def merge(self, other: "_Least") -> None:
        """Keep the other's, if it comes before."""
        if other.before is not None and (self.before is None or other.before < self.before):
            self.before, self._kept = other.before, other._kept

    def all_reduce(self) -> None:
        """Keep the first of all processes."""
        for state in gather(self.state_dict()):
            other = _Least()
            other.load_state_dict(state)
            self.merge(other)

    def state_dict(self) -> dict[str, Tensor]:
        """The key and the reading."""
        return {} if self.before is None else {"key": torch.tensor(self.before), **self._kept}

    def load_state_dict(self, state: Any) -> None:
        """Take the place of what was kept."""
        kept = dict(state)
        self.before = tuple(kept.pop("key").tolist()) if kept else None
        self._kept = kept
