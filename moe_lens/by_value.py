"""Digests of values, of functions too: equal in another process where what they stand for is equal."""

import functools
import hashlib
import pickle
import re
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_lens.errors import InputError, a_kind

_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    slice,
    range,
    type(...),
    PurePath,
)


_HOLDING = (Tensor, np.ndarray, Mapping, list, tuple, set, frozenset, types.FunctionType)

_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
"""Where code lies that is not its users' own."""


@dataclass(frozen=True)
class _Outside:
    """What nobody has handed over, so that nothing in it is refused.

    A function reads it by name from its module, or an object keeps it to itself.
    """

    value: Any


def digest_of(value: Any, *, pickled: bool = True) -> str:
    """A short digest of a value: of functions, their code and what they hold; of tensors, all numbers.

    Models are left out, wherever they are held: they have a digest of their own. So are lists that functions of this
    package hold, in which these keep what they have seen.

    Args:
        value: What to tell from others.
        pickled: Pickle what is of no kind that is known here, which may be slow; otherwise its class and the plain
            values in its public attributes tell it from others, and nothing is refused.

    Raises:
        InputError: it holds something that has no value, such as an open file.
    """
    found = hashlib.sha256()
    for part in _parts(value, {}, pickled):
        found.update(part)
    return found.hexdigest()[:16]


def _parts(value: Any, seen: dict[int, Any], pickled: bool) -> Iterator[bytes]:
    """What a value is made of, with the kind of each part in front."""
    if isinstance(value, _Outside):
        value, pickled = value.value, False
    yield f"<{type(value).__qualname__}>".encode()
    if isinstance(value, _PLAIN):
        yield repr(value).encode()
        return
    if id(value) in seen:  # a circle, or the same again
        yield str(list(seen).index(id(value))).encode()
        return
    seen[id(value)] = value
    if hasattr(value, "moe_layers") or isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
        yield getattr(value, "__qualname__", "").encode()
        if isinstance(value, type) and _is_users_own(value):
            methods = {name: each for name, each in vars(value).items() if isinstance(each, types.FunctionType)}
            yield from _parts(methods, seen, pickled)
    elif isinstance(value, np.ndarray) and value.dtype.kind not in "biufc":  # texts, objects, dates
        yield from _parts(value.tolist(), seen, pickled)
    elif isinstance(value, Tensor | np.ndarray):
        held = torch.as_tensor(value).detach().cpu().contiguous()
        yield f"{held.dtype} {tuple(held.shape)}".encode() + held.flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, torch.Generator):
        yield str(value.initial_seed()).encode()
    elif isinstance(value, set | frozenset):
        yield from sorted(b"".join(_parts(one, seen, pickled)) for one in value)
    else:
        for part in _held(value, pickled):
            yield from _parts(part, seen, pickled)


def _held(value: Any, pickled: bool) -> list[Any]:
    """The values that one holds.

    Raises:
        InputError: nobody knows them.
    """
    if isinstance(value, Mapping):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, types.FunctionType):
        return _of_function(value)
    if isinstance(value, types.CodeType):
        return [value.co_code, value.co_consts, value.co_names]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, nn.Module) and pickled:
        return [type(value), *value.state_dict().items()]
    own = type(value).__module__.startswith("moe_lens.")
    if own or (callable(value) and pickled):
        names = [*vars(value)] if hasattr(value, "__dict__") else list(getattr(type(value), "__slots__", ()))
        public = [(name, getattr(value, name, None)) for name in names if not name.startswith("_")]
        return [type(value), *public, *([] if own else map(_Outside, _of_object(value)))]
    if not pickled:
        return [type(value), *_of_object(value)]
    try:
        return [pickle.dumps(value)]
    except Exception:  # pickle raises errors of many kinds
        raise InputError(f"{a_kind(value)} has no value that could be told from another's") from None


def _of_object(value: Any) -> list[Any]:
    """What tells an object from others of its class that are not to be pickled."""
    if isinstance(value, re.Pattern):
        return [value.pattern, value.flags]
    package = type(value).__module__.partition(".")[0]
    if package == "pandas":
        return [value.to_dict() if hasattr(value, "to_dict") else repr(value)]
    if package == "datasets":
        return [vars(value).get("_fingerprint") or pickle.dumps(value)]
    held = getattr(value, "__dict__", {}).items()
    if _is_users_own(type(value)):
        return [pair for pair in held if isinstance(pair[1], (*_PLAIN, *_HOLDING))]
    return [pair for pair in held if isinstance(pair[1], _PLAIN) and not pair[0].startswith("_")]


def _is_users_own(kind: type) -> bool:
    package, module = kind.__module__.partition(".")[0], sys.modules.get(kind.__module__)
    library = package == "moe_lens" or package in sys.stdlib_module_names and package != "__main__"
    return not library and not _is_of_a_library(getattr(module, "__file__", None) or "")


def _of_function(function: types.FunctionType) -> list[Any]:
    """Its code, and what it reads from outside: of what encloses it, and by name from its module."""
    if _is_of_a_library(function.__code__.co_filename):
        return [function.__code__]
    cells = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            cells[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    if function.__module__.startswith("moe_lens."):
        cells = {name: value for name, value in cells.items() if not isinstance(value, list)}
    names = dict.fromkeys(_names_in(function.__code__))
    read = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, module in list(read.items()):
        if isinstance(module, types.ModuleType) and not _is_of_a_library(getattr(module, "__file__", None) or ""):
            read |= {f"{name}.{each}": vars(module)[each] for each in names if each in vars(module)}
    outside = {name: _Outside(value) for name, value in read.items()}
    return [function.__code__, function.__defaults__, function.__kwdefaults__, cells, outside]


def _names_in(code: types.CodeType) -> Iterator[str]:
    """The names that a function reads, those of functions and comprehensions within it too."""
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _names_in(const)


def _is_of_a_library(file: str) -> bool:
    return file.startswith(_LIBRARIES)
