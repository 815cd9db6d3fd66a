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
    name = next((argument for argument in arguments if argument in commands), None)
    if name is None:
        return {}
    _once(arguments, commands[name].params)
    path = _path(arguments)
    if path is None or "config" not in [parameter.name for parameter in commands[name].params]:
        return {}
    values: dict[str, Any] = {}
    for key, value in _read(path).items():
        if (option := key.replace("-", "_")) in values:
            raise InputError(f"--config {path}: {key} is given twice, once with a hyphen")
        if key != _DOMAINS:
            values[option] = value
    options = [parameter for parameter in commands[name].params if parameter.opts[0].startswith("--")]
    known = {_key(option): option for option in options if option.name not in _ELSEWHERE}
    if unknown := sorted(values.keys() - known.keys()):
        there = f"known: {', '.join(sorted(known))}, {_DOMAINS}{near_miss(unknown[0], [*known, _DOMAINS])}"
        raise InputError(f"--config {path}: unknown key {unknown[0]!r}; {there}")
    for key, value in values.items():  # typer takes true for 1, and 1 for true
        switch = getattr(known[key], "is_flag", False)
        if switch != isinstance(value, bool):
            expected = "true or false" if switch else "a value"
            raise InputError(f"--config {path}: {key} = {json.dumps(value, default=str)}; expected {expected}")
        if value in ("", []):
            raise InputError(f"--config {path}: {key} is empty; leave it out, and it is as without --config")
        if getattr(known[key], "multiple", False) != isinstance(value, list):
            expected = "a list, as it can be given several times" if not isinstance(value, list) else "one value"
            raise InputError(f"--config {path}: {key} = {json.dumps(value, default=str)}; expected {expected}")
        inside = value if isinstance(value, list) else [value]
        if isinstance(value, list) and any(isinstance(one, bool | dict | list) for one in value):
            raise InputError(f"--config {path}: {key} = {json.dumps(value, default=str)}; expected a list of values")
        if _is_text(known[key]) and not all(isinstance(one, str) for one in inside):
            raise InputError(f"--config {path}: {key} = {json.dumps(value, default=str)}; expected text in quotes")
    return {name: {known[key].name: value for key, value in values.items()}}


def _key(option: Any) -> str:
    """What an option is called in a file: as on the command line, without hyphens."""
    return option.opts[0].removeprefix("--").replace("-", "_")


def _once(arguments: Sequence[str], parameters: Sequence[Any]) -> None:
    """Refuse an option that is given twice and can have one value: either could be meant.

    Raises:
        InputError: Such an option; names it.
    """
    words = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    for parameter in parameters:
        both = [option for option in (*parameter.opts, *parameter.secondary_opts) if option in words]
        if getattr(parameter, "is_flag", False) and len(both) > 1:
            raise InputError(f"{' and '.join(both)} are given; expected one of them")
        if getattr(parameter, "multiple", False) or getattr(parameter, "is_flag", False) or parameter.nargs != 1:
            continue
        for option in parameter.opts:
            times = sum(word == option or word.startswith(f"{option}=") for word in words)
            if option.startswith("--") and times > 1:
                raise InputError(f"{option} is given {times} times; expected once")


def _is_text(parameter: Any) -> bool:
    """Whether an option's value is a text or a path, and no number, as far as typer tells."""
    kind = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    return kind not in (None, bool, int, float, list[int], list[float])


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
        found = tomllib.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror or error})") from None
    except RecursionError:
        raise InputError(f"--config {path}: not TOML (nested too deeply)") from None
    except ValueError as error:  # TOML's own, not UTF-8, a number of thousands of digits
        raise InputError(f"--config {path}: not TOML ({error})") from None
    if "\\u0000" in json.dumps(found, default=str):
        raise InputError(f"--config {path}: a value holds the character 0, which no name can have")
    return found
