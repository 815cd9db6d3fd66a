"""Digests of values, of functions too: equal in another process where what they stand for is equal."""

import functools
import hashlib
import pickle
import types
from collections.abc import Iterator, Mapping
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
        return [type(value), *((name, getattr(value, name, None)) for name in names if not name.startswith("_"))]
    if not pickled:
        plain = [pair for pair in getattr(value, "__dict__", {}).items() if isinstance(pair[1], _PLAIN)]
        return [type(value), *(pair for pair in plain if not pair[0].startswith("_"))]
    try:
        return [pickle.dumps(value)]
    except Exception:  # pickle raises errors of many kinds
        raise InputError(f"{a_kind(value)} has no value that could be told from another's") from None


def _of_function(function: types.FunctionType) -> list[Any]:
    """Its code, and what it reads from outside: what encloses it, and the plain values and tensors of its module."""
    cells = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            cells[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    if function.__module__.startswith("moe_lens."):
        cells = {name: value for name, value in cells.items() if not isinstance(value, list)}
    read = (function.__globals__.get(name) for name in function.__code__.co_names)
    outside = [value for value in read if isinstance(value, (*_PLAIN, Tensor, np.ndarray))]
    return [function.__code__, function.__defaults__, function.__kwdefaults__, cells, outside]
