"""`PartialSum`: the name of a point in the residual stream, between "before the experts" and "after all of them"."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, get_args

from moe_lens.checked import Positive, Seed, checked
from moe_lens.errors import InputError
from moe_lens.ids import Ids, ids

Residual = Literal["mid", "pre", "none"]
Drawn = Literal["active", "unselected"]


@checked
@dataclass(frozen=True, kw_only=True)
class PartialSum:
    """The residual stream u (`resid_mid`) plus chosen routed experts of one layer: u + Σ_{r chosen} g_r E_r(x).

    A `PartialSum` only names the sum; `MoECache.partial_sum` computes it. `PartialSum()` is `u + routed`, and
    `PartialSum(ranks=[j])` is `u + rank j`: each is a column of Figure 2 of arXiv 2603.05806. Equal sums compare and
    hash equal.

    Raises:
        InputError: an unknown `residual` or `drawn`, ranks or experts that are not distinct whole numbers from 0, more
            than one of ranks, experts and drawn, a seed where nothing is drawn, `weighted=False` without a routed
            expert, or a sum of nothing.
    """

    residual: Residual = "mid"
    """What experts are added to: u, the residual stream between attention and experts; `resid_pre`; or nothing."""
    ranks: Collection[int] | None = None
    """Ranks by routing weight, 0 the largest; a sorted tuple. None: all routed experts; empty: none of them."""
    experts: Collection[int] | None = None
    """Expert ids, or a mask over all experts, instead of ranks; a sorted tuple. An expert adds nothing at a token that
    did not select it."""
    weighted: bool = True
    """Whether an expert's output is multiplied by its routing weight, as the model does."""
    shared: bool = False
    """Whether the shared experts are added (nothing, in a model that has none)."""
    drawn: Drawn | None = None
    """A control: one expert drawn at random for every token and layer. `active`: one of the active experts, with its
    own weight. `unselected`: one that was not selected, computed for this purpose and given the weight of rank 0, since
    its own affinity is small: only *which* expert is added then differs from rank 0."""
    seed: Seed = 0
    """Random seed of the draw. A token's draw depends on its place in the cache, not on which other tokens are read."""

    def __post_init__(self) -> None:
        if self.residual not in get_args(Residual):
            raise InputError(f"residual is {self.residual!r}; expected one of {get_args(Residual)}")
        if self.drawn not in (None, *get_args(Drawn)):
            raise InputError(f"drawn is {self.drawn!r}; expected one of {get_args(Drawn)}, or None")
        given = [name for name in ("ranks", "experts", "drawn") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"a partial sum chooses by ranks or by experts, or draws; got {' and '.join(given)}")
        if self.drawn is None and self.seed != 0:
            raise InputError(f"seed={self.seed!r} without drawn=: nothing is drawn; leave it out")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise InputError(f"seed is {self.seed!r}; expected a whole number from 0")
        for name in ("ranks", "experts"):
            object.__setattr__(self, name, _distinct(name, getattr(self, name)))
        if not self.label:
            raise InputError(
                "a partial sum of nothing: no residual, no routed expert, no shared experts. Ask for one of them"
            )

    @property
    def restricted(self) -> bool:
        """Whether the sum has only some of the active routed experts."""
        return self.ranks is not None or self.experts is not None or self.drawn is not None

    @property
    def picks(self) -> bool:
        """Whether the sum names routed experts by rank, by id or at random; a dense layer has none."""
        return bool(self.ranks or self.experts or self.drawn)

    @property
    def control(self) -> bool:
        """Whether the sum is a control: no routed expert at all, or one drawn at random."""
        return self.drawn is not None or (self.restricted and not self.picks)

    @property
    def label(self) -> str:
        """What tables and figures call the sum, such as `u + ranks 0-2, 5 + shared`; u is `resid_mid`."""
        parts = [] if self.residual == "none" else [{"mid": "u", "pre": "resid_pre"}[self.residual]]
        suffix = "" if self.weighted else " unweighted"
        if not self.restricted:
            parts.append(f"routed{suffix}")
        for name, chosen in (("rank", self.ranks), ("expert", self.experts)):
            if chosen:
                parts.append(f"{name}{'s' if len(chosen) > 1 else ''} {_spans(chosen)}{suffix}")
        if self.drawn:
            seed = f" (seed {self.seed})" if self.seed else ""
            parts.append(("random active" if self.drawn == "active" else "unselected") + f" expert{suffix}{seed}")
        if self.shared:
            parts.append("shared")
        return " + ".join(parts)

    @classmethod
    def each_rank(cls, top_k: Positive) -> tuple["PartialSum", ...]:
        """The sums u + one expert, by rank: k of them.

        Args:
            top_k: How many experts a token has.
        """
        return tuple(cls(ranks=[rank]) for rank in range(top_k))

    @classmethod
    def cumulative(cls, top_k: Positive) -> tuple["PartialSum", ...]:
        """The sums u + the first j ranks, for j = 0 … k: k + 1 of them.

        Args:
            top_k: How many experts a token has.
        """
        return tuple(cls(ranks=range(count)) for count in range(top_k + 1))

    @classmethod
    def leave_one_out(cls, top_k: Positive) -> tuple["PartialSum", ...]:
        """The sums u + all ranks but one: k of them.

        Args:
            top_k: How many experts a token has.
        """
        return tuple(cls(ranks=set(range(top_k)) - {rank}) for rank in range(top_k))

    @classmethod
    def each_expert(cls, n_experts: Positive) -> tuple["PartialSum", ...]:
        """The sums u + one expert, by id: one for each expert of a layer.

        Args:
            n_experts: How many routed experts a layer has.
        """
        return tuple(cls(experts=[expert]) for expert in range(n_experts))

    @classmethod
    def figure2(cls, top_k: Positive) -> tuple["PartialSum", ...]:
        """The columns of the paper's Figure 2: the whole layer, `u + routed`, and u + each rank.

        Args:
            top_k: How many experts a token has.
        """
        return cls(shared=True), cls(), *cls.each_rank(top_k)

    @classmethod
    def controls(cls, top_k: Positive, *, seed: Seed = 0) -> tuple["PartialSum", ...]:
        """The sums with which a lens on u + one expert should be compared.

        u alone; u + an active expert drawn at random; u + the last rank; u + an expert that was not selected, with the
        weight of rank 0.

        Args:
            top_k: How many experts a token has.
            seed: Random seed of both draws.
        """
        active, unselected = cls(drawn="active", seed=seed), cls(drawn="unselected", seed=seed)
        return cls(ranks=[]), active, cls(ranks=[top_k - 1]), unselected


def _distinct(name: str, values: Any) -> Ids | None:
    if values is None:
        return None
    found = ids(name, values, empty=True)
    if isinstance(values, Collection) and found.mask is None and len(found) < len(values):
        raise InputError(f"{name} is {values!r}; expected each number once")
    return found


def _spans(numbers: Collection[int]) -> str:
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
