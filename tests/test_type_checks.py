"""The tests' own safety net: `--typed` checks annotations unless a test is `untyped`; `--reach` says what was not."""

import ast
import subprocess
import sys
from typing import Any

import jaxtyping
import pytest

from moe_lens import names, selection
from moe_lens.errors import InputError
from tests import type_hook

WRONG: Any = 3


def test_a_wrong_argument_is_noticed_where_types_are_checked(pytestconfig: pytest.Config):
    with pytest.raises(TypeError, match="parse_mlp" if pytestconfig.getoption("typed") else "expected string") as error:
        names.parse_mlp(WRONG)
    assert isinstance(error.value, jaxtyping.TypeCheckError) == pytestconfig.getoption("typed")


@pytest.mark.untyped
def test_a_user_sees_the_error_of_the_code_itself():
    with pytest.raises(TypeError, match="expected string"):
        names.parse_mlp(WRONG)


def test_a_run_in_which_nothing_would_be_checked_is_refused():
    command = [sys.executable, "-m", "pytest", "--typed", "-p", "moe_lens", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "tests/test_ids.py"], cwd=type_hook.ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and "moe_lens is imported already" in done.stderr


def test_no_conftest_imports_the_package():
    """It would come before the check of types, where a folder of tests is named on the command line."""
    found = [path.relative_to(type_hook.ROOT) for path in (type_hook.ROOT / "tests").rglob("conftest.py")]
    imports = "; ".join(f"import {'.'.join(path.with_suffix('').parts)}" for path in found)
    code = f"import sys; {imports}; assert 'moe_lens' not in sys.modules"
    assert len(found) > 1
    subprocess.run([sys.executable, "-c", code], cwd=type_hook.ROOT, check=True)


SOURCE = """
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, no_type_check, overload
from jaxtyping import Float as F
Rows = F[Tensor, "rows d"]

def public(): ...
def _own(x: int): ...
def _shaped(x: F[Tensor, ""]): ...
def _aliased() -> Rows: ...
def _imported(x: Elsewhere): ...
@overload
def public(x: Rows): ...
@no_type_check
def silent(): ...
if True:
    def chosen():
        def inside(x: Rows): ...
        def other(): ...
if TYPE_CHECKING:
    def never(x: Rows): ...
else:
    def always(): ...

@dataclass(frozen=True)
class Plain:
    x: int
    def method(self): ...
    def _method(self): ...
    @property
    def size(self): ...
@dataclass
class _Hidden:
    x: Rows
    def method(self): ...
    def shaped(self, *, x: Rows): ...
@dataclass
class _Base:
    x: Rows
    def shaped(self, *, x: Rows): ...
@dataclass
class Made(_Base):
    y: Rows
class Reader(Protocol):
    def read(self) -> Rows: ...
"""


def test_what_has_to_be_reached_is_read_from_the_source():
    tree = ast.parse(SOURCE)
    shapes = type_hook.shape_names(tree)
    assert shapes == {"F", "Rows"}
    assert list(type_hook.demanded(tree, {*shapes, "Elsewhere"})) == [
        "public",
        "_shaped",
        "_aliased",
        "_imported",
        "chosen",
        "chosen.<locals>.inside",
        "always",
        "Plain.method",
        "Plain.size",
        "_Hidden.__init__",
        "_Hidden.shaped",
        "_Base.shaped",
        "Made.__init__",
    ]


def test_the_constructor_of_a_class_that_checks_arguments_itself_is_checked_too(pytestconfig: pytest.Config):
    typed = pytestconfig.getoption("typed")
    constructor = "moe_lens.selection:Step.__init__"
    assert constructor in type_hook.package()
    type_hook.REACHED.discard(constructor)
    with pytest.raises(jaxtyping.TypeCheckError if typed else InputError, match="tokens"):
        selection.Step(2, 2, WRONG)
    assert constructor not in type_hook.REACHED
    selection.Step(2, 2)
    assert (constructor in type_hook.REACHED) == typed


def test_what_is_called_is_noted_where_types_are_checked(pytestconfig: pytest.Config):
    called = f"{names.parse_mlp.__module__}:{names.parse_mlp.__qualname__}"
    assert called in type_hook.package()
    type_hook.REACHED.discard(called)
    names.parse_mlp("blocks.0.hook_in")
    assert (called in type_hook.REACHED) == pytestconfig.getoption("typed")


def test_a_function_that_was_not_reached_fails_the_run(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config):
    class Session:
        exitstatus = pytest.ExitCode.OK

    def run(reached: set[str]) -> tuple[int, list[str]]:
        monkeypatch.setattr(type_hook, "REACHED", reached)
        session, lines = Session(), []
        reach = type_hook.Reach(Config())  # pyright: ignore[reportArgumentType]
        node = type("Node", (), {"workeroutput": {"reached": ["moe_lens.m:far"]}})
        reach.pytest_testnodedown(node)
        reach.pytest_sessionfinish(session)  # pyright: ignore[reportArgumentType]
        reach.pytest_terminal_summary(Terminal(lines))
        return session.exitstatus, lines

    class Config:
        pass

    class Terminal:
        def __init__(self, lines):
            self.section = self.line = lines.append

    monkeypatch.setattr(type_hook, "package", lambda: ["moe_lens.m:near", "moe_lens.m:far"])
    assert run({"moe_lens.m:near"}) == (pytest.ExitCode.OK, [])
    status, lines = run(set())
    assert status == pytest.ExitCode.TESTS_FAILED and lines[-1] == "  moe_lens.m:near"
