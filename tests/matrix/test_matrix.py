"""Every supported family obeys every law, and every model type with experts is supported or refused with a reason."""

import importlib.util
import re
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from moe_lens.model.families import FAMILIES
from tests.matrix.laws import LAWS, WORDS, Case

ROOT = Path(__file__).parents[2]

case_of = lru_cache(maxsize=2)(Case)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_law(model_type: str, law: str) -> None:
    LAWS[law](case_of(model_type))


def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_a_run_without_failures_writes() -> None:
    script = load_script("families")
    held = {name: dict.fromkeys(LAWS, "") for name in FAMILIES}
    text = script.page(held, WORDS)
    assert script.PAGE.read_text(encoding="utf-8") == text, "run scripts/families.py"
    broken = {**held, "olmoe": {**held["olmoe"], "parts": "AssertionError: 1e-3"}}
    assert "**fails: parts**" in script.page(broken, WORDS)


def test_every_model_type_of_transformers_with_experts_is_supported_or_refused() -> None:
    assert load_script("families").unlisted() == []


@pytest.mark.parametrize("package", ["transformers", "transformer-lens"])
def test_what_is_tested_is_the_oldest_version_that_pyproject_allows(package: str) -> None:
    """`make test-latest` is for the newest; everything else runs on what constraints.txt pins."""
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    (bounds,) = [found[1] for text in allowed if (found := re.match(rf"{package}\s*(\S+)", text))]
    oldest = re.search(r">=([\d.]+)", bounds)
    pinned = re.search(rf"^{package}==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert oldest and pinned
    assert pinned[1].startswith(oldest[1] + "."), "the pinned version is of the oldest minor version that is allowed"
