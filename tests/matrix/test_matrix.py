"""Every supported family obeys every law, and every model type with experts is supported or refused with a reason."""

import importlib.util
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers import CONFIG_MAPPING

from moe_lens.model.families.refusals import REFUSED
from moe_lens.model.families.table import FAMILIES, here
from tests.matrix import laws
from tests.matrix.configs import OWN
from tests.matrix.laws import LAWS, WORDS, Case

ROOT = Path(__file__).parents[2]

case_of = lru_cache(maxsize=2)(Case)


# Edits run a model once for every hook, on ways whose shapes "own values" has checked: checking them takes longer.
MARKS = {"edits": [pytest.mark.untyped]}


@pytest.mark.parametrize("law", [pytest.param(law, marks=MARKS.get(law, [])) for law in LAWS])
@pytest.mark.parametrize("model_type", here())
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


def test_the_detector_sees_every_model_type_that_is_in_a_table() -> None:
    """Or it could not be trusted to see one that is in none."""
    script = load_script("families")
    known = [name for name in {*FAMILIES, *REFUSED} - {*OWN} if name in CONFIG_MAPPING]  # on this transformers
    assert len(known) > 70
    assert [name for name in known if not script.has_experts(name)] == []
    assert not any(map(script.has_experts, ("llama", "bamba", "qwen3_5", "llava")))


def test_a_model_type_in_neither_table_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("families")
    monkeypatch.setattr(script, "FAMILIES", {name: row for name, row in FAMILIES.items() if name != "olmoe"})
    monkeypatch.setattr(script, "REFUSED", {name: why for name, why in REFUSED.items() if name != "nemotron_h_omni"})
    assert script.unlisted() == ["nemotron_h_omni", "olmoe"]  # in the text part, and of its own


def test_a_broken_family_is_reported_by_law_and_does_not_stop_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What `make test-latest` says, with four families of which two broke."""
    script = load_script("families")

    def case_of(name: str) -> str:
        if name == "mixtral":
            raise ImportError("MixtralForCausalLM is\n gone")
        return name

    def parts(case: str) -> None:
        if case == "glm4_moe":
            raise AssertionError("1e-3")

    def runs(broken: bool) -> tuple[int, str]:
        names = ["glm4_moe", "mixtral", "olmoe", "phimoe"][0 if broken else 2 :]
        monkeypatch.setattr(script, "FAMILIES", {name: FAMILIES[name] for name in names})
        monkeypatch.setattr(script, "here", lambda: names)
        monkeypatch.setattr(script, "unlisted", lambda: ["flurry_moe"] if broken else [])
        monkeypatch.setattr(laws, "Case", case_of)
        monkeypatch.setattr(laws, "LAWS", {"logits": lambda case: None, "parts": parts})
        monkeypatch.setattr(script, "PAGE", tmp_path / "families.md")
        script.PAGE.write_text(script.page({name: {} for name in names}, laws.WORDS), encoding="utf-8")
        return script.main(["--check"]), capsys.readouterr().out

    status, said = runs(broken=True)
    assert status == 1
    assert "phimoe: every check passes\n" in said
    assert said.split("\n\n")[1].splitlines()[0].endswith(": 3 broken")
    assert said.split("\n\n")[1].splitlines()[1:] == [
        "  glm4_moe: parts: AssertionError: 1e-3",
        "  mixtral: every check: ImportError: MixtralForCausalLM is gone",
        "  have experts and are neither supported nor refused: flurry_moe",
    ]
    status, said = runs(broken=False)
    assert status == 0 and said.rstrip().endswith(": nothing broke")

    script.PAGE.write_text("stale", encoding="utf-8")
    assert script.main(["olmoe"]) == script.main(["--check", "olmoe"]) == 0
    assert "phimoe" not in capsys.readouterr().out
    assert script.PAGE.read_text(encoding="utf-8") == "stale"
    with pytest.raises(SystemExit):
        script.main(["--check", "olmoe", "llama"])
    assert "llama: not supported on transformers 5" in capsys.readouterr().err


OLDEST = load_script("oldest")


def test_the_oldest_versions_are_the_lower_bounds_of_pyproject() -> None:
    made = dict(line.split("==") for line in OLDEST.constraints(*texts()).splitlines())
    for text in tomllib.loads(texts()[0])["project"]["dependencies"]:
        requirement = Requirement(text)
        (bound,) = [each.version for each in requirement.specifier if each.operator == ">="]
        assert made[canonicalize_name(requirement.name)] == bound
    assert "pytest" in made, "the tools of the tests are those that constraints.txt pins"
    with pytest.raises(ValueError, match="'rich<16' has no lower bound"):
        OLDEST.lowest(["rich<16"])


def test_torch_is_the_one_library_that_is_tested_at_one_version_only() -> None:
    """Another build of it is gigabytes: its lower bound is the version of constraints.txt."""
    oldest = OLDEST.lowest(tomllib.loads(texts()[0])["project"]["dependencies"])["torch"]
    assert f"\ntorch=={oldest}." in texts()[1]


def texts() -> list[str]:
    return [(ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt")]
