"""What pyproject.toml claims: dependencies that are used, a stack that is the tested one, a wheel that is whole."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import moe_lens

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUNTIME = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line[:1] not in ("", "#")
)
PINS = {canonicalize_name(name): pin for name, pin in PINS.items()}


def distributions_imported_by(sources: list[str]) -> set[str]:
    """Distributions behind every import, at any depth of the source; the standard library and ourselves left out."""
    modules = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module.split(".")[0])
    modules -= {*sys.stdlib_module_names, "moe_lens"}
    known = packages_distributions()
    return {canonicalize_name(known[module][0]) for module in modules}


def test_the_package_imports_what_it_declares_and_nothing_else():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "moe_lens").rglob("*.py")]
    assert distributions_imported_by(sources) == {canonicalize_name(requirement.name) for requirement in RUNTIME}


def test_an_undeclared_import_would_be_seen():
    assert distributions_imported_by(["def f():\n    import yaml.nodes\n    import os"]) == {"pyyaml"}


@pytest.mark.parametrize("requirement", RUNTIME + EXTRAS, ids=lambda requirement: requirement.name)
def test_every_range_admits_the_tested_version(requirement: Requirement):
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("requirement", RUNTIME, ids=lambda requirement: requirement.name)
def test_runtime_ranges_are_bounded_on_both_sides(requirement: Requirement):
    assert {specifier.operator for specifier in requirement.specifier} == {">=", "<"}


@pytest.mark.parametrize("requirement", RUNTIME, ids=lambda requirement: requirement.name)
def test_this_very_run_tests_the_pinned_version(requirement: Requirement):
    assert version(requirement.name).split("+")[0] == PINS[canonicalize_name(requirement.name)]


def test_constraints_are_plain_pins():
    assert all(re.fullmatch(r"[0-9][0-9A-Za-z.]*", pin) for pin in PINS.values())


def test_there_is_one_version():
    heading = re.search(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heading and heading[1] == moe_lens.__version__
    assert f"\nversion: {moe_lens.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert PROJECT["dynamic"] == ["version"]


@pytest.mark.slow
def test_the_wheel_holds_the_package_with_its_assets_and_nothing_else(tmp_path: Path):
    build = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run([sys.executable, *build], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("moe_lens-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        points = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt"))
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "moe_lens"]
    listed = subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True)
    assert held == set(listed.stdout.splitlines())
    pages = {"moe_lens/atlas/index.html", "moe_lens/atlas/atlas.css", "moe_lens/atlas/start.js"}
    assert {"moe_lens/py.typed", "moe_lens/assets/tiny-deepseekmoe/config.json"} | pages <= held
    assert "moe-lens = moe_lens.cli:main" in points
