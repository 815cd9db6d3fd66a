"""The public surface is one list, and it changes on purpose only."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import moe_lens

PUBLIC = [
    "HookedMoE",
    "LogitLens",
    "MoECache",
    "MoELensError",
    "PartialSum",
    "Routing",
    "Selection",
    "TunedLens",
    "__version__",
]


def test_all_is_the_list_above():
    assert sorted(moe_lens.__all__) == PUBLIC


def test_every_name_is_there_and_documented():
    for name in PUBLIC:
        value = getattr(moe_lens, name)
        assert name == "__version__" or inspect.getdoc(value), name


def test_nothing_else_is_offered():
    modules = {name for name in vars(moe_lens) if inspect.ismodule(getattr(moe_lens, name))}
    offered = {name for name in dir(moe_lens) if not name.startswith("_")} - modules
    assert offered == set(PUBLIC) - {"__version__"}


@pytest.mark.parametrize("name", ["moe_lens", "moe_lens.data"])
def test_names_that_are_resolved_late_are_those_that_type_checkers_see(name: str):
    package = importlib.import_module(name)
    (block,) = (node for node in ast.parse(inspect.getsource(package)).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen and seen.keys() <= set(dir(package))
    for offered, module in seen.items():
        assert getattr(package, offered) is getattr(importlib.import_module(str(module)), offered)
    (call,) = (n for n in ast.walk(block) if isinstance(n, ast.Call) and "resolved_late" in ast.unparse(n.func))
    assert {n for names in ast.literal_eval(call.args[1]).values() for n in names} == seen.keys()
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nonsense'"):
        _ = package.nonsense


PACKAGES = sorted(path.parent for path in Path(moe_lens.__file__).parent.rglob("__init__.py"))


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: folder.name)
def test_packages_offer_what_they_import_and_not_a_module_of_the_same_name(folder: Path):
    name = ".".join(folder.relative_to(PACKAGES[0].parent).parts)
    package = importlib.import_module(name)
    for node in ast.walk(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(f"{name}."):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert getattr(package, alias.asname or alias.name) is getattr(module, alias.name), alias.name


def test_every_error_of_the_package_descends_from_the_public_one():
    errors = importlib.import_module("moe_lens.errors")
    classes = [
        value for value in vars(errors).values() if inspect.isclass(value) and value.__module__ == errors.__name__
    ]
    assert len(classes) > 1
    assert all(issubclass(value, moe_lens.MoELensError | UserWarning) for value in classes)
