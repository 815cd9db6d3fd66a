"""`--config study.toml`: options of a command as a file, and a table for each domain."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_lens.data import DomainSpec, domains_from_table
from moe_lens.errors import InputError, near_miss

_DOMAINS = "domains"
_LARGEST = 2**24
_ELSEWHERE = {"config", "domain"}
"""Options that are no keys: the file itself, and what has tables of its own."""


def defaults(arguments: Sequence[str], commands: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the file of a command line's --config says, by the name of its command: typer's `default_map`.

    Args:
        arguments: Of the command line.
        commands: Typer's commands by name.

    Raises:
        InputError: The file cannot be read, is not TOML, or has a key that the command does not know.
    """
    path = _path(arguments)
    name = next((argument for argument in arguments if argument in commands), None)
    if path is None or name is None:
        return {}
    values = {key.replace("-", "_"): value for key, value in _read(path).items() if key != _DOMAINS}
    known = {parameter.name: parameter for parameter in commands[name].params if parameter.name not in _ELSEWHERE}
    if unknown := sorted(values.keys() - known.keys()):
        there = f"known: {', '.join(sorted(known))}, {_DOMAINS}{near_miss(unknown[0], [*known, _DOMAINS])}"
        raise InputError(f"--config {path}: unknown key {unknown[0]!r}; {there}")
    for key, value in values.items():  # typer takes true for 1, and 1 for true
        switch = getattr(known[key], "is_flag", False)
        if switch != isinstance(value, bool):
            expected = "true or false" if switch else "a value"
            raise InputError(f"--config {path}: {key} = {json.dumps(value, default=str)}; expected {expected}")
    return {name: values}


def config_domains(path: Path) -> list[DomainSpec]:
    """The domains of a file.

    Raises:
        InputError: A table is not as `DomainSpec` has it.
    """
    table = _read(path).get(_DOMAINS, {})
    if not isinstance(table, Mapping):
        raise InputError(f"--config {path}: {_DOMAINS} must be tables, such as [{_DOMAINS}.code]")
    return domains_from_table(table)


def _path(arguments: Sequence[str]) -> Path | None:
    for place, argument in enumerate(arguments):
        if argument == "--config" and place + 1 < len(arguments):
            return Path(arguments[place + 1])
        if argument.startswith("--config="):
            return Path(argument.removeprefix("--config="))
    return None


def _read(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():
        raise InputError(f"--config {path}: is {'a folder' if path.is_dir() else 'a pipe or a device'}, and no file")
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise InputError(f"--config {path}: more than {_LARGEST // 2**20} MiB; it is no list of options")
        found = tomllib.loads(content.decode())
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror or error})") from None
    except RecursionError:
        raise InputError(f"--config {path}: not TOML (nested too deeply)") from None
    except ValueError as error:  # TOML's own, not UTF-8, a number of thousands of digits
        raise InputError(f"--config {path}: not TOML ({error})") from None
    if "\\u0000" in json.dumps(found, default=str):
        raise InputError(f"--config {path}: a value holds the character 0, which no name can have")
    return found
