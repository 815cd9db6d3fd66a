"""Which releases of transformers and TransformerLens are taken, and what is said of others."""

import ast
import json
import re
import runpy
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import moe_lens
from moe_lens import HookedMoE
from moe_lens.errors import IncompatibleVersionError, UnsupportedModelError, UntestedVersionWarning
from moe_lens.model import hf_compat, tl_compat, touchpoints
from moe_lens.model.families import table
from moe_lens.model.families.table import FAMILIES, family_of, here
from moe_lens.model.loading.model_info import model_info
from tests.matrix.configs import config

PACKAGE = Path(moe_lens.__file__).parent


def pretend(monkeypatch: pytest.MonkeyPatch, *release: int) -> None:
    monkeypatch.setattr(table, "RELEASE", release)


# --- families ---


def test_families_have_the_releases_on_which_their_laws_hold() -> None:
    oldest, newest = here((5, 20, 0)), here((5, 24, 0))
    assert {"olmoe", "deepseek", "llama4"} <= {*oldest} and "lara_mini" not in oldest
    assert {"olmoe", "deepseek", "lara_mini"} <= {*newest} and "llama4" not in newest
    assert set(FAMILIES) == {name for minor in range(20, 25) for name in here((5, minor, 9))}
    for family in FAMILIES.values():
        assert hf_compat.OLDEST <= family.since <= (*hf_compat.NEWEST, 9)


@pytest.mark.parametrize(
    ("model_type", "release", "needs"),
    [
        ("aria_text", (5, 20, 2), "transformers 5.21 or newer, and 5.20.2 is installed: pip .* 'transformers>=5.21'"),
        ("llama4", (5, 24, 1), "transformers older than 5.24, and 5.24.1 is .*'transformers>=5.20,<5.24'"),
    ],
)
def test_a_family_is_refused_by_name_on_releases_on_which_it_does_not_hold(
    model_type: str, release: tuple[int, ...], needs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, 5, 23, 0)
    made = config(model_type)
    assert family_of(made).model_type == model_type
    pretend(monkeypatch, *release)
    with pytest.raises(UnsupportedModelError, match=f"'{model_type}' needs {needs}"):
        family_of(made)


@pytest.mark.typed
def test_a_model_type_that_is_to_come_is_refused_with_the_release_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as one that nobody knows."""
    pretend(monkeypatch, 5, 23, 0)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lara_mini"}), encoding="utf-8")
    for load in (HookedMoE.from_pretrained, model_info):
        with pytest.raises(UnsupportedModelError, match="'lara_mini' needs transformers 5.24 or newer, and 5.23.0 is"):
            load(tmp_path)


# --- releases ---


def run(monkeypatch: pytest.MonkeyPatch, installed: str) -> list[Any]:
    """What is warned of when the module is imported beside another transformers."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: installed)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        runpy.run_path(hf_compat.__file__)
    return [warning for warning in seen if warning.category is UntestedVersionWarning]


def test_a_minor_release_above_the_newest_tested_gives_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    newest = ".".join(map(str, hf_compat.NEWEST))
    assert run(monkeypatch, f"{newest}.7") == run(monkeypatch, "5.20.0") == []
    (warning,) = run(monkeypatch, "5.99.0.dev0")
    assert f"transformers 5.99.0.dev0 is newer than {newest}" in str(warning.message)


def test_what_is_missing_of_a_library_is_named_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.utils.hub.resolve_revision")
    monkeypatch.delattr("transformers.utils.output_capturing.OutputRecorder")
    with pytest.raises(IncompatibleVersionError) as error:
        run(monkeypatch, transformers.__version__)
    assert str(error.value).startswith(
        f"transformers {transformers.__version__} has no transformers.utils.hub.resolve_revision, "
        "transformers.utils.output_capturing.OutputRecorder, which moe_lens uses; it is tested with 5.20 to "
    )


def test_what_is_missing_of_transformer_lens_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    runpy.run_path(tl_compat.__file__)
    monkeypatch.delattr("transformer_lens.model_bridge.bridge_core.BridgeCore._pos_slice_dim")
    with pytest.raises(IncompatibleVersionError, match="transformer-lens 4.* has no .*Bridge._pos_slice_dim, which"):
        runpy.run_path(tl_compat.__file__)


class Owner:
    kept = 1

    def __init__(self) -> None:
        self.made = 2


class Heir(Owner):
    def method(self) -> int:
        return self.made


def setter(owner: Any) -> None:
    owner.set = 3


@pytest.mark.typed
def test_touchpoints_are_names_methods_and_attributes_of_instances() -> None:
    here_ = f"{__name__}:"
    globals_ = ["Owner", "Heir.method", "Heir.kept", "Heir.made=", "setter.set="]
    absent = ["Nobody", "Owner.method", "Owner.made", "Heir.gone=", "setter.gone=", "Nobody.made="]
    assert touchpoints.missing([here_ + name for name in globals_]) == []
    assert touchpoints.missing([here_ + name for name in absent]) == [here_ + name for name in absent]
    assert touchpoints.missing(["no_such_library:name"]) == ["no_such_library:name"]


@cache
def trees() -> dict[str, ast.Module]:
    """The package's modules, parsed, by their paths in it."""
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in PACKAGE.rglob("*.py")
    }


def imports(tree: ast.Module) -> set[str]:
    """Modules that a module imports from."""
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


PUBLIC = {
    "transformers": set[str](),
    "transformer_lens": {f"transformer_lens.{name}" for name in ("hook_points", "model_bridge", "ActivationCache")}
    | {"transformer_lens.utilities", "transformer_lens.utilities.statistics"},
}


@pytest.mark.parametrize(("library", "room"), [("transformers", "hf_compat.py"), ("transformer_lens", "tl_compat.py")])
def test_what_is_below_a_librarys_public_surface_is_imported_in_one_module(library: str, room: str) -> None:
    where = {
        path: found
        for path, tree in trees().items()
        if (found := {name for name in imports(tree) if name.startswith(f"{library}.")} - PUBLIC[library])
    }
    assert len(where.pop(f"model/{room}")) > 4
    for own in ("bailing", "deepseek"):  # models, made of transformers' own
        where.pop(f"model/families/{own}.py", None)
    assert where == {}


OTHERS = {
    *("_asdict", "_DummyThread", "_get_running_loop", "_getframe", "_is_protocol", "_replace"),  # Python's
    *(
        "_C",
        "_compiled_call_impl",
        "_current_graph_task_id",
        "_tensor_name",
        "_version",
        *vars(torch.nn.Module()),
    ),  # torch's
    *("_hf_hook", "_old_forward"),  # accelerate's
    *("_fingerprint",),  # that of datasets, without which they are pickled
    *("_tensor_data_names", "_type"),  # torchao's, in the headers of files
    *("_all_hooks", "_asked_kernel", "_cfg", "_original_names"),  # our own, in the `__dict__` of a model
}
"""Private names that need not be there in transformers or TransformerLens."""


def private_names(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Private names that a module defines, of itself or of `self`; and those that it asks objects for, quoted too."""
    defined, asked = set[str](), set[str]()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                defined.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                defined.add(name)
            case ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                asked.add(name)
            case ast.Subscript(slice=ast.Constant(value=str(name))):
                asked.add(name)
            case ast.Call(func=ast.Name(id="getattr" | "setattr"), args=[_, ast.Constant(value=str(name)), *_]):
                asked.add(name)
            case ast.Call(func=ast.Attribute(attr="get" | "pop"), args=[ast.Constant(value=str(name)), *_]):
                asked.add(name)
    defined, asked = ({name for name in names if re.fullmatch(r"_[^\W_]\w*", name)} for names in (defined, asked))
    return defined, asked


def test_every_private_name_of_another_library_is_a_touchpoint() -> None:
    """One that is renamed would be missed where it is used, or set in vain without an error."""
    code = "class A:\n def _a(self): self._b, c._c = getattr(d, '_d'), vars(e).pop('_e')\n f(_f=g._g, _=h['_h'].__i__)"
    assert private_names(ast.parse(code)) == ({"_a", "_b"}, {"_c", "_d", "_e", "_f", "_g", "_h"})
    found = [private_names(tree) for path, tree in trees().items() if not path.endswith("_compat.py")]
    listed = {re.split("[:.]", point.removesuffix("="))[-1] for point in hf_compat.TOUCHPOINTS + tl_compat.TOUCHPOINTS}
    used = set().union(*(asked for _, asked in found)) - set().union(*(defined for defined, _ in found))
    assert used - listed == used & OTHERS
    assert OTHERS - used <= {*vars(torch.nn.Module())}
