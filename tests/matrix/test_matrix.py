"""Every supported family obeys every law, and every model type with experts is supported or refused with a reason."""

from functools import lru_cache

import pytest

from moe_lens.model.families import FAMILIES
from tests.matrix.laws import LAWS, Case

case_of = lru_cache(maxsize=2)(Case)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_law(model_type: str, law: str) -> None:
    LAWS[law](case_of(model_type))
