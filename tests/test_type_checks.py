"""The tests' own safety net: annotations of the package are checked, unless a test asks for what a user would see."""

from typing import Any

import jaxtyping
import pytest

from moe_lens import names

WRONG: Any = 3


def test_a_wrong_argument_is_noticed():
    with pytest.raises(jaxtyping.TypeCheckError, match="parse_mlp"):
        names.parse_mlp(WRONG)


@pytest.mark.untyped
def test_a_user_sees_the_error_of_the_code_itself():
    with pytest.raises(TypeError, match="expected string"):
        names.parse_mlp(WRONG)
