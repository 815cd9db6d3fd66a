"""Random signs of units: against all signs that there are, and against differences that mean nothing."""

import itertools

import pytest
import torch
from torch import Tensor

from moe_lens.errors import InputError
from moe_lens.stats import sign_test

LEVEL = 0.05


def t_of(values: Tensor) -> Tensor:
    return values.mean(0) / (values.std(0) / len(values) ** 0.5)


def drawn(seed: int, units: int = 10, quantities: int = 12) -> Tensor:
    """Skewed, heavy-tailed and dependent, as shares are; each unit on either side of 0 as often."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(units, 1, generator=generator, dtype=torch.float64)
    values = (torch.randn(units, quantities, generator=generator, dtype=torch.float64) + common) ** 3
    return values * (torch.rand(units, quantities, generator=generator) < 0.7)


def test_p_values_are_those_of_all_signs() -> None:
    values = drawn(0)
    values[:, 3] += 3
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=10)), dtype=torch.float64)
    greatest = torch.stack([t_of(values * sign[:, None]).abs().amax() for sign in signs])
    exact = (greatest[:, None] >= t_of(values).abs() * (1 - 1e-9)).double().mean(0)
    found = sign_test(values.view(10, 3, 4), draws=20_000)
    assert found.mean.shape == found.t.shape == found.p_values.shape == (3, 4)
    torch.testing.assert_close(found.t.flatten(), t_of(values))
    # Three standard errors of a share of 20,000 draws.
    assert (found.p_values.flatten() - exact).abs().max() <= 3 * 0.5 / 20_000**0.5
    assert found.smallest_p == 2.0**-9
    assert sign_test(values, draws=99).smallest_p == 0.01


def test_one_difference_among_many_is_found_and_none_where_there_is_none() -> None:
    level = [bool((sign_test(drawn(seed, 12), 199).p_values <= LEVEL).any()) for seed in range(200)]
    assert sum(level) / len(level) <= LEVEL + 3 * (LEVEL * (1 - LEVEL) / 200) ** 0.5
    assert any(level), "or it could find nothing"
    power = []
    for seed in range(20):
        values = drawn(seed, 12)
        values[:, 5] = 2 + 0.05 * values[:, 5]
        power.append((sign_test(values, 199).p_values <= LEVEL).nonzero()[:, 0].tolist() == [5])
    assert sum(power) >= 15


def test_few_units_are_no_test_and_what_is_no_number_is_refused() -> None:
    found = sign_test(drawn(1, units=9))
    assert found.p_values.isnan().all()
    assert found.t.isfinite().all()
    assert sign_test(torch.zeros(10, 2)).p_values.tolist() == [1, 1]
    one, several = sign_test(drawn(1)[:, 0]), sign_test(drawn(1)[:, :1])
    assert one.p_values.shape == ()
    assert one.p_values == several.p_values[0]
    with pytest.raises(InputError, match="expected a quantity to test"):
        sign_test(torch.zeros(10, 0))
    with pytest.raises(InputError, match="finite"):
        sign_test(torch.full((10, 2), torch.nan))
