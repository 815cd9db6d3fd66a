"""`TopRows`: for each of many targets the rows of greatest score, whatever the order they come in."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.distributed import gather
from moe_lens.errors import several
from moe_lens.stats.sums import Aggregate, from_bytes, to_bytes


class TopRows(Aggregate):
    """Keeps `n` rows for each target, each with whole numbers of its own and the name of a source.

    Among equal scores the content of a row decides, never the order of arrival: merging in any order and grouping keeps
    the same rows.
    """

    def __init__(self, n: int, width: int):
        self.n = n
        self.target = torch.empty(0, dtype=torch.long)
        """Ascending; within a target the greatest score first."""
        self.score = torch.empty(0, dtype=torch.float64)
        self.content = torch.empty(0, width, dtype=torch.long)
        self.source = torch.empty(0, dtype=torch.long)
        self._names: dict[int, str] = {}

    def names(self) -> tuple[str, ...]:
        """The source of each row."""
        return tuple(self._names[key] for key in self.source.tolist())

    def threshold(self, n_targets: int) -> Float[Tensor, " target"]:
        """What a score must reach to be kept: −∞ for a target with fewer than `n` rows."""
        counts = torch.bincount(self.target, minlength=n_targets)
        last = counts.cumsum(0) - 1
        least = torch.full((n_targets,), -torch.inf, dtype=torch.float64)
        full = counts >= self.n
        least[full] = self.score[last[full]]
        return least

    def add(
        self,
        target: Int[Tensor, " row"],
        score: Float[Tensor, " row"],
        content: Int[Tensor, "row width"],
        sources: Sequence[str],
    ) -> None:
        """Take in rows."""
        keys = {name: name_key(name) for name in set(several(sources, "sources"))}
        source = torch.tensor([keys[name] for name in sources], dtype=torch.long)
        self._take(target.cpu(), score.double().cpu(), content.cpu(), source, {key: name for name, key in keys.items()})

    def merge(self, other: Any) -> None:
        """Take in another's rows."""
        self._take(other.target, other.score, other.content, other.source, other._names)

    def all_reduce(self) -> None:
        """Take in those of every other process."""
        for i, state in enumerate(gather(self.state_dict())):
            if i == 0:
                self.load_state_dict(state)
            else:
                other = TopRows(self.n, self.content.shape[1])
                other.load_state_dict(state)
                self.merge(other)

    def _take(self, target: Tensor, score: Tensor, content: Tensor, source: Tensor, names: Mapping[int, str]) -> None:
        target, score = torch.cat([self.target, target]), torch.cat([self.score, score])
        content, source = torch.cat([self.content, content]), torch.cat([self.source, source])
        # Sorted by the last criterion first, each time keeping the order of equals.
        order = row_keys(torch.cat([content, source[:, None]], 1)).argsort(stable=True)
        order = order[score[order].argsort(descending=True, stable=True)]
        order = order[target[order].argsort(stable=True)]
        target = target[order]
        rank = torch.arange(len(target)) - torch.searchsorted(target, target)
        kept = order[rank < self.n]
        self.target, self.score = target[rank < self.n], score[kept]
        self.content, self.source = content[kept], source[kept]
        known = {**self._names, **names}
        self._names = {key: known[key] for key in set(self.source.tolist())}

    def state_dict(self) -> dict[str, Tensor]:
        """The rows."""
        names = to_bytes(sorted(self._names.items()))
        rows = {"target": self.target, "score": self.score, "content": self.content, "source": self.source}
        return {**rows, "names": names}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the place of the rows."""
        self.target, self.score, self.content, self.source = (
            state[name].clone() for name in ("target", "score", "content", "source")
        )
        self._names = {int(key): name for key, name in from_bytes(state["names"])}


def name_key(name: str) -> int:
    """A number of 63 bits for a name, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def row_keys(rows: Int[Tensor, "row width"]) -> Int[Tensor, " row"]:
    """A number for each row that depends on all of it, spread like random ones over the whole numbers of 64 bits."""
    key = torch.full((len(rows),), 0x2545F4914F6CDD1D, dtype=torch.long)
    for column in rows.T:  # splitmix64 of each number in turn; products wrap around
        key = (key ^ column) * -0x61C8864680B583EB
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            key = (key ^ _shifted(key, shift)) * factor
    return key ^ _shifted(key, 31)


def _shifted(key: Tensor, by: int) -> Tensor:
    """To the right, filled with zeros: torch fills with the sign."""
    return (key >> by) & ((1 << (64 - by)) - 1)
