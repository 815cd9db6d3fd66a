"""Constraints for `make test-oldest`: every runtime dependency at the lowest version that pyproject.toml allows.

The tools of the tests stay as constraints.txt has them. What the dependencies need beneath them is left to pip: pins
that fit their newest versions need not fit their oldest.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def key(name: str) -> str:
    """A distribution's name as it is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def named(requirement: str) -> str:
    """The distribution that a requirement is about."""
    return key(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])


def lowest(requirements: list[str]) -> dict[str, str]:
    """The lowest version that each requirement allows, by name.

    Raises:
        ValueError: a requirement has no lower bound.
    """
    bounds = {}
    for requirement in requirements:
        bound = re.search(r">=\s*([\w.]+)", requirement)
        if bound is None:
            raise ValueError(f"{requirement!r} has no lower bound; expected NAME>=VERSION,<VERSION")
        bounds[named(requirement)] = bound[1]
    return bounds


def constraints(pyproject: str, pinned: str) -> str:
    """The constraints, from the texts of pyproject.toml and constraints.txt."""
    project = tomllib.loads(pyproject)["project"]
    pins = dict(line.split("==") for line in pinned.splitlines() if "==" in line and not line.startswith("#"))
    pins = {key(name): version for name, version in pins.items()}
    tools = {name: pins[name] for name in map(named, project["optional-dependencies"]["dev"])}
    return "".join(
        f"{name}=={version}\n" for name, version in sorted({**tools, **lowest(project["dependencies"])}.items())
    )


if __name__ == "__main__":
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt")]
    print(constraints(*texts), end="")
