"""The public surface is one list, and it changes on purpose only."""

import importlib
import inspect

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
    offered = {name for name in vars(moe_lens) if not name.startswith("_")} - modules
    assert offered == set(PUBLIC) - {"__version__"}


def test_every_error_of_the_package_descends_from_the_public_one():
    errors = importlib.import_module("moe_lens.errors")
    classes = [
        value for value in vars(errors).values() if inspect.isclass(value) and value.__module__ == errors.__name__
    ]
    assert len(classes) > 1
    assert all(issubclass(value, moe_lens.MoELensError | UserWarning) for value in classes)
