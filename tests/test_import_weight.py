"""Starting stays quick: torch is imported with the first name that needs it, drawing and data libraries later still."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "moe_lens"
DRAWING = {"plotly", "circuitsvis"}
HEAVY = DRAWING | {"datasets", "numpy", "pandas", "scipy", "torch", "transformer_lens", "transformers"}
LAZY = DRAWING | {"datasets"}  # TransformerLens loads `datasets` itself; our own modules do not


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in sys.modules after a statement, in a fresh interpreter."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps([name for name in sys.modules if '.' not in name]))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


def imported_at_import(source: str) -> set[str]:
    """Top-level names that a module imports when it is itself imported: not in functions, not for type checkers."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for alternative in child.orelse:
                    yield alternative
                    yield from walk(alternative)
                continue
            yield child
            yield from walk(child)

    names = set()
    for node in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_importing_the_package_loads_nothing_else_until_something_is_asked_for():
    assert not loaded_by("import moe_lens, moe_lens.errors, moe_lens.data, moe_lens.cli") & HEAVY
    assert loaded_by("from moe_lens import Routing") >= {"torch"}  # the control


def test_wrapping_models_loads_no_drawing_library():
    loaded = loaded_by("from moe_lens import HookedMoE")
    assert "transformer_lens" in loaded
    assert not loaded & DRAWING


def test_the_check_would_notice_one():
    assert loaded_by("import moe_lens, plotly") & DRAWING == {"plotly"}


COMMANDS = ("report", "atlas", "routing", "single-expert", "lens", "collect", "compare", "prune", "models", "info")
ANSWERED = [
    (0, ["--help"]),
    (0, ["--version"]),
    *((0, [command, "--help"]) for command in COMMANDS),
    (2, ["rooting"]),
    (2, ["routing", "--tokans", "3"]),
    (2, ["routing", "--tokens", "many"]),
    (2, ["routing", "--dtype", "float31"]),
    (2, ["routing", "--device", "cuda:"]),
    (2, ["routing", "--config", "none.toml"]),
    (2, ["routing", "--domain", "few.txt"]),
    (2, ["routing", "--domain", "a=none.jsonl"]),
    (2, ["single-expert", "--model", "./none"]),
    (2, ["lens", "--lens", "./none"]),
    (2, ["collect", "--domain", "a=none.jsonl"]),
    (2, ["compare", "none", "none"]),
    (2, ["report", "none"]),
    (2, ["report", "--domain", "a=none.jsonl"]),
    (2, ["prune", "--specialist", "nobody"]),
    (2, ["info", "/none"]),
]


def test_the_command_line_answers_before_torch_is_imported():
    """Help, the version, wrong options and missing files. The last, which has to look at a model, is the control."""
    wanted = [arguments for _, arguments in ANSWERED] + [["info", "tiny-deepseekmoe"]]
    code = f"""
import sys
from moe_lens.cli import main
heavy = {sorted(HEAVY)}
answers = [(main(arguments), [name for name in heavy if name in sys.modules]) for arguments in {wanted}]
"""
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json; print(json.dumps(answers))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    *answers, (status, loaded) = json.loads(result.stdout.splitlines()[-1])
    assert status == 0 and {"torch", "transformers"} <= set(loaded)
    assert answers == [[status, []] for status, _ in ANSWERED]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_own_modules_import_heavy_libraries_only_when_needed(path: Path):
    assert not imported_at_import(path.read_text(encoding="utf-8")) & LAZY


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import datasets.load", {"datasets"}),
        ("class A:\n    from plotly import graph_objects", {"plotly"}),
        ("try:\n    import circuitsvis\nexcept ImportError:\n    pass", {"circuitsvis"}),
        ("if TYPE_CHECKING:\n    import plotly\nelse:\n    import datasets", {"datasets"}),
        ("def draw():\n    import plotly", set()),
    ],
)
def test_the_reader_of_imports_sees_what_it_should(source: str, found: set[str]):
    assert imported_at_import(source) == found
