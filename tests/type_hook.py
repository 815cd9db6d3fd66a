"""`pytest --typed`: every annotation of the package, shapes too, is checked at every call.

With `--reach` the run fails unless every public function, and every other one with a shape in its annotations, was
called and found right. Which functions those are is read from the source, and which were called is noted by the check
itself.
"""

import ast
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from beartype import BeartypeConf, FrozenDict, beartype
from beartype.typing import Self

ROOT = Path(__file__).parents[1]

REACHED: set[str] = set()
"""Functions, as `module:qualified.name`, whose arguments or result were checked and right."""

# Functions are decorated one by one, where beartype cannot know what Self stands for.
_beartyped = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: object})))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The type checker that jaxtyping's import hook puts around each function of the package.

    What it checks is compiled when the function is first called: most are not, in most processes, and compiling all
    takes longer than importing the package.
    """
    name = f"{function.__module__}:{function.__qualname__}"
    typed: Callable[..., Any] | None = None

    @functools.wraps(function)
    def noted(*args: Any, **kwargs: Any) -> Any:
        nonlocal typed
        typed = typed or _beartyped(function)
        result = typed(*args, **kwargs)
        REACHED.add(name)
        return result

    return noted


_jaxtyping: Any = jaxtyping
_jaxtyped = _jaxtyping.jaxtyped


def install() -> None:
    """Check the package as it is imported: to be called before that."""
    _jaxtyping.jaxtyped = jaxtyped
    jaxtyping.install_import_hook("moe_lens", f"{__name__}.{checked.__name__}")


def jaxtyped(target: Any = None, **kwargs: Any) -> Any:
    """What the import hook decorates with; jaxtyping's, but for dataclasses whose constructor is `moe_lens.checked`.

    jaxtyping would take the constructor for one that it has checked already: what `moe_lens.checked` puts around it
    is a function of the package, and so has been.
    """
    if target is None:
        return functools.partial(jaxtyped, **kwargs)
    constructor = vars(target).get("__init__") if dataclasses.is_dataclass(target) else None
    if "__checked__" in getattr(constructor, "__dict__", ()):
        target.__init__ = _jaxtyped(constructor, **kwargs)
        return target
    return _jaxtyped(target, **kwargs)


def package() -> list[str]:
    """The functions of the package that have to be reached, named as in `REACHED`."""
    trees = {}
    for path in sorted((ROOT / "moe_lens").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(encoding="utf-8"))
    shapes = set().union(*(shape_names(tree) for tree in trees.values()))
    return [f"{module}:{name}" for module, tree in trees.items() for name in demanded(tree, shapes)]


def shape_names(tree: ast.Module) -> set[str]:
    """What a module imports of jaxtyping, and what it calls types that are made of that."""
    found = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"
        for alias in node.names
    }
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _shaped(found, node.value):
            found.add(node.targets[0].id)
    return found


def demanded(tree: ast.Module, shapes: set[str]) -> Iterator[str]:
    """The qualified names of a module's functions that are public, or have one of `shapes` in their annotations."""

    bases = {base.id for node in tree.body if isinstance(node, ast.ClassDef) for base in node.bases
             if isinstance(base, ast.Name)}  # fmt: skip

    def visit(body: list[Any], path: str, public: bool) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not _unchecked(node):
                # Of a dataclass jaxtyping checks the fields, after its constructor; those of a private base with the
                # fields of the classes that are made of it.
                fields = (each.annotation for each in node.body if isinstance(each, ast.AnnAssign))
                base = node.name.startswith("_") and node.name in bases
                if "dataclass" in _decorators(node) and _shaped(shapes, *fields) and not base:
                    yield f"{path}{node.name}.__init__"
                yield from visit(node.body, f"{path}{node.name}.", public and not node.name.startswith("_"))
            elif isinstance(node, ast.FunctionDef) and not _unchecked(node):
                named = re.fullmatch("(?!_).*|__.*__", node.name)
                if (public and named) or _shaped(shapes, node.args, node.returns):
                    yield f"{path}{node.name}"
                yield from visit(node.body, f"{path}{node.name}.<locals>.", False)
            elif not isinstance(node, ast.ClassDef | ast.FunctionDef):
                parts = ("body", "orelse", "handlers", "finalbody")
                for part in parts[1:] if _never_run(node) else parts:
                    yield from visit(getattr(node, part, []), path, public)

    return visit(tree.body, "", True)


def _decorators(node: ast.ClassDef | ast.FunctionDef) -> set[str]:
    calls = (each.func if isinstance(each, ast.Call) else each for each in node.decorator_list)
    return {ast.unparse(each).split(".")[-1] for each in calls}


def _unchecked(node: ast.ClassDef | ast.FunctionDef) -> bool:
    """What jaxtyping leaves alone, and what has no body that could be called."""
    if isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases):
        return True
    return bool(_decorators(node) & {"no_type_check", "overload", "abstractmethod"})


def _never_run(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _shaped(shapes: set[str], *annotations: ast.AST | None) -> bool:
    names = (each for annotation in annotations if annotation for each in ast.walk(annotation))
    return any(isinstance(each, ast.Name) and each.id in shapes for each in names)


class Reach:
    """Gathers what test processes reached, and fails the run where something was not."""

    def __init__(self, config: pytest.Config):
        self.sent: dict[str, Any] | None = getattr(config, "workeroutput", None)
        self.missed: list[str] = []

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        REACHED.update(node.workeroutput.get("reached", ()))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.sent is not None:
            self.sent["reached"] = sorted(REACHED)
            return
        self.missed = [name for name in package() if name not in REACHED]
        if self.missed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.missed:
            terminalreporter.section("not reached with types checked")
            terminalreporter.line("Mark a test that calls them with `typed`:")
            for name in self.missed:
                terminalreporter.line(f"  {name}")
