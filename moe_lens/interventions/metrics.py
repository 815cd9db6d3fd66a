"""Metrics: one number from the logits of a run, by which interventions are compared.

A metric is any callable from logits [batch, pos, d_vocab] to a scalar tensor. The built-in ones are means over tokens
and say which positions they read, so that sweeps unembed those positions alone.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_lens.checked import Natural
from moe_lens.errors import InputError
from moe_lens.ids import as_mask

Metric = Callable[[Tensor], Tensor]
"""From logits [batch, pos, d_vocab] to a scalar tensor; with a gradient, where an attribution needs one."""

Positions = int | Int[Tensor, " batch"] | Bool[Tensor, "batch pos"]
"""One position for every item, one for each item, or a mask. Where the padding of a run is known, as in `patch` and
`expert_attribution`, negative ones count from the end of each text, and padding is not read; otherwise they count from
the end of the logits."""


class TokenMetric(ABC):
    """A metric that is the mean of a value over the positions that it reads."""

    real: Bool[Tensor, "batch pos"] | None = None
    """True at real tokens of the run; None where the padding is not known."""

    def among(self, real: Bool[Tensor, "batch pos"] | None) -> Self:
        """The same metric of a run whose padding is known."""
        known = copy.copy(self)
        known.real = real
        return known

    def _real(self, where: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """`where`, without what is known to be padding."""
        if self.real is None:
            return where
        return where & _same_shape("the run's mask", self.real, tuple(where.shape)).to(where.device)

    @abstractmethod
    def reads(self, batch: Natural, pos: Natural) -> Bool[Tensor, "batch pos"]:
        """The positions whose logits the metric reads.

        Raises:
            InputError: the metric was made for a batch of another shape, or reads nothing.
        """

    @abstractmethod
    def values(
        self, logits: Float[Tensor, "rows d_vocab"], batch: Int[Tensor, " rows"], pos: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """The value at each row of logits, in float32 at least.

        Args:
            logits: of some positions that the metric reads, in any order.
            batch: the item of the batch that each row belongs to.
            pos: its position.
        """

    def __call__(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, ""]:
        """Mean of the values over all that is read."""
        batch, pos = self.reads(*logits.shape[:2]).nonzero().to(logits.device).unbind(-1)
        return self.values(logits[batch, pos], batch, pos).mean()


class Loss(TokenMetric):
    """Next-token cross-entropy in nats, mean over the predicted tokens; padding neither predicts nor is predicted.

    Args:
        tokens: of the input.
        mask: true at real tokens; all of them if not given, but for what is known to be padding of a run.
        counted: true at tokens whose loss counts, as in `TokenBatch.counted`; all real ones if not given.
    """

    def __init__(self, tokens: Int[Tensor, "batch pos"], mask: Tensor | None = None, counted: Tensor | None = None):
        self.tokens = tokens
        self._mask = (
            torch.ones_like(tokens, dtype=torch.bool) if mask is None else as_mask("mask", mask).to(tokens.device)
        )
        _same_shape("mask", self._mask, tuple(tokens.shape))
        self._counted = self._mask if counted is None else as_mask("counted", counted).to(tokens.device)
        _same_shape("counted", self._counted, tuple(tokens.shape))

    def reads(self, batch: Natural, pos: Natural) -> Bool[Tensor, "batch pos"]:
        """Real positions before a real one that counts."""
        real = self._real(_same_shape("tokens", self._mask, (batch, pos)))
        reads = real.clone()
        reads[:, :-1] &= (real & self._counted)[:, 1:]
        reads[:, -1] = False
        return _not_empty(reads)

    def values(
        self, logits: Float[Tensor, "rows d_vocab"], batch: Int[Tensor, " rows"], pos: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """−log p of the token after each row."""
        at = batch.to(self.tokens.device), pos.to(self.tokens.device) + 1
        return cross_entropy(_wide(logits), self.tokens[at].to(logits.device), reduction="none")


class _AtPositions(TokenMetric):
    """What the metrics of chosen positions and tokens share."""

    def __init__(self, positions: Positions, *tokens: Natural | Int[Tensor, "..."]):
        self.positions = positions
        self._tokens = tuple(torch.as_tensor(token) for token in tokens)

    def reads(self, batch: Natural, pos: Natural) -> Bool[Tensor, "batch pos"]:
        """The chosen positions."""
        for ids in self._tokens:
            if tuple(ids.shape) not in ((), (batch,), (batch, pos)):
                raise InputError(
                    f"the metric was given tokens of shape {tuple(ids.shape)}; "
                    f"expected one id, or {(batch,)} or {(batch, pos)}"
                )
        where = self.positions
        if isinstance(where, Tensor) and where.dtype == torch.bool:
            return _not_empty(self._real(_same_shape("positions", where, (batch, pos))))
        one = torch.full((batch,), where) if isinstance(where, int) else _same_shape("positions", where, (batch,))
        if int(one.min()) < -pos or int(one.max()) >= pos:
            raise InputError(f"positions go from {one.min()} to {one.max()}; expected {-pos} to {pos - 1}")
        places = torch.arange(pos, device=one.device)
        if self.real is None:
            return places == (one % pos)[:, None]
        real = _same_shape("the run's mask", self.real, (batch, pos)).to(one.device)
        from_end = -real.long().flip(-1).cumsum(-1).flip(-1)
        reads = torch.where(one[:, None] < 0, from_end == one[:, None], places == one[:, None]) & real
        if not bool(reads.any(-1).all()):
            text = int((~reads.any(-1)).nonzero()[0])
            raise InputError(
                f"text {text} has {int(real[text].sum())} tokens, and none at position {int(one[text])}; expected a "
                "position that every text has: negative ones count from the end of each"
            )
        return reads


class Logit(_AtPositions):
    """The logit of a token, mean over the positions.

    Args:
        token: one id, or ids [batch] or [batch, pos].
        positions: where to read; the last position if not given (see `Positions`).
    """

    def __init__(self, token: Natural | Int[Tensor, "..."], positions: Positions = -1):
        super().__init__(positions, token)

    def values(
        self, logits: Float[Tensor, "rows d_vocab"], batch: Int[Tensor, " rows"], pos: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """The logit in each row."""
        return _pick(_wide(logits), self._tokens[0], batch, pos)


class LogitDifference(_AtPositions):
    """Logit of one token minus that of another, mean over the positions.

    Args:
        token: one id, or ids [batch] or [batch, pos].
        other: what is subtracted, likewise.
        positions: where to read; the last position if not given (see `Positions`).
    """

    def __init__(
        self, token: Natural | Int[Tensor, "..."], other: Natural | Int[Tensor, "..."], positions: Positions = -1
    ):
        super().__init__(positions, token, other)
        mine, others = self._tokens
        if (0 in (mine.ndim, others.ndim) or mine.shape == others.shape) and bool((mine == others).all()):
            raise InputError(f"token and other are both {mine.tolist()!s:.100}: their difference is always 0")

    def values(
        self, logits: Float[Tensor, "rows d_vocab"], batch: Int[Tensor, " rows"], pos: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """The difference in each row."""
        wide = _wide(logits)
        return _pick(wide, self._tokens[0], batch, pos) - _pick(wide, self._tokens[1], batch, pos)


class LogProb(Logit):
    """Log-probability of a token in nats, in (−∞, 0], mean over the positions; arguments as for `Logit`."""

    def values(
        self, logits: Float[Tensor, "rows d_vocab"], batch: Int[Tensor, " rows"], pos: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """The log-probability in each row."""
        return _pick(_wide(logits).log_softmax(-1), self._tokens[0], batch, pos)


class KLDivergence(TokenMetric):
    """KL(clean ‖ run) in nats, ≥ 0: Σ p_clean (log p_clean − log p), mean over real positions.

    At the clean run itself it is 0 and so is its gradient: methods of first order have nothing to say of it.

    Args:
        clean: logits of the clean run.
        mask: true at positions to read; all of them if not given, but for what is known to be padding of a run.
    """

    def __init__(
        self,
        clean: Float[Tensor, "batch pos d_vocab"],
        mask: Tensor | None = None,
    ):
        self.clean = clean.detach()
        shape = tuple(clean.shape[:2])
        self._reads = torch.ones(shape, dtype=torch.bool) if mask is None else as_mask("mask", mask)
        _same_shape("mask", self._reads, shape)

    def reads(self, batch: Natural, pos: Natural) -> Bool[Tensor, "batch pos"]:
        """The positions of the mask."""
        return _not_empty(self._real(_same_shape("clean logits", self._reads, (batch, pos))))

    def values(
        self, logits: Float[Tensor, "rows d_vocab"], batch: Int[Tensor, " rows"], pos: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """The divergence in each row."""
        clean = self.clean[batch.to(self.clean.device), pos.to(self.clean.device)].to(logits.device)
        if clean.shape != logits.shape:
            raise InputError(
                f"clean logits have {clean.shape[-1]} entries; expected {logits.shape[-1]}, as the run has"
            )
        expected, found = _wide(clean).log_softmax(-1), _wide(logits).log_softmax(-1)
        return (expected.exp() * (expected - found)).sum(-1)


def among(metric: Metric, real: Bool[Tensor, "batch pos"] | None) -> Metric:
    """The metric, told what padding is where it is one of tokens."""
    return metric.among(real) if isinstance(metric, TokenMetric) else metric


def evaluate(metric: Metric, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, ""]:
    """The metric's value, checked.

    Raises:
        InputError: it is not a scalar tensor, or not a finite number.
    """
    return finite(metric(logits), metric)


def finite(value: object, metric: Metric) -> Float[Tensor, ""]:
    """`value`, which `metric` gave, if it is a scalar and finite.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        came = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"the metric {describe(metric)} gave {came}; expected a floating-point scalar tensor")
    if not bool(value.isfinite()):
        raise InputError(f"the metric {describe(metric)} is {value.item()}; expected a finite number")
    return value.reshape(())


def differentiable(value: Float[Tensor, ""], metric: Metric) -> Float[Tensor, ""]:
    """`value`, which `metric` gave, if it has a gradient.

    Raises:
        InputError: it does not depend on the logits by operations that autograd follows.
    """
    if not value.requires_grad:
        raise InputError(
            f"the metric {describe(metric)} has no gradient: it must be made of differentiable operations on the "
            'logits (no argmax, detach, item or numpy); method="knockout" does not need one'
        )
    return value


def describe(metric: Metric) -> str:
    """What a metric is called in messages and results."""
    return getattr(metric, "__name__", None) or type(metric).__name__


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _same_shape(what: str, value: Tensor, expected: tuple[int, ...]) -> Tensor:
    if tuple(value.shape) != expected:
        raise InputError(
            f"the metric was given {what} of shape {tuple(value.shape)}; expected {expected}, as the input has"
        )
    return value


def _not_empty(mask: Tensor) -> Tensor:
    if not mask.any():
        raise InputError("the metric reads no position at all; expected at least one that is not padding")
    return mask


def _pick(
    values: Float[Tensor, "rows d_vocab"],
    ids: Int[Tensor, "..."],
    batch: Int[Tensor, " rows"],
    pos: Int[Tensor, " rows"],
) -> Float[Tensor, " rows"]:
    """The entry of each row's own token; ids are one, [batch] or [batch, pos]."""
    if ids.ndim:
        ids = ids[(batch.to(ids.device), pos.to(ids.device))[: ids.ndim]]
    if int(ids.min()) < 0 or int(ids.max()) >= values.shape[-1]:
        raise InputError(f"tokens go from {ids.min()} to {ids.max()}; expected ids from 0 to {values.shape[-1] - 1}")
    return values.gather(-1, ids.to(values.device).expand(len(values))[:, None])[:, 0]
