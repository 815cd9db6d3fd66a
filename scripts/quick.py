"""What `make quick` runs: lint, types and tests of what changed since a commit, and one family's laws, in a minute.

Tests of a module are the test files that name it or something it defines. What the minute leaves no time for is listed.
"""

import argparse
import ast
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECONDS = 50
"""After which no further test is begun."""
FAMILY = ["tests/matrix/test_matrix.py", "-k", "olmoe"]


def changed(since: str) -> list[str]:
    """Python files that differ from a commit, those that git does not know yet among them."""
    said = [
        subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for command in (["diff", "--name-only", since], ["ls-files", "--others", "--exclude-standard"])
    ]
    names = sorted({name for text in said for name in text.splitlines()})
    return [name for name in names if name.endswith(".py") and (ROOT / name).exists()]


def words(name: str, source: str) -> set[str]:
    """What a test that is about a module may call it by: its dotted path, and what it defines for others."""
    defined = {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    return {name.removesuffix(".py").replace("/", "."), *(each for each in defined if not each.startswith("_"))}


def tests_of(names: Iterable[str], root: Path = ROOT) -> list[str]:
    """The test files that are among the names, and those that name one of the other modules; the former first."""
    names = list(names)
    examples = ["tests/test_examples.py"] if any(name.startswith("examples/") for name in names) else []
    own = list(dict.fromkeys([*(name for name in names if Path(name).name.startswith("test_")), *examples]))
    modules = [name for name in names if name.startswith(("moe_lens/", "tests/")) and name not in own]
    wanted = set().union(*(words(name, (root / name).read_text(encoding="utf-8")) for name in modules))
    if not wanted:
        return own
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, sorted(wanted)))})\b")
    every = sorted(root.glob("tests/**/test_*.py"))
    found = [str(path.relative_to(root)) for path in every if pattern.search(path.read_text(encoding="utf-8"))]
    return [*own, *(name for name in found if name not in own)]


class Deadline:
    """Begins no further test when the time is up."""

    def __init__(self, end: float):
        self.end = end
        self.left: dict[str, int] = {}
        self.over = self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note failures: where the time was up, the exit code says that alone."""
        self.failed |= report.failed

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note what cannot be collected."""
        self.failed |= report.failed

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Count what there is to do."""
        for item in items:
            self._count(item.nodeid, 1)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Note what was done."""
        self._count(nodeid, -1)

    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        """Stop before a test that would begin too late."""
        if time.monotonic() > self.end:
            self.over = True
            item.session.shouldstop = f"{SECONDS} s are over"

    def _count(self, nodeid: str, by: int) -> None:
        file = nodeid.partition("::")[0]
        self.left[file] = self.left.get(file, 0) + by


def main() -> int:
    """Run all of it; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("since", nargs="?", default="HEAD", help="a commit")
    end = time.monotonic() + SECONDS
    names = changed(parser.parse_args().since)
    bin_ = Path(sys.executable).parent
    checks = {
        "ruff check": [bin_ / "ruff", "check", "."],
        "ruff format": [bin_ / "ruff", "format", "--check", "."],
        "pyright": [bin_ / "pyright", *names] if names else [],
    }
    running = {
        what: subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for what, command in checks.items()
        if command
    }
    deadline = Deadline(end)
    options = ["-q", "-m", "not slow", "--rootdir", str(ROOT)]
    codes = [pytest.main([*options, *FAMILY], [deadline])]
    if tests := tests_of(names):
        codes.append(pytest.main([*options, *tests], [deadline]))
    fine = {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}
    fine |= {pytest.ExitCode.INTERRUPTED} if deadline.over and not deadline.failed else set()
    failed = [code for code in codes if code not in fine]
    for what, process in running.items():
        said, _ = process.communicate()
        if process.returncode:
            failed.append(process.returncode)
            print(f"{what}:\n{said}")
    if left := {file: n for file, n in deadline.left.items() if n}:
        print("no time for", ", ".join(f"{n} tests of {file}" for file, n in left.items()))
    print(f"{len(names)} changed files: " + ("something failed" if failed else "nothing failed"))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
