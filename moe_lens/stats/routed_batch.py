"""`RoutedBatch`: a batch of text with its routing, which is what routing statistics are taken from."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.errors import InputError, several
from moe_lens.ids import ids
from moe_lens.routing import Routing


@dataclass(frozen=True, eq=False, kw_only=True)
class RoutedBatch:
    """Text, the routing of its tokens, and which tokens count.

    `moe_lens.stats.observe` makes one from a model; of routing that another program exported it is
    `RoutedBatch(routing=Routing.from_arrays(…), tokens=…)`.

    Raises:
        InputError: shapes that do not fit one another, or expert ids out of range.
    """

    routing: Routing
    """Of every token, [layer, batch, pos, …]."""
    tokens: Int[Tensor, "batch pos"] | None = None
    """Ids; only what asks for tokens needs them."""
    counted: Bool[Tensor, "batch pos"] | None = None
    """Tokens to count. If not given: the routing's mask, or all. Padding is never counted, whatever is said here."""
    sources: Sequence[str] = ()
    """The document each row is from. If not given, all are one: nothing shows that they are independent."""
    predicted: Int[Tensor, "batch pos"] | None = None
    """The token that the model holds most likely to come next."""

    def __post_init__(self) -> None:
        shape = tuple(self.routing.indices.shape[1:3])
        device = self.routing.indices.device
        counted = torch.ones(shape, dtype=torch.bool) if self.counted is None else self.counted
        for name in ("tokens", "predicted"):
            value = getattr(self, name)
            if value is not None:
                _check_shape(name, value, shape)
                object.__setattr__(self, name, value.to(device))
        _check_shape("counted", counted, shape)
        counted = counted.to(device)
        if self.routing.mask is not None:
            counted = counted & self.routing.mask.to(device)
        object.__setattr__(self, "counted", counted)
        sources = tuple(several(self.sources, "sources")) or ("unnamed",) * shape[0]
        if len(sources) != shape[0]:
            raise InputError(f"{len(sources)} sources for a batch of {shape[0]} rows; expected one for each row")
        object.__setattr__(self, "sources", sources)
        indices, n_experts = self.routing.indices, self.routing.n_experts
        outside = (indices < 0) | (indices >= n_experts)
        if bool(outside.any()):
            wrong = indices[outside & counted[None, :, :, None]]
            if wrong.numel():
                low, high = int(wrong.min()), int(wrong.max())
                none = "; −1 is no expert, as in `use_experts`, and every token needs as many here" * (low == -1)
                raise InputError(f"expert indices from {low} to {high}; expected ids from 0 to {n_experts - 1}{none}")
            inside = indices.masked_fill(outside, 0)  # what does not count may hold anything
            object.__setattr__(self, "routing", replace(self.routing, indices=inside))

    @property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """The tokens that count."""
        assert self.counted is not None
        return self.counted

    @cached_property
    def chosen(self) -> Float[Tensor, "layer batch pos n_experts"]:
        """1 where a counted token chose the expert, else 0. Sums in float32 are exact below 2²⁴ tokens."""
        indices = self.routing.indices
        hot = torch.zeros(*indices.shape[:-1], self.routing.n_experts, device=indices.device)
        return hot.scatter_(-1, indices, self.mask.float()[None, :, :, None].expand(indices.shape))

    def without(self, tokens: Collection[int]) -> "RoutedBatch":
        """The same with further tokens not counted, such as special ones.

        Raises:
            InputError: the batch does not know its tokens, or `tokens` holds something else than ids.
        """
        found = self.require_tokens()
        told = torch.tensor(ids("tokens", tokens, empty=True), dtype=found.dtype, device=found.device)
        excluded = torch.isin(found, told)
        return replace(self, counted=self.mask & ~excluded)

    def require_tokens(self) -> Int[Tensor, "batch pos"]:
        """The tokens.

        Raises:
            InputError: the batch does not know them.
        """
        if self.tokens is None:
            raise InputError("this needs to know the tokens; make the RoutedBatch with tokens=")
        return self.tokens


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise InputError(f"{name} has shape {tuple(value.shape)}; the routing is of {shape} (batch, pos)")
