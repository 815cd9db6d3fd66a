"""What version 0.1 documented still imports: each dotted path that its docs, README and examples named."""

import importlib
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moe_lens import _moved

DOCUMENTED = (Path(__file__).parent / "documented_paths.txt").read_text().split()
REUSED = {  # modules whose name a package has now, one thing that was in each, and where that is
    "model.cache": ("MoECache", "model.cache.moe_cache"),
    "model.experts": ("experts_forward", "model.hooks.expert_kernel"),
    "model.families": ("FAMILIES", "model.families.table"),
    "model.loading": ("load_pretrained", "model.loading.pretrained"),
}


def found(path: str) -> Any:
    """The module, or the attribute of one, that a dotted path names."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        parent, _, name = path.rpartition(".")
        if not parent or error.name != path:
            raise
        return getattr(found(parent), name)


@pytest.mark.parametrize("path", DOCUMENTED)
def test_documented_paths_still_import(path: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert found(path) is not None


def test_a_path_that_never_was_is_not_found():
    with pytest.raises((ModuleNotFoundError, AttributeError)):
        found("moe_lens.model.nonsense")
    with pytest.raises(AttributeError, match="nonsense"):
        found("moe_lens.model.cache.nonsense")


@pytest.mark.typed
@pytest.mark.parametrize("former", _moved.MOVED)
def test_former_modules_are_todays_and_say_so(former: str):
    sys.modules.pop(_moved.PACKAGE + former, None)
    now = importlib.import_module(_moved.PACKAGE + _moved.MOVED[former])
    spec = now.__spec__
    with pytest.warns(DeprecationWarning, match=re.escape(f"{_moved.PACKAGE}{former} is now {now.__name__}")) as caught:
        before = importlib.import_module(_moved.PACKAGE + former)
    assert before is now and now.__spec__ is spec
    assert len(caught) == 1
    assert not Path(f"moe_lens/{former.replace('.', '/')}.py").exists(), "the table names a module that exists"


@pytest.mark.parametrize("former", _moved.MOVED)
def test_no_former_module_would_hide_what_its_package_offers(former: str):
    """Importing a module sets the attribute of its name on the package."""
    package, _, name = former.rpartition(".")
    offered = vars(importlib.import_module(_moved.PACKAGE + package)).get(name)
    assert offered is None or isinstance(offered, ModuleType)


@pytest.mark.parametrize("former", REUSED)
def test_packages_hand_on_what_the_module_of_their_name_held(former: str):
    name, now = REUSED[former]
    package, module = (importlib.import_module(_moved.PACKAGE + at) for at in (former, now))
    with pytest.warns(DeprecationWarning, match=re.escape(f"{_moved.PACKAGE}{now}.{name}")):
        assert getattr(package, name) is getattr(module, name)


def test_the_warning_points_at_the_users_line():
    code = "import moe_lens.cli.config"  # which imports no torch
    done = subprocess.run(
        [sys.executable, "-W", "always::DeprecationWarning", "-c", code], capture_output=True, text=True, check=True
    )
    assert "<string>:1: DeprecationWarning: moe_lens.cli.config is now" in done.stderr


@pytest.mark.parametrize(
    "package, former, now", [("lenses", "Tuning", "TrainingSummary"), ("data", "batched", "batch_windows")]
)
def test_renamed_things_are_todays_and_say_so(package: str, former: str, now: str):
    module = importlib.import_module(f"moe_lens.{package}")
    with pytest.warns(DeprecationWarning, match=rf"moe_lens\.{package}\.{former} is now moe_lens\.{package}\.{now}"):
        assert getattr(module, former) is getattr(module, now)
    with pytest.raises(AttributeError, match="nonsense"):
        module.nonsense  # noqa: B018
