"""Every supported family obeys every law, and every model type with experts is supported or refused with a reason."""

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MULTIMODAL

from moe_lens.model.families import FAMILIES
from moe_lens.model.refusals import REFUSED
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
    """Found by its source: the experts interface, or a config field that counts experts."""
    package = Path(transformers.__file__).parent / "models"
    known = {*FAMILIES, *REFUSED}
    missing = []
    for model_type in {*CAUSAL, *MULTIMODAL}:
        folder = package / model_type_to_module_name(model_type)
        sources = "".join(file.read_text(encoding="utf-8") for file in folder.glob("*.py"))
        if ("use_experts_implementation" in sources or "num_experts" in sources) and model_type not in known:
            missing.append(model_type)
    assert not missing
