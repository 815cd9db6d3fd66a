"""Metrics against their definitions, written out in loops; what cannot be a metric is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens.errors import InputError
from moe_lens.interventions import patch
from moe_lens.interventions.metrics import (
    KLDivergence,
    Logit,
    LogitDifference,
    LogProb,
    Loss,
    TokenMetric,
    differentiable,
    evaluate,
)
from tests.wrapped import wrapped

BATCH, POS, VOCAB = 3, 5, 7
LENGTHS = (5, 3, 2)
F64 = 1e-14


def logits(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(BATCH, POS, VOCAB, dtype=dtype, generator=torch.Generator().manual_seed(3))


def ids() -> Tensor:
    return torch.randint(VOCAB, (BATCH, POS), generator=torch.Generator().manual_seed(4))


def mask(side: str) -> Tensor:
    ahead = torch.arange(POS) < torch.tensor(LENGTHS)[:, None]
    return ahead.long() if side == "right" else ahead.flip(-1).long()


def log_p(row: Tensor) -> Tensor:
    return (row.exp() / row.exp().sum()).log()


@pytest.mark.parametrize("side", ["right", "left", None])
def test_loss_is_the_mean_over_real_tokens_after_real_tokens(side: str | None) -> None:
    given, tokens = logits(), ids()
    real = torch.ones(BATCH, POS) if side is None else mask(side)
    nats = [
        -log_p(given[b, p])[tokens[b, p + 1]]
        for b in range(BATCH)
        for p in range(POS - 1)
        if real[b, p] * real[b, p + 1]
    ]
    found = Loss(tokens, None if side is None else real)(given)
    assert len(nats) == (BATCH * (POS - 1) if side is None else sum(n - 1 for n in LENGTHS))
    assert abs(found - torch.stack(nats).mean()) <= F64
    if side is not None:
        assert abs(found - Loss(tokens)(given)) > 1e-3, "padding makes a difference"
    counted = torch.rand(BATCH, POS, generator=torch.Generator().manual_seed(0)) < 0.5
    some = [
        -log_p(given[b, p])[tokens[b, p + 1]]
        for b in range(BATCH)
        for p in range(POS - 1)
        if real[b, p] * real[b, p + 1] * counted[b, p + 1]
    ]
    assert abs(Loss(tokens, real.bool(), counted)(given) - torch.stack(some).mean()) <= F64


def test_chosen_logits_log_probabilities_and_differences() -> None:
    given, tokens = logits(), ids()
    assert Logit(4)(given) == given[:, -1, 4].mean()
    assert Logit(torch.tensor(4), positions=1)(given) == given[:, 1, 4].mean()
    each, last = torch.tensor([1, 0, 6]), torch.tensor([4, 2, -4])
    rows = [given[b, p] for b, p in enumerate((4, 2, 1))]
    assert Logit(each, last)(given) == torch.stack([r[e] for r, e in zip(rows, each, strict=True)]).mean()
    expected = torch.stack([log_p(row)[e] for row, e in zip(rows, each, strict=True)]).mean()
    assert abs(LogProb(each, last)(given) - expected) <= F64
    where = mask("left").bool()
    pairs = where.nonzero().tolist()
    expected = torch.stack([given[b, p, tokens[b, p]] - given[b, p, 3] for b, p in pairs]).mean()
    assert abs(LogitDifference(tokens, 3, where)(given) - expected) <= F64


@pytest.mark.untyped
def test_a_token_against_itself_and_what_is_no_metric_are_refused() -> None:
    tokens = ids()
    for token, other in ((5, 5), (torch.tensor([5, 5, 5]), 5), (tokens, tokens)):
        with pytest.raises(InputError, match="their difference is always 0"):
            LogitDifference(token, other)
    assert LogitDifference(torch.tensor([5, 5, 6]), 5), "of some items it is not"
    bad: Any = "text"
    nothing: Any = None
    with pytest.raises(InputError, match="tokens is 'text'; expected a tensor of whole numbers"):
        Loss(bad)
    with pytest.raises(InputError, match="metric is None; expected a function"):
        patch(wrapped("mixtral").model, tokens, tokens, "resid_pre", nothing)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_last_token_is_a_real_one_where_padding_is_known(side: str) -> None:
    given, real = logits(), mask(side).bool()
    for back in (1, 2):
        ends = [n - back if side == "right" else POS - back for n in LENGTHS]
        rows = [given[b, end] for b, end in enumerate(ends)]
        found = Logit(3, -back).among(real)(given)
        assert found == torch.stack([row[3] for row in rows]).mean()
        assert (found == Logit(3, -back)(given)) == (side == "left"), "without the mask it is the last column"
    column = 1 if side == "right" else 4
    assert Logit(3, column).among(real)(given) == given[:, column, 3].mean(), "positions from 0 are columns"
    with pytest.raises(InputError, match="text 2 has 2 tokens, and none at position -3; expected a position that"):
        Logit(3, -3).among(real)(given)


@pytest.mark.typed
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_not_read_where_it_is_known(side: str) -> None:
    """As in `patch`: each metric made without a mask, told the run's, is the one that was made with it."""
    given, tokens, real = logits(), ids(), mask(side).bool()
    clean, every = given.roll(1, -1), torch.ones(BATCH, POS).bool()
    pairs = [
        (Loss(tokens), Loss(tokens, real)),
        (KLDivergence(clean), KLDivergence(clean, real)),
        (Logit(3, every), Logit(3, real)),
    ]
    for unaware, made_with_it in pairs:
        assert unaware.among(real)(given) == made_with_it(given) == made_with_it.among(real)(given)
        assert abs(unaware(given) - made_with_it(given)) > 1e-3, "padding makes a difference"
    at, short = (4, 1) if side == "right" else (0, 1)
    with pytest.raises(InputError, match=f"text {short} has 3 tokens, and none at position {at}"):
        Logit(3, at).among(real)(given)


def test_divergence_from_the_clean_run() -> None:
    clean, other = logits(), logits().roll(1, -1)
    where = mask("right").bool()
    expected = []
    for b, p in where.nonzero().tolist():
        p_clean = log_p(clean[b, p]).exp()
        expected.append((p_clean * (log_p(clean[b, p]) - log_p(other[b, p]))).sum())
    assert abs(KLDivergence(clean, where)(other) - torch.stack(expected).mean()) <= F64
    assert KLDivergence(clean)(clean) == 0
    assert KLDivergence(clean)(other) > 0.1


def builtin() -> dict[str, TokenMetric]:
    return {
        "loss": Loss(ids(), mask("right")),
        "logit": Logit(ids(), mask("left").bool()),
        "log-prob": LogProb(torch.tensor([1, 0, 6]), torch.tensor([4, 2, -4])),
        "difference": LogitDifference(3, 5),
        "divergence": KLDivergence(logits(torch.float32).flip(0), mask("right")),
    }


@pytest.mark.parametrize("name", builtin())
def test_the_metric_is_the_mean_of_values_at_what_it_reads_in_any_order(name: str) -> None:
    metric, given = builtin()[name], logits().requires_grad_()
    batch, pos = metric.reads(BATCH, POS).nonzero()[torch.randperm(int(metric.reads(BATCH, POS).sum()))].unbind(-1)
    whole = metric(given)
    assert abs(metric.values(given[batch, pos], batch, pos).mean() - whole) <= F64
    slope = torch.autograd.grad(whole, given)[0]
    assert torch.equal(slope.abs().sum(-1) > 0, metric.reads(BATCH, POS)), "gradients at what is read, and nowhere else"
    assert torch.autograd.gradcheck(metric, given)


@pytest.mark.typed
@pytest.mark.parametrize("name", builtin())
def test_half_precision_is_read_in_float32(name: str) -> None:
    metric, given = builtin()[name], logits().bfloat16()
    assert metric(given).dtype == torch.float32
    assert abs(metric(given) - metric(given.double())) <= 1e-5


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        (lambda given: given, r"gave torch.float64 of shape \(3, 5, 7\); expected a floating-point scalar"),
        (lambda given: given.argmax(), "gave torch.int64 of shape"),
        (lambda given: given.sum().item(), "gave float; expected a floating-point scalar tensor"),
        (lambda given: given.sum() * float("nan"), "is nan; expected a finite number"),
        (lambda given: given.sum() / 0, "inf; expected a finite number"),
        (Logit(VOCAB), "tokens go from 7 to 7; expected ids from 0 to 6"),
        (Logit(torch.tensor(-1)), "tokens go from -1 to -1; expected ids from 0 to 6"),
        (Logit(1, POS), "positions go from 5 to 5; expected -5 to 4"),
        (Logit(1, torch.tensor([0, 1])), r"positions of shape \(2,\); expected \(3,\)"),
        (Logit(1, torch.zeros(3, 5).bool()), "reads no position"),
        (LogProb(torch.tensor([1, 2])), r"tokens of shape \(2,\); expected one id, or \(3,\) or \(3, 5\)"),
        (Loss(ids()[:2]), r"tokens of shape \(2, 5\); expected \(3, 5\)"),
        (Loss(ids(), torch.eye(3, 5)), "reads no position"),
        (KLDivergence(logits()[:, :4]), r"clean logits of shape \(3, 4\); expected \(3, 5\)"),
        (KLDivergence(logits()[..., :4]), "clean logits have 4 entries; expected 7"),
    ],
)
def test_what_cannot_be_a_metric_is_refused(metric: Callable[[Tensor], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        evaluate(metric, logits())


@pytest.mark.untyped
def test_a_mask_that_is_no_tensor_is_refused_at_once() -> None:
    words: Any = [[1, 1, 1]]
    tokens = torch.zeros(1, 3, dtype=torch.long)
    for name in ("mask", "counted"):
        with pytest.raises(InputError, match=f"{name} is a list; expected a tensor of ones and zeros"):
            Loss(tokens, **{name: words})
    assert Loss(tokens, torch.tensor(words)).reads(1, 3).tolist() == [[True, True, False]]


def test_a_mask_of_another_shape_is_refused_at_once() -> None:
    with pytest.raises(InputError, match=r"mask of shape \(3, 4\); expected \(3, 5\)"):
        Loss(ids(), torch.ones(3, 4))


def test_a_metric_without_gradient_is_refused_where_one_is_needed() -> None:
    given = logits().requires_grad_()
    assert differentiable(evaluate(Logit(3), given), Logit(3)).requires_grad

    def accuracy(given: Tensor) -> Tensor:
        return (given.argmax(-1) == 3).double().mean()

    with pytest.raises(InputError, match="the metric accuracy has no gradient"):
        differentiable(evaluate(accuracy, given), accuracy)
